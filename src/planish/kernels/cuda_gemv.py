"""Decoding on an NVIDIA GPU: 1 to 16 rows of 16-bit activations times packed weights of 2, 3, 4 or 8 bits.

    y[m, n] = sum_g s[n, g] * (sum_{k in g} x[m, k] Q[n, k] - z[n, g] * sum_{k in g} x[m, k]) + b[n]

The kernel is CUDA C++ (cuda_gemv.cu, which says how it works), compiled when it is first needed, in a second or two,
by the compiler that torch brings. It reads the weight as records (gemv_layout.py). How it is cut into blocks is
static data by bits, rows, size and GPU; nothing is timed at run time. Sums are in fp32 and in a fixed order, so results
repeat bit for bit. W_hat is not rounded as the reference rounds it; the result is as near to the exact product.

Groups: any that 32 divides, and whole rows. sm_80 and later. Knows nothing of layers.
"""

import ctypes
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from planish.kernels import cuda_records, gemv_layout, nvrtc, train
from planish.kernels.gemv_layout import Layout
from planish.kernels.pack import Packed

MAX_ROWS = 16
TOLERANCE = 2**-8  # of |x| |W_hat|^T, element by element; of what the kernel sums 2^-12
DTYPES = (torch.bfloat16, torch.float16)
RESERVED = 1024  # bytes of shared memory that a block takes for itself
BRINGERS = 512  # threads that prepare a row of x


class Settings(NamedTuple):
    """How work is cut: warps of a block, teams they form (each has a strip), records of a tile that a warp holds,
    blocks on a multiprocessor, tiles of a strip, whether x is prepared by a kernel of its own (not for one row),
    whether kernels start before those ahead have ended (sm_90 and later)."""

    warps: int
    teams: int
    stages: int
    blocks: int
    tall: int = 1
    apart: bool = False
    overlap: bool = True


class Card(NamedTuple):
    """What decides a launch: capability, multiprocessors, bytes of shared memory that one has."""

    capability: tuple[int, int]
    processors: int
    shared: int


class Launch(NamedTuple):
    """A kernel's shape: settings that fit, columns it is compiled for, whether blocks that share a strip are a cluster,
    records of a tile that a block takes, blocks (across strips, across those records), bytes of shared memory."""

    settings: Settings
    columns: int
    cluster: bool
    width: int
    grid: tuple[int, int]
    shared: int


