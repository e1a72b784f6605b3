"""Law 3 for attention of one query a row: the op's definition, launches, and the kernel itself, against fp64.

Without a GPU the kernel's source runs in an emulator (cuda_emulator.h) and is compiled for every architecture where
there is an NVRTC. What the cache hasn't been filled with is NaN everywhere.
"""

import ctypes
import itertools
import math

import pytest
import torch
from emulation import builder, some_nvrtc
from test_cuda_gemv import CARDS, assert_replays

from planish.kernels import cuda_attend, nvrtc
from planish.kernels.cuda_attend import attend_one
from planish.kernels.cuda_gemv import DTYPES, Card

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a result
SUMMED = 2**-14  # of the mean of |v|, for what is summed in fp32 before that


def given(batch, heads, kv_heads, length, dim, filled, dtype, device="cpu"):
    """Arguments of the op, but the scaling: a cache of `filled` tokens, NaN behind them."""
    made = torch.Generator().manual_seed(filled + 7 * dim)
    query, key, value, keys, values = (
        torch.randn(batch, some, count, dim, generator=made).to(dtype)
        for some, count in ((heads, 1), (kv_heads, 1), (kv_heads, 1), (kv_heads, length), (kv_heads, length))
    )
    keys[:, :, filled:], values[:, :, filled:] = float("nan"), float("nan")
    query[:, 0] *= 8  # a head that looks at few tokens
    return [t.to(device) for t in (query, key, value, keys, values, torch.tensor(filled))]


def assert_near(out, arguments, scaling):
    """`arguments` as they were before the call."""
    query, key, value, keys, values, filled = (t.double() for t in arguments)
    filled, groups = int(filled), query.shape[1] // keys.shape[1]
    keys = torch.cat([keys[:, :, :filled], key], 2).repeat_interleave(groups, 1)
    values = torch.cat([values[:, :, :filled], value], 2).repeat_interleave(groups, 1)
    chances = torch.softmax(query @ keys.transpose(2, 3) * scaling, -1)
    expected, size = ((chances @ v).transpose(1, 2) for v in (values, values.abs()))
    assert out.shape == expected.shape
    worst = ((out.double() - expected).abs() - ROUNDING[out.dtype] * expected.abs()) / size
    assert worst.max().item() <= SUMMED, worst.max().item()  # false for NaN


def assert_written(keys, values, arguments):
    """The cache has the new token, and else what it had."""
    _, key, value, *cache, filled = arguments
    for now, before, new in zip((keys, values), cache, (key, value), strict=True):
        expected = before.clone()
        expected[:, :, int(filled)] = new[:, :, 0]
        assert torch.equal(now.view(torch.int16), expected.view(torch.int16))


def copies(arguments):
    return [t.clone() for t in arguments]


# batch, heads, heads of keys, length, filled
SIZES = [(1, 2, 2, 64, 0), (1, 3, 1, 128, 37), (5, 8, 1, 64, 63), (2, 4, 4, 192, 131)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80])
def test_the_op_is_attention_on_any_device(dtype, dim):
    for batch, heads, kv_heads, length, filled in SIZES:
        arguments = given(batch, heads, kv_heads, length, dim, filled, torch.float32)
        before = copies(arguments)
        out = attend_one(*arguments, 0.2)
        assert_written(*arguments[3:5], before)
        arguments = [t.to(dtype) if t.is_floating_point() else t for t in before]
        assert attend_one(*copies(arguments), 0.2).dtype == dtype
        assert_near(out.to(dtype), before, 0.2)


def test_torch_knows_the_op():
    torch.library.opcheck(attend_one, (*given(2, 4, 2, 64, 64, 9, torch.bfloat16), 0.125))


@pytest.mark.parametrize("capability", CARDS, ids=str)
def test_launches_fit_every_card(capability):
    processors, shared = CARDS[capability]
    card = Card(capability, processors, shared * 1024)
    for (heads, kv_heads), dim in itertools.product([(32, 32), (64, 8), (24, 3), (6, 1), (7, 1)], cuda_attend.DIMS):
        for batch, length in itertools.product((1, 5, 16), (64, 256, 4096)):
            cut = cuda_attend.plan(batch, heads, kv_heads, length, dim, card)
            assert heads // kv_heads % cut.heads == 0 and cut.blocks == batch * heads // cut.heads * cut.parts
            assert cut.shared <= nvrtc.PLAIN_SHARED and cut.parts in (1, 2, 4, 8)
            assert cut.parts == 1 or cut.blocks <= processors
            assert not cut.cluster or capability >= (9, 0)
    assert cuda_attend.plan(1, 32, 32, 256, 128, Card((9, 0), 132, 0))[:4] == (1, 4, True, 128)
    assert cuda_attend.plan(1, 64, 8, 256, 128, Card((9, 0), 132, 0))[:4] == (4, 8, True, 128)


