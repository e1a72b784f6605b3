"""Law 3 for the CUDA kernels of prefill: dequantization is the reference's bit for bit, products are near to it.

Without a GPU the kernels' own source runs in an emulator (emulate_*.cpp), built by the system's C++ compiler, and is
compiled where there is an NVRTC. On a GPU the same is held against the kernels proper.
"""

import ctypes
import itertools

import pytest
import torch
from emulation import builder, some_nvrtc
from test_cuda_gemv import (
    CARDS,
    ON_GPU,
    ROUNDING,
    activations,
    assert_replays,
    each_bits,
    each_grid,
    each_on_gpu,
    make,
    make_on_gpu,
    needs_gpu,
)
from test_cuda_gemv import assert_near as assert_near_unrounded

from planish.kernels import cuda_dequantize, cuda_gemm, cuda_gemv, cuda_records, nvrtc, reference
from planish.kernels.cuda_gemm import Settings, packed_gemm
from planish.kernels.cuda_gemv import DTYPES, Card
from planish.kernels.gemv_layout import Layout, layout_of, write_records
from planish.kernels.pack import Packed
from planish.qtensor import QTensor

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
HOPPER = Card((9, 0), 132, 228 * 1024)
SUMMED = 2**-16  # of |x| |W_hat|^T: what sums in fp32 may be off


def assert_near(y, x, q, bias):
    """The weight is rounded to the dtype of x, as the reference rounds it; sums and the result are, besides."""
    weight = q.dequantize(x.dtype).double().to(x.device)
    expected, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        expected, size = expected + bias, size + bias.abs()
    worst = ((y.double() - expected).abs() - ROUNDING[y.dtype] * expected.abs()) / size.clamp_min(1e-30)
    assert worst.max().item() <= SUMMED, worst.max().item()  # false for NaN


@each_bits
@each_grid
@each_dtype
def test_the_op_is_the_reference_on_any_device(bits, symmetric, dtype):
    q, weight = make((37, 200), bits, 64, symmetric)
    layout = layout_of(weight)
    records, x, bias = write_records(weight, layout), activations(40, 200, dtype), torch.randn(37).to(dtype)
    for given in (bias, None):
        assert torch.equal(packed_gemm(x, records, given, *layout), reference.matmul(x, weight, given, {}))


def test_torch_knows_the_op_and_traces_it():
    _, weight = make((37, 200), 3, 64, False)
    layout = layout_of(weight)
    records, x = write_records(weight, layout), activations(20, 200, torch.bfloat16)
    torch.library.opcheck(packed_gemm, (x, records, torch.randn(37).bfloat16(), *layout))
    compiled = torch.compile(packed_gemm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, records, None, *layout), reference.matmul(x, weight, None, {}))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    return {name: builder(tmp_path_factory.mktemp(name), name) for name in ("dequantize", "gemm")}


@each_bits
@each_grid
@each_dtype
def test_the_source_of_dequantize_is_the_reference(build, bits, symmetric, dtype):
    for group, shape in [(32, (21, 600)), (64, (16, 256)), (128, (40, 201)), (None, (16, 300))]:
        q, _ = make(shape, bits, group, symmetric)
        assert torch.equal(dequantized(build, q, dtype), q.dequantize(dtype))


def dequantized(build, q, dtype):
    """By the kernel in the emulator; it starts as NaN."""
    weight = Packed.from_qtensor(q)
    layout, bf16 = layout_of(weight), dtype == torch.bfloat16
    run = build["dequantize"](cuda_dequantize.source(), cuda_records.macros(layout[:3], bf16, False)).run_dequantize
    records, y = write_records(weight, layout), torch.full(q.shape, float("nan"), dtype=dtype)
    sizes = layout.in_features, layout.out_features, layout.tiles, layout.steps
    run(pointer(records), pointer(y), *sizes, cuda_records.first(q.bits, bf16))
    return y


@each_dtype
@each_bits
def test_the_source_of_dequantize_takes_every_scale(build, bits, dtype):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scale = halves[halves.isfinite()].view(64, -1)
    groups = scale.shape[1]
    codes, zero = torch.randint(0, 2**bits, (64, 32 * groups)).byte(), torch.randint(0, 2**bits, scale.shape).byte()
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1
    q = QTensor(codes=codes, scale=scale, zero=zero, bits=bits, group_size=32)
    assert torch.equal(dequantized(build, q, dtype), q.dequantize(dtype))


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


# bits, group, symmetric, dtype, settings, stages of records: every value of each, not every combination
KERNELS = [
    (2, 64, False, torch.bfloat16, Settings(1, 32, 1, 3), 2),
    (2, 32, True, torch.float16, Settings(1, 64, 2, 4), 3),
    (3, 128, False, torch.float16, Settings(2, 16, 1, 2), 2),
    (3, 64, True, torch.bfloat16, Settings(1, 32, 4, 4), 2),
    (4, 128, False, torch.bfloat16, Settings(2, 64, 2, 4), 2),
    (4, None, True, torch.float16, Settings(1, 128, 8, 4), 2),
    (8, 32, False, torch.bfloat16, Settings(1, 16, 2, 5), 2),
    (8, 128, True, torch.float16, Settings(1, 256, 1, 2), 2),
]