# by columns, where no table has a row
DEFAULTS = {
    1: Settings(16, 1, 4, 1),
    8: Settings(16, 4, 3, 1, 2, True),
    16: Settings(8, 4, 3, 2, 2, True),
}
# measured by `benchmarks/kernels.py --tune`: by capability, then by (bits, columns, size)
TABLES: dict[tuple[int, int], dict[tuple[int, int, str], Settings]] = {
    (9, 0): {
        (2, 1, "small"): Settings(16, 2, 2, 1, 1, False),
        (2, 1, "medium"): Settings(8, 1, 3, 2, 1, False),
        (2, 1, "large"): Settings(16, 2, 3, 1, 1, False),
        (3, 1, "small"): Settings(16, 2, 2, 1, 1, False),
        (3, 1, "medium"): Settings(8, 1, 4, 2, 1, False),
        (3, 1, "large"): Settings(16, 1, 4, 1, 1, False),
        (4, 1, "small"): Settings(16, 2, 2, 1, 1, False),
        (4, 1, "medium"): Settings(16, 2, 4, 1, 1, False),
        (4, 1, "large"): Settings(16, 1, 3, 1, 1, False),
        (8, 1, "small"): Settings(16, 1, 4, 2, 2, False),
        (8, 1, "medium"): Settings(16, 1, 8, 1, 1, False),
        (8, 1, "large"): Settings(16, 1, 4, 2, 1, False, False),
        (2, 8, "small"): Settings(8, 1, 8, 1, 1, True),
        (2, 8, "medium"): Settings(8, 4, 3, 1, 2, True),
        (2, 8, "large"): Settings(8, 8, 4, 1, 2, True),
        (3, 8, "small"): Settings(8, 2, 4, 1, 2, True),
        (3, 8, "medium"): Settings(8, 8, 3, 1, 2, True),
        (3, 8, "large"): Settings(8, 1, 3, 1, 2, True),
        (4, 8, "small"): Settings(16, 1, 4, 1, 2, True),
        (4, 8, "medium"): Settings(8, 1, 3, 1, 2, True),
        (4, 8, "large"): Settings(8, 1, 6, 2, 2, True),
        (8, 8, "small"): Settings(16, 1, 2, 1, 2, True),
        (8, 8, "medium"): Settings(16, 1, 2, 1, 1, True),
        (8, 8, "large"): Settings(8, 2, 3, 1, 2, True),
        (2, 16, "small"): Settings(8, 4, 2, 1, 2, True),
        (2, 16, "medium"): Settings(8, 8, 3, 1, 2, True),
        (2, 16, "large"): Settings(8, 8, 3, 1, 2, True),
        (3, 16, "small"): Settings(8, 4, 3, 1, 1, True),
        (3, 16, "medium"): Settings(8, 8, 4, 1, 1, True),
        (3, 16, "large"): Settings(8, 8, 6, 1, 1, True),
        (4, 16, "small"): Settings(8, 4, 2, 2, 2, True),
        (4, 16, "medium"): Settings(8, 8, 4, 1, 1, True),
        (4, 16, "large"): Settings(8, 8, 8, 1, 1, True),
        (8, 16, "small"): Settings(16, 2, 2, 1, 2, True),
        (8, 16, "medium"): Settings(16, 1, 3, 1, 2, True),
        (8, 16, "large"): Settings(16, 2, 4, 1, 2, True),
    },
}


def supports(weight: Packed, x: Tensor) -> bool:
    """A few rows of bf16 or fp16 on an NVIDIA GPU, no gradient."""
    if x.device.type != "cuda" or x.dtype not in DTYPES or (x.requires_grad and torch.is_grad_enabled()):
        return False
    few = 0 < x.numel() <= MAX_ROWS * weight.in_features
    return few and gemv_layout.layout_of(weight) is not None and _runs_on(x.device.index or 0)


def matmul(x: Tensor, weight: Packed, bias: Tensor | None, cache: dict[str, Tensor]) -> Tensor:
    """x [..., in] bf16 or fp16 -> [..., out]; `prepare` fills `cache` at the first call.

    Records can't be made while a graph is traced: there an unprepared weight takes the product of `train`.
    """
    if "records" not in cache:
        if torch.compiler.is_compiling():
            return train.matmul(x, weight, bias, cache)
        prepare(weight, cache)
    layout = gemv_layout.layout_of(weight)
    assert layout is not None
    bias = None if bias is None else bias.to(x.dtype)
    y = packed_gemv(x.reshape(-1, weight.in_features), cache["records"], bias, *layout)
    return y.view(*x.shape[:-1], weight.out_features)


def prepare(weight: Packed, cache: dict[str, Tensor]) -> None:
    """Lay the weight out in `cache`, as large as its codes, scales and zeros; to be called before tracing a graph."""
    layout = gemv_layout.layout_of(weight)
    assert layout is not None
    records = gemv_layout.write_records(weight, layout)
    if records.is_cuda:
        # a kernel that overlaps reads records before the kernels ahead of it have ended
        torch.cuda.current_stream(records.device).synchronize()
        # else CUDA graphs of torch.compile would copy a tensor that is no parameter at each replay
        torch._dynamo.mark_static_address(records)
    cache["records"] = records


