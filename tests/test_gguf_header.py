"""The header of a GGUF file: a sound one is read, one that promises what isn't there is refused in one line."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest

from planish.errors import PlanishError
from planish.gguf_header import read_header


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_tensor("first", numpy.ones((4, 32), dtype=numpy.float32))
    writer.add_tensor("second", numpy.ones((8,), dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _behind(data: bytes, text: bytes, skip: int = 0) -> int:
    return data.index(text) + len(text) + skip


def test_sound_gguf(sound: Path) -> None:
    header = read_header(sound)
    stored = header.stored
    assert header.places["first"][:2] == (0, (4, 32)) and header.places["second"].shape == (8,)
    assert (stored.tensors, stored.largest) == (2, 32) and stored.bytes >= 4 * 32 * 4 + 16


@pytest.mark.parametrize(
    ("at", "new", "match"),
    [
        (lambda d: 0, b"GGML", "it starts with b'GGML'"),
        (lambda d: 4, struct.pack("<I", 9), "version 9"),
        (lambda d: 8, struct.pack("<Q", 2**62), "tensors in"),
        (lambda d: 16, struct.pack("<Q", 2**62), "it promises"),
        (lambda d: 16, struct.pack("<Q", 20), "truncated or damaged"),
        (lambda d: 24, struct.pack("<Q", 2**63), "bytes are promised at"),
        (lambda d: _behind(d, b"llama.block_count"), struct.pack("<I", 77), "has type 77"),
        (lambda d: _behind(d, b"llama.block_count", 4), struct.pack("<I", 10**9), "block_count is 1000000000, but"),
        (lambda d: _behind(d, b"ggml.tokens", 8), struct.pack("<Q", 10**12), "has 1000000000000 elements"),
        (lambda d: _behind(d, b"some.numbers", 4), struct.pack("<I", 9), "is an array of type 9"),
        (lambda d: _behind(d, b"some.numbers", 8), struct.pack("<Q", 100_000), "bytes are promised"),
        (lambda d: _behind(d, b"second"), struct.pack("<I", 2**31), "2147483648 dimensions"),
        (lambda d: _behind(d, b"second", 4), struct.pack("<Q", 2**60), "overlaps another or the end"),
        (lambda d: _behind(d, b"second", 4), struct.pack("<Q", 0), r"can't be \[0\]"),
        (lambda d: _behind(d, b"second", 12), struct.pack("<I", 99), "of type 99"),
        (lambda d: _behind(d, b"second", 16), struct.pack("<Q", 0), "overlaps another or the end"),
        (lambda d: _behind(d, b"second", 16), struct.pack("<Q", 7), "at 7"),
        (lambda d: d.index(b"second") - 8, struct.pack("<Q", 5) + b"first", "is there twice"),
    ],
)
def test_gguf_that_promises_what_is_not_there(sound: Path, at: Callable[[bytes], int], new: bytes, match: str) -> None:
    data = sound.read_bytes()
    where = at(data)
    sound.write_bytes(data[:where] + new + data[where + len(new) :])
    with pytest.raises(PlanishError, match=match) as caught:
        read_header(sound)
    assert "x.gguf" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 3, 24, 100, 300])
def test_gguf_cut_short(sound: Path, length: int) -> None:
    sound.write_bytes(sound.read_bytes()[:length])
    with pytest.raises(PlanishError, match="truncated or damaged"):
        read_header(sound)