def test_claims_only_what_it_can():
    for device in (torch.device("cpu"), torch.device("meta")):
        assert not cuda_attend.supports(device, torch.float16, 128, 128)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    build = builder(tmp_path_factory.mktemp("emulator"), "attend")

    def of(dim, dtype, heads, cluster):
        macros = cuda_attend.macros(dim, dtype == torch.bfloat16, heads, cluster, False)
        return build(cuda_attend.source(), macros).run_attend

    return of


def emulate(run, arguments, heads, parts, backwards):
    """The kernel's result, and the cache as it is left; what it writes starts as NaN."""
    query, key, value, keys, values, filled = copies(arguments)
    out = torch.full_like(query, float("nan")).transpose(1, 2).contiguous()
    rows, shared_by = len(query) * keys.shape[1], query.shape[1] // keys.shape[1]
    states = torch.full((rows * shared_by * parts, query.shape[3] + 2), float("nan"))
    places = [ctypes.c_void_p(t.data_ptr()) for t in (query, key, value, keys, values, filled, out, states)]
    scale = ctypes.c_float(0.2 * math.log2(math.e))
    run(*places, scale, shared_by, keys.shape[2], parts, rows, backwards)
    return out, keys, values


# dim, dtype, heads of a block, cluster, (heads, heads of keys): every value of each, not every combination
KERNELS = [
    (64, torch.float16, 1, True, (2, 2)),
    (96, torch.bfloat16, 3, False, (6, 2)),
    (128, torch.float16, 4, True, (8, 1)),
    (128, torch.bfloat16, 1, False, (2, 2)),
    (256, torch.bfloat16, 2, True, (4, 2)),
]


@pytest.mark.parametrize("dim, dtype, each, cluster, heads", KERNELS, ids=str)
def test_the_kernels_source_is_attention(emulator, dim, dtype, each, cluster, heads):
    run = emulator(dim, dtype, each, cluster)
    cases = [(1, 64, 0, 1), (1, 64, 63, 4), (5, 32, 17, 2), (1, 160, 130, 2), (1, 32, 2, 8)]
    for batch, length, filled, parts in cases if each < 4 else cases[:4]:
        if parts == 1 and cluster:
            continue  # one block needs none
        arguments = given(batch, *heads, length, dim, filled, dtype)
        ways = [emulate(run, arguments, each, parts, backwards) for backwards in (False, True)]
        assert torch.equal(ways[0][0], ways[1][0])
        assert_near(ways[0][0], arguments, 0.2)
        assert_written(*ways[0][1:], arguments)


@pytest.mark.skipif(some_nvrtc() is None, reason="needs NVRTC")
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_the_kernel_compiles_for(target):
    new = target in ("sm_90", "sm_120")
    for dim, heads in itertools.product(cuda_attend.DIMS, (1, 4)):
        macros = cuda_attend.macros(dim, heads == 1, heads, new, new)
        assert nvrtc.compile_source(cuda_attend.source(), macros, target, some_nvrtc())[:4] == b"\x7fELF"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", cuda_attend.DIMS)
def test_on_a_gpu(dim, dtype):
    sizes = [(1, 32, 32, 256, 200), (1, 64, 8, 4096, 4000), (1, 9, 3, 1024, 1023), (40, 8, 4, 128, 77)]
    for batch, heads, kv_heads, length, filled in [*SIZES, *sizes]:
        arguments = given(batch, heads, kv_heads, length, dim, filled, dtype, "cuda")
        now = copies(arguments)
        out = attend_one(*now, dim**-0.5)
        assert_near(out, arguments, dim**-0.5)
        assert_written(*now[3:5], arguments)
        assert all(torch.equal(attend_one(*now, dim**-0.5), out) for _ in range(3))


@pytest.mark.gpu
@needs_gpu
def test_steps_replay_in_a_cuda_graph():
    arguments = given(1, 8, 2, 512, 128, 300, torch.float16, "cuda")
    attend_one(*arguments, 0.1)  # compiled before anything is captured

    def chain():
        query = arguments[0]
        for _ in range(8):  # each reads what the one ahead of it made
            query = attend_one(query, *arguments[1:], 0.1).transpose(1, 2)
        return query

    assert_replays(chain)