@pytest.mark.parametrize("bits, group, symmetric, dtype, settings, stages", KERNELS, ids=str)
def test_the_kernels_source_matches_the_reference(build, bits, group, symmetric, dtype, settings, stages):
    # ragged in outputs, inputs and rows; 300 outputs have no row of y that 16 bytes divide
    for number, (shape, rows) in enumerate([((300, 600), 39), ((136, 264), 33)]):
        q, weight = make(shape, bits, group, symmetric)
        x, bias = activations(rows, shape[1], dtype), torch.randn(shape[0]).to(dtype) if number else None
        layout = layout_of(weight)
        macros = cuda_gemm.macros(layout[:3], dtype == torch.bfloat16, settings, stages)
        run = build["gemm"](cuda_gemm.source(settings.columns, dtype == torch.bfloat16), macros).run_gemm
        pieces = cuda_gemm.pieces_of(layout, rows, settings)
        ways = [(True, False), (False, True)] if number else [(False, False)]
        for early, backwards in ways:
            y = emulate(run, x, weight, bias, pieces * settings.split if settings.split > 1 else 2, early, backwards)
            assert_near(y, x, q, bias)


def emulate(run, x, weight, bias, blocks, early, backwards):
    """y of the kernel in so many blocks; it starts as NaN."""
    layout = layout_of(weight)
    records = write_records(weight, layout)
    y = x.new_full((len(x), layout.out_features), float("nan"))
    sizes = len(x), layout.in_features, layout.out_features, layout.tiles, layout.steps
    first = cuda_records.first(layout.bits, x.dtype == torch.bfloat16)
    run(*map(pointer, (x, records, bias, y)), *sizes, first, blocks, early, backwards)
    return y


def test_the_operands_descriptor_has_its_bits(build):
    settings = KERNELS[0][4]
    macros = cuda_gemm.macros((2, 64, True), True, settings, 2)
    library = build["gemm"](cuda_gemm.source(settings.columns, True), macros)
    library.run_descriptor.restype = ctypes.c_uint64
    for address in (0, 1024, 0x12340, 0x38C60):
        found = library.run_descriptor(address)
        fields = {name: found >> low & (1 << width) - 1 for name, (low, width) in DESCRIPTOR.items()}
        # eight rows of 128 bytes lie 1024 bytes before the next; the leading offset isn't used by a swizzled layout
        assert fields == {"start": address >> 4, "leading": 1, "stride": 64, "base": 0, "swizzle": 1}
        assert sum(value << DESCRIPTOR[name][0] for name, value in fields.items()) == found  # and nothing else


DESCRIPTOR = {"start": (0, 14), "leading": (16, 14), "stride": (32, 14), "base": (49, 3), "swizzle": (62, 2)}


@each_bits
def test_launches_fit_and_their_blocks_suffice(bits):
    shapes = [(1, 32), (1024, 8192), (4096, 4096), (28672, 8192), (8192, 28672)]
    for shape, rows, group in itertools.product(shapes, (17, 32, 256, 2048, 5000), (32, 128)):
        layout = Layout(bits, group, True, *shape)
        for settings in cuda_gemm.candidates():
            launch = cuda_gemm.plan(layout, rows, HOPPER, settings)
            assert launch.shared <= HOPPER.shared - cuda_gemm.RESERVED and launch.records >= 2
            pieces = cuda_gemm.pieces_of(layout, rows, settings)
            split = settings.split
            assert launch.grid == pieces * split if split > 1 else 0 < launch.grid <= min(pieces, HOPPER.processors)
        assert cuda_gemm.default_settings(layout, rows, HOPPER) in set(cuda_gemm.candidates())


def test_what_the_kernel_cant_do_goes_another_way():
    fits, ragged = Layout(4, 128, True, 64, 264), Layout(4, 128, True, 64, 260)
    for rows, way in [(17, "passes"), (32, "passes"), (33, "decoded"), (2048, "decoded")]:
        assert cuda_gemm.choose(fits, rows, HOPPER) is not None and cuda_gemm.way_of(fits, rows, HOPPER) == "kernel"
        assert cuda_gemm.choose(ragged, rows, HOPPER) is None and cuda_gemm.way_of(ragged, rows, HOPPER) == way


@pytest.mark.parametrize("capability", [capability for capability in CARDS if capability != (9, 0)], ids=str)
def test_other_gpus_pass_few_rows_and_decode_for_more(capability):
    card, large = HOPPER._replace(capability=capability), Layout(2, 64, True, 28672, 8192)
    assert cuda_gemm.choose(large, 100, card) is None
    found = {rows: cuda_gemm.way_of(large, rows, card) for rows in (17, 64, 65, 2048)}
    assert found == {17: "passes", 64: "passes", 65: "decoded", 2048: "decoded"}
    assert cuda_gemm.way_of(large._replace(out_features=512), 33, card) == "decoded"  # what is small is read fast