@torch.library.custom_op("planish::packed_gemv", mutates_args=())
def packed_gemv(
    x: Tensor,
    records: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
    has_zero: bool,
    out_features: int,
    in_features: int,
) -> Tensor:
    """y [rows, out] = x W_hat^T + b; here its definition, for any device.

    Args:
        x: [rows, in], bf16 or fp16.
        records: uint8, of `write_records`.
        bias: [out] in the dtype of x, or None.
        bits, group, has_zero, out_features, in_features: the records' `Layout`.
    """
    q = gemv_layout.read_records(records, Layout(bits, group, has_zero, out_features, in_features))
    return functional.linear(x, q.dequantize(x.dtype), bias)


@packed_gemv.register_fake
def _(x: Tensor, records: Tensor, bias: Tensor | None, *layout) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], layout[3])


@packed_gemv.register_kernel("cuda")
def _(x: Tensor, records: Tensor, bias: Tensor | None, *layout) -> Tensor:  # type: ignore[no-untyped-def]
    return multiply(x, records, bias, Layout(*layout))


def multiply(
    x: Tensor,
    records: Tensor,
    bias: Tensor | None,
    layout: Layout,
    settings: Settings | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """The kernel on a GPU: y [rows, out] of x [rows, in], at most MAX_ROWS, written into `y` where it is given;
    `settings` overrule the table."""
    rows, device = len(x), records.device
    y = x.new_empty(rows, layout.out_features) if y is None else y
    card = card_of(device.index or 0)
    shape = plan(layout, rows, card, settings or settings_for(layout, rows, card.capability))
    slices, (warps, *_, apart, overlap) = shape.grid[1], shape.settings
    alone = slices == 1 or shape.cluster
    sums = None if alone else x.new_empty(slices, *y.shape, dtype=torch.float32)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    with torch.cuda.device(device):
        kernels = _kernels(device.index or 0, layout[:3], x.dtype == torch.bfloat16, shape[:3], shape.shared)
        if apart:
            ready = records.new_empty(ready_bytes(layout, rows, shape.columns))
            sizes: tuple[int, ...] = rows, layout.in_features, layout.steps
            nvrtc.launch(kernels["bring"], (rows, 1), BRINGERS, 16, [x, ready, *sizes], overlap)
            x = ready
        sizes = rows, layout.in_features, layout.out_features, layout.tiles, layout.steps, shape.width, slices
        given, blocks = [records, x, bias, y, sums, *sizes], (math.prod(shape.grid), 1)
        cluster = slices if shape.cluster else 1
        nvrtc.launch(kernels["gemv"], blocks, 32 * warps, shape.shared, given, overlap, cluster)
        if sums is not None:
            parts = [sums, bias, y, slices, rows, layout.out_features]
            nvrtc.launch(kernels["combine"], (-(-y.numel() // 512), 1), 128, 0, parts, overlap)
    return y


def ready_bytes(layout: Layout, rows: int, columns: int) -> int:
    """Of x as the kernel wants it: fp16, sums over groups, largest values."""
    return 512 * rows * layout.steps + 4 * columns * layout.groups * layout.steps + 4 * rows


def plan(layout: Layout, rows: int, card: Card, settings: Settings) -> Launch:
    """How a product of so many rows is launched; what doesn't fit the card is made smaller, stages first.

    A block holds its share of x in shared memory. Where that is too large, or tiles are too few to keep the card
    busy, blocks take slices of the inputs, and their sums are added by a second kernel.
    """
    columns = next(columns for columns in DEFAULTS if rows <= columns)
    each = _each(layout, rows, columns)
    overlap = settings.overlap and card.capability >= (9, 0)
    settings = settings._replace(overlap=overlap, apart=settings.apart and columns > 1)
    while True:
        warps, teams, stages, blocks, tall, *_ = settings
        fixed = warps * (tall * stages * sum(layout.sizes) + 32 * columns * (4 * tall + 1)) + 64 * columns + 64
        room = card.shared // blocks - RESERVED - fixed
        if room >= each * min(layout.steps, warps // teams):
            break
        settings = _smaller(settings)
    parallel = card.processors * blocks
    groups = -(-layout.tiles // (tall * teams))
    wanted = min(parallel // groups, layout.steps * teams // warps)
    width = min(room // each, -(-layout.steps // max(1, wanted)))
    slices = -(-layout.steps // width)
    width = -(-layout.steps // slices)
    across = min(groups, max(1, parallel // slices))
    # a cluster of two always finds two processors side by side, larger ones leave some idle
    cluster = slices == 2 and card.capability == (9, 0)
    # as much as with all rows, for which settings were measured: else more blocks than they say would share a
    # processor while others have none
    shared = min(fixed + _each(layout, columns, columns) * width, card.shared // blocks - RESERVED)
    return Launch(settings, columns, cluster, width, (across, slices), shared)


def _each(layout: Layout, rows: int, columns: int) -> int:
    """Bytes of x and its sums, for a record's inputs."""
    return 512 * rows + 4 * layout.groups * columns


def _smaller(settings: Settings) -> Settings:
    if settings.stages > 2:
        return settings._replace(stages=settings.stages - 1)
    if settings.blocks > 1:
        return settings._replace(blocks=settings.blocks - 1)
    if settings.tall > 1:
        return settings._replace(tall=settings.tall // 2)
    assert settings.warps > 1, "one warp of two records fits every card"
    return settings._replace(warps=settings.warps // 2, teams=max(1, settings.teams // 2))


def settings_for(layout: Layout, rows: int, capability: tuple[int, int]) -> Settings:
    """The table's row for a product, or the default."""
    columns = next(columns for columns in DEFAULTS if rows <= columns)
    table = TABLES.get(capability, {})
    return table.get((layout.bits, columns, size_of(layout)), DEFAULTS[columns])


def size_of(layout: Layout) -> str:
    """A weight's class in the tables: 4096 x 4096 is small, 8192 x 8192 medium, 28672 x 8192 large."""
    weights = layout.out_features * layout.in_features
    return "small" if weights < 2**25 else "medium" if weights < 2**27 else "large"


@functools.cache
def card_of(device: int) -> Card:
    """What a launch is planned for, of a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    return Card((found.major, found.minor), found.multi_processor_count, found.shared_memory_per_multiprocessor)


@torch.compiler.assume_constant_result
def _runs_on(device: int) -> bool:
    capability = torch.cuda.get_device_capability(device)
    return capability >= (8, 0) and f"sm_{capability[0]}{capability[1]}" in nvrtc.targets()


def macros(
    layout: tuple[int, int, bool], bf16: bool, settings: Settings, columns: int, cluster: bool = False
) -> dict[str, int]:
    """What cuda_gemv.cu is compiled for; `layout` is bits, group, has_zero."""
    names = "WARPS", "TEAMS", "STAGES", "BLOCKS", "TALL", "APART", "COLUMNS", "CLUSTER"
    cut = {name: int(value) for name, value in zip(names, (*settings[:6], columns, cluster), strict=True)}
    return cuda_records.macros(layout, bf16, settings.overlap) | cut


def source() -> str:
    """The kernel's text: what kernels share, and its own."""
    return cuda_records.source("cuda_gemv")


@functools.cache
def _kernels(
    device: int, layout: tuple[int, int, bool], bf16: bool, shape: tuple[Settings, int, bool], shared: int
) -> dict[str, ctypes.c_void_p]:
    code = _compiled(layout, bf16, shape, card_of(device).capability)
    needed = {"bring": 0, "gemv": shared, "combine": 0}
    return {name: nvrtc.load_kernel(code, name, needed[name]) for name in needed}


@functools.cache
def _compiled(
    layout: tuple[int, int, bool], bf16: bool, shape: tuple[Settings, int, bool], capability: tuple[int, int]
) -> bytes:
    target = f"sm_{capability[0]}{capability[1]}"
    return nvrtc.compile_source(source(), macros(layout, bf16, *shape), target)
