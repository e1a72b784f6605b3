"""Law 3: every kernel matches the reference over all that it claims; and the reference is the codec."""

import itertools

import pytest
import torch
from torch.nn import functional

from planish.kernels import KERNELS, choose, cpu, reference
from planish.kernels.pack import Packed, pack_codes, unpack_codes
from planish.qtensor import QTensor

SHAPES = [(192, 576), (1, 128), (48, 200), (80, 1536)]  # (out, in): 200 is ragged for every group but its own
GROUPS = [32, 64, 128, None]
ROWS = [1, 3, 17]


def random_qtensor(shape, bits, group=None, symmetric=True, offset=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = (shape[0], -(-shape[1] // (group or shape[1])))

    def integers(size):
        return torch.randint(0, 2**bits, size, generator=generator, dtype=torch.uint8)

    scale = (torch.rand(grid, generator=generator) + 0.5) * (1 - 2 * torch.randint(0, 2, grid, generator=generator))
    return QTensor(codes=integers(shape), scale=(scale / 2**bits).half(), bits=bits, group_size=group or shape[1],
                   zero=None if symmetric else integers(grid),
                   offset=torch.randn(grid, generator=generator) * 0.01 if offset else None)


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "reference"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_matches_the_reference(name, bits, symmetric):
    kernel, tried = KERNELS[name], 0
    grids = itertools.product(SHAPES, GROUPS, ROWS, [torch.bfloat16, torch.float32], [True, False])
    for shape, group, rows, dtype, biased in grids:
        q = random_qtensor(shape, bits, group, symmetric, seed=rows)
        weight = Packed.from_qtensor(q)
        x = torch.randn(2, rows, shape[1], generator=torch.Generator().manual_seed(1))[0].to(dtype)
        bias = torch.randn(shape[0]).to(dtype) if biased else None
        if not kernel.supports(weight, x):
            continue
        tried += 1
        expected, cache = reference.matmul(x, weight, bias, {}), {}
        size = x.abs().float() @ q.dequantize().abs().T + (0 if bias is None else bias.abs().float())
        for _ in range(2):  # the second call is served from the cache
            result = kernel.matmul(x, weight, bias, cache)
            assert result.dtype == dtype and result.shape == expected.shape
            assert ((result - expected).abs() <= kernel.TOLERANCE * size).all(), (shape, group, rows, biased)
    if not tried:
        pytest.skip(f"{name} claims nothing here")


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in cpu.VECTOR_UNITS, reason="needs AVX2")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoding_on_a_cpu_is_fast_for_what_models_have(bits):
    for symmetric, group in itertools.product([True, False], [64, None]):
        weight = Packed.from_qtensor(random_qtensor((192, 576), bits, group, symmetric))
        assert choose(weight, torch.zeros(1, 1, 576, dtype=torch.bfloat16)) is cpu
        assert choose(weight, torch.zeros(1, 17, 576, dtype=torch.bfloat16)) is reference
        assert choose(weight, torch.zeros(1, 1, 576)) is reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("block", [1, 1000, 2**22])
def test_reference_multiplies_by_the_codecs_weight(monkeypatch, dtype, offset, block):
    monkeypatch.setattr(reference, "BLOCK", block)
    q = random_qtensor((7, 200), 3, 64, False, offset)
    x, bias = torch.randn(2, 3, 200).to(dtype), torch.randn(7)
    assert torch.equal(reference.dense(Packed.from_qtensor(q), dtype), q.dequantize(dtype))
    assert torch.equal(reference.matmul(x, Packed.from_qtensor(q), bias, {}),
                       functional.linear(x, q.dequantize(dtype), bias.to(dtype)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [1, 7, 8, 200, 576])
def test_packing_keeps_every_code(bits, width):
    codes = random_qtensor((5, width), bits).codes
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, bits * -(-width // 8))
    assert torch.equal(unpack_codes(packed, bits, width), codes)


def test_packing_is_little_endian_with_three_bits_in_two_planes():
    codes = torch.tensor([[1, 2, 3, 0, 2, 0, 0, 3]], dtype=torch.uint8)
    assert pack_codes(codes, 2).tolist() == [[0b00_11_10_01, 0b11_00_00_10]]
    assert pack_codes(codes, 4).tolist() == [[0x21, 0x03, 0x02, 0x30]]
    high = torch.tensor([[4, 0, 0, 4, 0, 0, 0, 4]], dtype=torch.uint8)
    assert pack_codes(codes + high, 3).tolist() == [[0b00_11_10_01, 0b11_00_00_10, 0b1000_1001]]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("offset", [True, False])
def test_packed_gives_back_the_qtensor(symmetric, offset):
    q = random_qtensor((6, 200), 4, 64, symmetric, offset)
    assert Packed.from_qtensor(q).qtensor().equal(q)
    assert torch.equal(Packed.from_qtensor(q).qtensor(slice(2, 5)).codes, q.codes[2:5])
