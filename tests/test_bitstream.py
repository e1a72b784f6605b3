"""pack against a slow twin: the stream as one big Python integer."""

import pytest
import torch

from planish.bitstream import Stream, pack, unpack, words_for
from planish.kernels.pack import Packed
from planish.qtensor import QTensor


def slow_words(codes: list[int], bits: int) -> list[int]:
    """Words of one stream as signed int32, by shifting a big integer."""
    stream = sum(code << (index * bits) for index, code in enumerate(codes))
    data = stream.to_bytes(words_for(len(codes), bits) * 4, "little")
    return [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("length", [1, 10, 11, 31, 32, 33, 64, 96, 100])
def test_words_are_those_of_the_slow_twin(bits: int, length: int) -> None:
    codes = torch.randint(0, 2**bits, (3, length), generator=torch.Generator().manual_seed(length))
    words = pack(codes, bits, 1)
    assert words.dtype == torch.int32
    assert words.tolist() == [slow_words(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("shape", [(64, 96), (33, 7), (7, 33), (1, 1)])
def test_unpack_inverts_pack_on_every_axis(bits: int, dim: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    words = pack(codes, bits, dim)
    assert words.shape[dim] == words_for(shape[dim], bits) and words.is_contiguous()
    back = unpack(words, bits, dim, shape[dim])
    assert back.dtype == torch.uint8 and back.is_contiguous()
    assert torch.equal(back, codes)


def test_packing_an_axis_is_packing_the_transpose_along_the_other() -> None:
    codes = torch.randint(0, 8, (40, 64), dtype=torch.uint8)
    assert torch.equal(pack(codes, 3, 1), pack(codes.T, 3, 0).T)


def test_three_bit_fields_spill_into_the_next_word() -> None:
    # element 10 has bits 30-32: its two low bits end word 0, its high bit begins word 1
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[10] = 0b101
    assert pack(codes, 3, 0).tolist() == [0b01 << 30, 0b1, 0]
    # element 21 has bits 63-65: one bit in word 1 (its sign), two in word 2
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[21] = 0b111
    assert pack(codes, 3, 0).tolist() == [0, -(2**31), 0b11]


def test_a_sign_bit_does_not_leak_into_other_fields() -> None:
    for bits in (2, 3, 4, 8):
        ones = torch.full((32,), 2**bits - 1, dtype=torch.uint8)
        assert pack(ones, bits, 0).tolist() == [-1] * bits
        assert torch.equal(unpack(torch.full((bits,), -1, dtype=torch.int32), bits, 0, 32), ones)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("in_features", [64, 40])
def test_a_stream_is_its_qtensor_and_what_kernels_are_given(bits: int, in_features: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    q = QTensor(
        codes=torch.randint(0, 2**bits, (5, in_features), generator=draw, dtype=torch.uint8),
        scale=torch.rand(5, -(-in_features // 32), generator=draw).half() + 0.1,
        zero=torch.randint(0, 2**bits, (5, -(-in_features // 32)), generator=draw, dtype=torch.uint8),
        bits=bits,
        group_size=32,
    )
    stream = Stream.of(q)
    assert stream.qtensor().equal(q) and (stream.scheme, stream.shape) == (q.scheme, q.shape)
    packed, expected = Packed.from_stream(stream), Packed.from_qtensor(q)
    assert torch.equal(packed.codes, expected.codes) and packed.qtensor().equal(q)
