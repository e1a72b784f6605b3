"""Guard: what a stranger's file promises is refused in one line before anything is made of it."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planish.errors import PlanishError
from planish.guard import (
    Patterns,
    Stored,
    check_config,
    check_header,
    read_index,
    read_json,
    reading,
)

STORED = Stored(tensors=300, largest=50_000, bytes=1 << 28)


def _json(tmp_path: Path, content: bytes | str | dict[str, Any]) -> Path:
    path = tmp_path / "x.json"
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _refusal(call: Callable[[], Any]) -> str:
    """What a call is refused with: one line."""
    with pytest.raises(PlanishError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- JSON


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"\x80", b"[" * 100_000, b'{"a":' * 100_000, b'{"a": 1' + b"0" * 9000 + b"}"]
)
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    assert "x.json is damaged" in _refusal(lambda: read_json(_json(tmp_path, content)))


@pytest.mark.parametrize("content", ["[]", "null", "5", '"x"'])
def test_json_that_is_no_object(tmp_path: Path, content: str) -> None:
    assert "holds no JSON object" in _refusal(lambda: read_json(_json(tmp_path, content)))


@pytest.mark.parametrize("content", [b"[" + b"{}," * 300_000 + b"{}]", b'{"a": "' + b"x" * (5 << 20) + b'"}'])
def test_json_out_of_proportion_is_not_parsed(tmp_path: Path, content: bytes) -> None:
    assert "larger than any such file" in _refusal(lambda: read_json(_json(tmp_path, content)))


def test_only_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for name in ("nothing.json", "folder.json"):
        assert f"{name} is missing or no file" in _refusal(lambda name=name: read_json(tmp_path / name))


def test_sound_json_is_read_as_it_is(tmp_path: Path) -> None:
    assert read_json(_json(tmp_path, '{"a": [1, {"b": "ü"}], "a": 2}')) == {"a": 2}


# ---- index


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "c:x.safetensors",
        "x.bin",
        "",
        ".safetensors/..",
        "x.safetensors\n",
        "x\0.safetensors",
        5,
        None,
        ["x.safetensors"],
    ],
)
def test_shards_lie_beside_the_index(tmp_path: Path, file: Any) -> None:
    path = _json(tmp_path, {"weight_map": {"a.weight": file}})
    assert "shards are .safetensors files beside the index" in _refusal(lambda: read_index(path))


@pytest.mark.parametrize("content", [{}, {"weight_map": None}, {"weight_map": ["x.safetensors"]}])
def test_index_without_a_map(tmp_path: Path, content: dict[str, Any]) -> None:
    assert "has no weight_map" in _refusal(lambda: read_index(_json(tmp_path, content)))


def test_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    path = _json(tmp_path, '{"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "a": "y.safetensors"}}')
    assert "names 'a' twice" in _refusal(lambda: read_index(path))


def test_sound_index(tmp_path: Path) -> None:
    assert read_index(_json(tmp_path, {"weight_map": {"a": "x-1.safetensors"}})) == {"a": "x-1.safetensors"}


@pytest.mark.parametrize("length", [1, 100, 1 << 40, (1 << 64) - 1])
def test_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length))
    assert f"a header of {length} bytes" in _refusal(lambda: check_header(file))


def test_header_longer_than_any(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", 9 << 20))
        handle.truncate(30 << 20)
    assert "truncated or damaged" in _refusal(lambda: check_header(file))


# ---- configuration


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"text_config": {"num_layers": 10**6}},
        {"vision_config": {"depths": [2, 10**7]}},
        {"num_labels": 10**9},
        {"n_routed_experts": 10**400},
        {"num_attention_heads": 2**63},
    ],
)
def test_counts_beyond_what_is_stored(config: dict[str, Any]) -> None:
    said = _refusal(lambda: check_config(config, STORED, "config.json"))
    assert "there are 300 tensors of at most 50000" in said and len(said) < 200


def test_counts_of_real_models_pass() -> None:
    check_config(
        {
            "num_hidden_layers": 126,
            "num_experts": 512,
            "max_position_embeddings": 10_485_760,
            "vocab_size": 262_208,
            "head_dim": -1,
            "max_window_layers": 28,
            "layer_norm_eps": 1e-6,
            "rope_theta": 10**7,
            "text_config": {"layer_types": ["full_attention"] * 126},
        },
        STORED,
        "config.json",
    )


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"configuration_files": ["config.4.0.json"]}, "refers to other files"),
        ({"attn_implementation": "org/kernel"}, "asks for code of the hub"),
        ({"text_config": {"_experts_implementation": {"a": "org/kernel:x"}}}, "asks for code of the hub"),
        ({"quantization_config": ["gptq"]}, r"quantization_config is \['gptq'\], not an object"),
        ({"a": json.loads("[" * 40 + "]" * 40)}, "nested more than 32 deep"),
    ],
)
def test_configuration_that_asks_for_more(config: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanishError, match=match):
        check_config(config, STORED, "config.json")


# ---- whatever other code raises


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError(), OSError(2, "no"), ValueError("a\nb"), MemoryError(), AssertionError()]
)
def test_reading_gives_one_line(error: Exception) -> None:
    def read() -> None:
        with reading("DIR: x can't be read", "mend it"):
            raise error

    said = _refusal(read)
    assert said.startswith("DIR: x can't be read (") and said.endswith("); mend it")


@pytest.mark.parametrize("error", [PlanishError("as it is"), KeyboardInterrupt()])
def test_reading_lets_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("x"):
        raise error
    assert caught.value is error


# ---- regular expressions


NAME = "model.layers.10.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "searched", "matched"),
    [
        ("down_proj", True, False),
        (r"model\.layers\.\d+\.mlp", True, True),
        (r".*\.(up|down)_proj$", True, True),
        (r"^(?!.*mlp)", False, False),
        ("(a+)+$", False, False),
        ("(.*)*x", False, False),
        (".*" * 12 + "x", False, False),
    ],
)
def test_patterns_find_what_re_finds_in_time(pattern: str, searched: bool, matched: bool) -> None:
    start, regexes = time.process_time(), Patterns()
    assert (regexes.search(pattern, NAME), regexes.match(pattern, NAME)) == (searched, matched)
    assert time.process_time() - start < 2


def test_slow_patterns_are_refused_together() -> None:
    slow, regexes = r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6\7[xyz]", Patterns(seconds=0.2)
    start = time.process_time()
    for _ in range(3):
        assert "takes too long; name the layers" in _refusal(lambda: regexes.search(slow, NAME * 3))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(" * 900, "a" * 2000, None, 5, ["x"]])
def test_what_is_no_pattern(pattern: Any) -> None:
    assert "regular expression" in _refusal(lambda: Patterns().match(pattern, NAME))
