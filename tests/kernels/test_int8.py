"""Law 3 for products of integers: exact sums, scaled step by step, and the same bits by every way.

The definition is held against int64 arithmetic. Without a GPU the kernels' own source runs in an emulator
(emulate_*.cpp) and is held against the definition, bit for bit; on a GPU the kernels proper are.
"""

import dataclasses
import importlib.util
import itertools

import pytest
import torch
from emulation import builder, some_nvrtc
from test_cuda_gemm import HOPPER, needs_hopper, pointer
from test_cuda_gemv import CARDS, assert_replays, each_grid, make, needs_gpu

from planish.kernels import cuda_gemm, cuda_int8, int8, nvrtc
from planish.kernels.cuda_gemm import Settings
from planish.kernels.cuda_gemv import DTYPES, Card
from planish.kernels.gemv_layout import STEP, Layout
from planish.kernels.int8 import int8_product

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_token = pytest.mark.parametrize("token_bits, even", list(itertools.product(range(4, 9), (True, False))))
each_bits = pytest.mark.parametrize("bits", [3, 4, 8])


def tokens_like(rows, width, dtype=torch.bfloat16):
    """Rows of very different sizes, some of one sign, one of zeros, with outliers."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    x[:, ::97] *= 20
    x[1::4], x[2::4] = x[1::4].abs(), -x[2::4].abs()
    x *= torch.logspace(-3, 1, rows)[:, None]
    x[rows // 2] = 0
    return x.to(dtype)


def weight_of(shape, bits, symmetric, seed=0):
    """With scales of both signs, and what the kernels are given of it."""
    q, weight = make(shape, bits, None, symmetric, seed)
    signs = 1 - 2 * torch.randint(0, 2, weight.scale.shape, generator=torch.Generator().manual_seed(seed))
    weight = dataclasses.replace(weight, scale=weight.scale * signs.half())
    cache = {}
    int8.prepare(weight, cache)
    return weight, cache["int8"], cache["int8_lines"]


def exact(x, weight, token_bits, even):
    """s_x s_w times exact sums, in double: what tokens and weights that stand for themselves multiply to."""
    tokens, q = int8.round_tokens(x, token_bits, even), weight.qtensor()
    middle = torch.full_like(q.scale, 2 ** (q.bits - 1)) if q.zero is None else q.zero
    sums = (tokens.codes.long() - tokens.zero) @ (q.codes.long() - middle.long()).T
    return sums.double() * tokens.scale.double() * q.scale.double().T


@each_bits
@each_grid
@each_token
def test_the_definition_is_exact_but_for_three_roundings(bits, symmetric, token_bits, even):
    for shape in [(37, 200), (24, 2100), (1, 33)]:
        weight, codes, lines = weight_of(shape, bits, symmetric)
        x = tokens_like(19, shape[1]).float()
        y = int8_product(x, codes, lines, None, shape[1], token_bits, even)
        assert torch.allclose(y.double(), exact(x, weight, token_bits, even), rtol=2**-22, atol=0)


@each_bits
@each_grid
def test_records_and_plain_codes_give_the_same(bits, symmetric):
    weight, codes, lines = weight_of((37, 300), bits, symmetric)
    records, x = int8.records_of(codes, weight.qtensor()), tokens_like(9, 300)
    assert torch.equal(
        int8_product(x, records, lines, None, 300, 8, False), int8_product(x, codes, lines, None, 300, 8, False)
    )


@each_token
@each_dtype
def test_tokens_are_near_and_a_token_of_zeros_is_one(token_bits, even, dtype):
    x = tokens_like(16, 300, dtype)
    codes, scale, zero, total = int8.round_tokens(x, token_bits, even)
    assert codes.min().item() >= -(2 ** (token_bits - 1)) and codes.max().item() < 2 ** (token_bits - 1)
    assert torch.equal(total, (codes.int() - zero).sum(1, keepdim=True).int())
    # an end of an asymmetric range may be clamped by a step: its zero is rounded too
    off = ((codes - zero) * scale - x.float()).abs() / scale
    assert off.max() <= (0.501 if even else 1.001)
    assert not ((codes - zero) * scale)[8].any() and (scale > 0).all()


@pytest.mark.skipif(importlib.util.find_spec("planish.quant.activation") is None, reason="no such module yet")
@each_token
def test_tokens_are_those_that_were_trained(token_bits, even):
    from planish.quant.activation import quantize_tokens
    from planish.scheme import Activations

    x, half = tokens_like(64, 300), 2 ** (token_bits - 1)
    codes, scale, zero = quantize_tokens(x, Activations(bits=token_bits, symmetric=even))
    found = int8.round_tokens(x, token_bits, even)
    assert torch.equal(found.scale, scale) and torch.equal(found.zero, zero.int() - half)
    assert torch.equal(found.codes.int(), codes.int() - half)


def test_rows_that_are_not_finite_are_nan_and_alone():
    weight, codes, lines = weight_of((20, 96), 4, False)
    x = tokens_like(8, 96)
    y = int8_product(x, codes, lines, None, 96, 8, False)
    x[2, 3], x[5, 7] = float("nan"), float("inf")
    found = int8_product(x, codes, lines, None, 96, 8, False)
    assert found[[2, 5]].isnan().all() and torch.equal(found[[0, 1, 3, 4, 6, 7]], y[[0, 1, 3, 4, 6, 7]])


def test_it_claims_what_32_bits_hold_and_one_scale_an_output():
    x = torch.randn(2, 64)
    weight, _, _ = weight_of((8, 64), 8, False)
    assert int8.supports(weight, x, 8, False) and int8.supports(weight, x, 4, True)
    assert not int8.supports(make((8, 64), 4, 32, False)[1], x, 8, True)
    assert not int8.supports(weight, x.requires_grad_(), 8, False)
    assert int8.largest(dataclasses.replace(weight, in_features=2**15), 8, False) < 2**31
    assert int8.largest(dataclasses.replace(weight, in_features=2**16), 8, False) > 2**31


def test_torch_knows_the_op_and_a_layer_calls_it():
    weight, codes, lines = weight_of((37, 200), 4, False)
    x, bias = tokens_like(20, 200), torch.randn(37).bfloat16()
    torch.library.opcheck(int8_product, (x, codes, lines, bias, 200, 4, False))
    y = int8.matmul(x.view(4, 5, 200), weight, bias, {}, 4, False)
    assert torch.equal(y.view(20, 37), int8_product(x, codes, lines, bias, 200, 4, False))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return {name: builder(tmp_path_factory.mktemp(name), name) for name in ("tokens", "int8")}


def place_of(weight_bits, width):
    """Where an input's code lies in a row, as cuda_tokens.cu says."""
    unit, apart = (32, 16) if weight_bits == 4 else (16, 8)
    places = torch.arange(-(-width // 32) * 32)
    base, within = places // unit * unit, places % unit
    h, t, j = within // 16, within % 16 // 4, within % 4
    return base + 8 * h + 2 * t + apart * (j % 2) + j // 2  # the input that a place has


@pytest.mark.parametrize("weight_bits", [4, 8])
@each_dtype
@each_token
def test_the_source_of_tokens_is_the_definition(build, weight_bits, dtype, token_bits, even):
    for width, rows in [(200, 8), (1101, 3), (1024, 3), (37, 4)]:
        x = tokens_like(rows, width, dtype)
        codes, lines = emulate_tokens(build, x, weight_bits, token_bits, even)
        compare_tokens(codes, lines, x, weight_bits, token_bits, even)


def compare_tokens(codes, lines, x, weight_bits, token_bits, even):
    expected, width = int8.round_tokens(x, token_bits, even), x.shape[1]
    padded = torch.nn.functional.pad(expected.codes, (0, -width % 32))
    assert torch.equal(codes, padded[:, place_of(weight_bits, width).to(codes.device)])
    found = lines[:, 0].contiguous().view(torch.float32), lines[:, 1], lines[:, 2]
    assert all(torch.equal(one, other.view(-1)) for one, other in zip(found, expected[1:], strict=True))


def emulate_tokens(build, x, weight_bits, token_bits, even):
    threads, eights = cuda_int8._threads(x.shape[1])
    macros = cuda_int8.token_macros(weight_bits, x.dtype == torch.bfloat16, threads, eights)
    run = build["tokens"](cuda_int8.token_source(), macros).run_tokens
    codes = torch.full((len(x), -(-x.shape[1] // 32) * 32), 99, dtype=torch.int8)
    lines = torch.full((len(x), 4), -1, dtype=torch.int32)
    run(*map(pointer, (x, codes, lines)), len(x), x.shape[1], codes.shape[1], token_bits, int(even))
    return codes, lines


def test_the_source_of_tokens_divides_exactly_and_keeps_nan_in_its_row(build):
    # every significand of bf16, at sizes that touch halves of steps
    numbers = torch.arange(2**7, 2**8).float()[None] * torch.logspace(-6, 0, 61, base=2)[:, None]
    for token_bits, even in itertools.product((4, 8), (True, False)):
        codes, lines = emulate_tokens(build, numbers.bfloat16(), 8, token_bits, even)
        compare_tokens(codes, lines, numbers.bfloat16(), 8, token_bits, even)
    x = tokens_like(4, 64)
    x[1, 3], x[2, 60] = float("nan"), float("-inf")
    scale = emulate_tokens(build, x, 8, 8, True)[1][:, 0].contiguous().view(torch.float32)
    assert scale.isnan().tolist() == [False, True, True, False]


# weight's bits, symmetric, dtype, token's bits, symmetric, settings, stages of records
KERNELS = [
    (8, True, torch.bfloat16, 8, True, Settings(1, 32, 1, 3), 2),
    (8, False, torch.float16, 8, False, Settings(2, 32, 1, 2), 2),
    (4, True, torch.float16, 4, False, Settings(1, 64, 2, 4), 3),
    (4, False, torch.bfloat16, 8, False, Settings(2, 64, 4, 4), 2),
    (3, True, torch.bfloat16, 6, True, Settings(1, 128, 8, 4), 2),
    (4, False, torch.bfloat16, 4, True, Settings(1, 256, 1, 2), 2),
]


@pytest.mark.parametrize("bits, symmetric, dtype, token_bits, even, settings, stages", KERNELS, ids=str)
def test_the_kernels_source_is_the_definition(build, bits, symmetric, dtype, token_bits, even, settings, stages):
    # ragged in outputs, inputs and rows; 300 outputs have no row of y that 16 bytes divide
    for number, (shape, rows) in enumerate([((300, 600), 39), ((136, 265), 33)]):
        weight, plain, lines = weight_of(shape, bits, symmetric)
        x, bias = tokens_like(rows, shape[1], dtype), torch.randn(shape[0]).to(dtype) if number else None
        expected = int8_product(x, plain, lines, bias, shape[1], token_bits, even)
        records = int8.records_of(plain, weight.qtensor())
        layout = cuda_int8.layout_of(records, *shape)
        codes, tokens = emulate_tokens(build, x, layout.bits, token_bits, even)
        macros = cuda_int8.macros(layout.bits, dtype == torch.bfloat16, settings, stages)
        run = build["int8"](cuda_int8.source(settings.columns), macros).run_int8
        blocks = cuda_gemm.pieces_of(layout, rows, settings) * settings.split if settings.split > 1 else 2
        for early, backwards in [(True, False), (False, True)] if number else [(False, False)]:
            y = torch.full((rows, shape[0]), float("nan"), dtype=dtype)
            sizes = rows, codes.shape[1], layout.in_features, layout.out_features, layout.tiles, layout.steps
            run(*map(pointer, (codes, records, bias, lines, tokens, y)), *sizes, blocks, early, backwards)
            assert torch.equal(y, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_launches_fit(bits):
    shapes = [(1, 32), (4096, 4096), (8192, 8192), (28672, 8192), (8192, 28672)]
    for shape, rows in itertools.product(shapes, (1, 16, 256, 5000)):
        layout = Layout(bits, STEP, False, *shape)
        for settings in cuda_gemm.candidates():
            launch = cuda_gemm.plan(layout, rows, HOPPER, settings)
            assert launch.shared <= HOPPER.shared - cuda_gemm.RESERVED and launch.records >= 2
        chosen = cuda_int8.choose(layout, rows, HOPPER)
        assert chosen[:3] in {settings[:3] for settings in cuda_gemm.candidates()}  # a table has stages of its own
        assert cuda_gemm.plan(layout, rows, HOPPER, chosen).shared <= HOPPER.shared - cuda_gemm.RESERVED
        threads, eights = cuda_int8._threads(shape[1])
        assert threads * eights * 8 >= shape[1] and threads & (threads - 1) == 0 and eights <= 8
    assert Card((9, 0), 132, CARDS[9, 0][1] * 1024) == HOPPER


@pytest.mark.skipif(some_nvrtc() is None, reason="needs NVRTC")
@pytest.mark.parametrize("bits", [4, 8])
@each_dtype
def test_the_kernels_compile(bits, dtype):
    bf16 = dtype == torch.bfloat16
    for settings in (Settings(2, 128, 1, 4), Settings(1, 256, 2, 4), Settings(1, 32, 4, 8)):
        macros = cuda_int8.macros(bits, bf16, settings, 2)
        code = nvrtc.compile_source(cuda_int8.source(settings.columns), macros, cuda_int8.TARGET, some_nvrtc())
        assert code[:4] == b"\x7fELF"
    macros = cuda_int8.token_macros(bits, bf16, 256, 4)
    assert nvrtc.compile_source(cuda_int8.token_source(), macros, cuda_int8.TARGET, some_nvrtc())[:4] == b"\x7fELF"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", [3, 4, 8])
@each_grid
@each_dtype
def test_on_a_gpu(bits, symmetric, dtype):
    shapes = [(300, 1104), (520, 4096), (136, 265), (21, 37)]
    for number, (shape, rows) in enumerate(itertools.product(shapes, (1, 17, 130, 300))):
        weight, plain, lines = weight_of(shape, bits, symmetric)
        token_bits, even = 4 + number % 5, number % 2 == 0
        x, bias = tokens_like(rows, shape[1], dtype), torch.randn(shape[0]).to(dtype)
        expected = int8_product(x, plain, lines, bias, shape[1], token_bits, even)
        cache, given = {}, [t.cuda() for t in (x, bias)]
        torch.full((4 * rows, shape[0]), float("nan"), device="cuda")  # what the allocator gives next
        for _ in range(3):
            y = int8.matmul(given[0], weight.to("cuda"), given[1], cache, token_bits, even)
            assert torch.equal(y.cpu(), expected)


@pytest.mark.gpu
@needs_hopper
@each_dtype
@each_token
def test_tokens_on_a_gpu(dtype, token_bits, even):
    for width, weight_bits in itertools.product((200, 1101, 8192, 28672), (4, 8)):
        x = tokens_like(40, width, dtype).cuda()
        codes, lines = cuda_int8.round_tokens(x, weight_bits, token_bits, even)
        compare_tokens(codes, lines, x, weight_bits, token_bits, even)


@pytest.mark.gpu
@needs_hopper
def test_a_chain_of_layers_in_a_cuda_graph():
    layers = [(weight_of((1024, 1024), bits, False, seed)[0], {}) for seed, bits in enumerate((4, 8) * 4)]
    x = tokens_like(100, 1024).cuda()

    def chain():
        y = x
        for weight, cache in layers:
            y = int8.matmul(y, weight.to("cuda") if "int8" not in cache else weight, None, cache, 8, False)
            y = y / y.float().norm(dim=1, keepdim=True).clamp(min=1e-6).to(y.dtype)
        return y

    assert_replays(chain)