@pytest.mark.parametrize("rows", [0, 16, 17, 40])
def test_passes_are_the_decode_kernels(monkeypatch, rows):
    q, weight = make((37, 200), 3, 64, False)
    layout, counts = layout_of(weight), []

    def multiply(x, records, bias, layout, y):
        counts.append(len(x))
        y.copy_(cuda_gemv.packed_gemv(x, records, bias, *layout))

    monkeypatch.setattr(cuda_gemv, "multiply", multiply)
    x, bias = torch.randn(rows, 200).bfloat16(), torch.randn(37).bfloat16()
    y = cuda_gemm.passes(x, write_records(weight, layout), bias, layout)
    assert_near(y, x, q, bias) if rows else None
    assert y.shape == (rows, 37) and counts == [16] * (rows // 16) + [rows % 16] * (rows % 16 > 0)


@pytest.mark.skipif(some_nvrtc() is None, reason="needs NVRTC")
@each_bits
@each_dtype
def test_the_kernels_compile(bits, dtype):
    bf16 = dtype == torch.bfloat16
    for settings in (Settings(2, 128, 1, 4), Settings(1, 128, 2, 4)):
        macros = cuda_gemm.macros((bits, 64, True), bf16, settings, 2)
        code = nvrtc.compile_source(cuda_gemm.source(128, bf16), macros, cuda_gemm.TARGET, some_nvrtc())
        assert code[:4] == b"\x7fELF"
    for target in ("sm_80", "sm_90", "sm_120"):
        macros = cuda_records.macros((bits, 64, True), bf16, target != "sm_80")
        assert nvrtc.compile_source(cuda_dequantize.source(), macros, target, some_nvrtc())[:4] == b"\x7fELF"


@pytest.mark.gpu
@needs_gpu
@each_on_gpu
def test_dequantize_on_a_gpu(bits, group, symmetric):
    for shape, dtype in [((70, 1104), DTYPES[0]), ((512, 4096), DTYPES[1]), ((21, 201), DTYPES[0])]:
        q, records = make_on_gpu(shape, bits, group, symmetric)
        assert torch.equal(cuda_dequantize.dequantize(records.tiles, records.layout, dtype), q.dequantize(dtype))


@pytest.mark.gpu
@needs_gpu
@each_on_gpu
def test_passes_on_a_gpu(bits, group, symmetric):
    for shape, rows, dtype in [((300, 1104), 17, DTYPES[0]), ((520, 4096), 64, DTYPES[1]), ((21, 201), 40, DTYPES[0])]:
        q, records = make_on_gpu(shape, bits, group, symmetric)
        x, bias = activations(rows, shape[1], dtype).cuda(), torch.randn(shape[0], device="cuda").to(dtype)
        torch.full((4 * rows, shape[0]), float("nan"), device="cuda")  # what the allocator gives next
        y = cuda_gemm.product(x, records.tiles, bias, records.layout, "passes")
        assert_near_unrounded(y, x, q, bias, ON_GPU)
        parts = [cuda_gemv.multiply(part, records.tiles, bias, records.layout) for part in x.split(16)]
        assert torch.equal(y, torch.cat(parts))
        decoded = cuda_gemm.product(x, records.tiles, bias, records.layout, "decoded")
        assert_near_unrounded(decoded, x, q, bias, 2**-8)


@pytest.mark.gpu
@needs_hopper
@each_on_gpu
def test_the_kernel_on_a_gpu(bits, group, symmetric):
    # settings, and so the kernels that are compiled, follow from shape and rows
    for shape, rows, dtype in [
        ((300, 1104), 17, DTYPES[0]), ((520, 4096), 130, DTYPES[1]), ((136, 264), 300, DTYPES[0])
    ]:  # fmt: skip
        q, records = make_on_gpu(shape, bits, group, symmetric)
        x, bias = activations(rows, shape[1], dtype).cuda(), torch.randn(shape[0], device="cuda").to(dtype)
        torch.full((4 * rows, shape[0]), float("nan"), device="cuda")  # what the allocator gives next
        y = packed_gemm(x, records.tiles, bias, *records.layout)
        assert_near(y, x, q, bias)
        assert all(torch.equal(packed_gemm(x, records.tiles, bias, *records.layout), y) for _ in range(3))


@pytest.mark.gpu
@needs_hopper
def test_a_chain_of_layers_in_a_cuda_graph():
    layers = [make_on_gpu((1024, 1024), bits, 64, False)[1] for bits in (2, 3, 4, 8) * 2]
    x = activations(100, 1024, torch.bfloat16).cuda()

    def chain():
        y = x
        for records in layers:
            y = packed_gemm(y, records.tiles, None, *records.layout)
            y = y / y.float().norm().to(y.dtype)
        return y

    assert_replays(chain)
