"""Prefill on an NVIDIA GPU: many rows of 16-bit activations times packed weights, in the layout of `cuda_gemv`.

    y = x W_hat^T + b,   W_hat = s (Q - z) rounded once to the dtype of x, as the reference rounds it

So a GPU holds a weight once, for decoding and for prefill. On a Hopper GPU the product is a kernel in CUDA C++
(cuda_gemm.cu and cuda_hopper.cu, which say how it works). Elsewhere, and where a table says so, rows that aren't many
go through the decode kernel 16 at a time (which doesn't round W_hat), and for more W_hat is decoded by another kernel
(`cuda_dequantize`) for one call of cuBLAS. Ways are chosen, and work is cut, by static data and a rule; nothing is
timed at run time. Sums are in fp32 and in a fixed order, so results repeat bit for bit. Knows nothing of layers.
"""

import ctypes
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from planish.kernels import cuda_dequantize, cuda_gemv, cuda_records, gemv_layout, nvrtc
from planish.kernels.cuda_gemv import MAX_ROWS, Card, card_of
from planish.kernels.gemv_layout import TILE, Layout

HOPPER, TARGET = (9, 0), "sm_90a"  # the kernel's instructions are of this architecture only
WORKERS, CHUNK, THREADS = 2, 64, 384  # as in cuda_gemm.cu
STAGED, SLACK = 2 * 32 * 144, 1024  # bytes of shared memory beside the rings, at most; what a block's barriers take
RESERVED = 1024  # bytes of shared memory that a block takes for itself
MOST_STAGES = 8


class Settings(NamedTuple):
    """How work is cut: blocks of 64 outputs that a warpgroup has (two warpgroups share a tile), rows of x of a tile,
    thread blocks that share a tile's inputs, stages of x."""

    blocks: int
    columns: int
    split: int
    stages: int


class Launch(NamedTuple):
    """A kernel's shape: settings that fit, stages of records, blocks, bytes of shared memory."""

    settings: Settings
    records: int
    grid: int
    shared: int


# what takes more than 16 rows, by capability, the first that can; "humming" is `kernels.humming`, if it is installed.
# The kernel is Hopper's and measured there (benchmarks/results/kernels-2026-11-25.json); no other GPU was measured
WAYS = {HOPPER: ("kernel", "passes", "decoded")}
ELSEWHERE = ("humming", "passes", "decoded")
# most passes of the decode kernel, by a weight's size (`cuda_gemv.size_of`). In that file, on an H100, 16 rows of 2 to
# 4 bits took 9-10, 16-23 and 46-62 us, and 64 rows decoded for cuBLAS 23-24, 75-112 and 366-385
PASSES = {"small": 2, "medium": 4, "large": 4}
# measured by `benchmarks/prefill.py --tune`: by capability, then by (bits, rows_of, out, in); None is another way. What
# no table has goes by `clocks`
TABLES: dict[tuple[int, int], dict[tuple[int, int, int, int], Settings | None]] = {}


@torch.library.custom_op("planish::packed_gemm", mutates_args=())
def packed_gemm(
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


@packed_gemm.register_fake
def _(x: Tensor, records: Tensor, bias: Tensor | None, *layout) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], layout[3])


@packed_gemm.register_kernel("cuda")
def _(x: Tensor, records: Tensor, bias: Tensor | None, *layout) -> Tensor:  # type: ignore[no-untyped-def]
    return product(x, records, bias, Layout(*layout))


def product(x: Tensor, records: Tensor, bias: Tensor | None, layout: Layout, way: str | None = None) -> Tensor:
    """The op on a GPU, by a way ("kernel", "passes", "decoded") or that which tables and the rule choose."""
    card = card_of(records.device.index or 0)
    way = way or way_of(layout, len(x), card)
    if way == "kernel" and len(x):
        settings = choose(layout, len(x), card)
        assert settings is not None, "a way that is forced must be able to"
        return multiply(x, records, bias, layout, settings)
    if way == "passes":
        return passes(x, records, bias, layout)
    return functional.linear(x, cuda_dequantize.dequantize(records, layout, x.dtype), bias)


def passes(x: Tensor, records: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """y [rows, out] of x [rows, in] by the kernel of few rows, MAX_ROWS at a time."""
    y = x.new_empty(len(x), layout.out_features)
    for start in range(0, len(x), MAX_ROWS):
        some = slice(start, start + MAX_ROWS)
        cuda_gemv.multiply(x[some], records, bias, layout, y=y[some])
    return y


def ways_of(capability: tuple[int, int]) -> tuple[str, ...]:
    """A GPU's row of WAYS."""
    return WAYS.get(capability, ELSEWHERE)


def way_of(layout: Layout, rows: int, card: Card) -> str:
    """The first way of ours that can take so many rows."""
    able = {
        "kernel": choose(layout, rows, card) is not None,
        "passes": rows <= MAX_ROWS * PASSES[cuda_gemv.size_of(layout)],
        "decoded": True,
    }
    return next(way for way in ways_of(card.capability) if able.get(way))


def choose(layout: Layout, rows: int, card: Card) -> Settings | None:
    """Settings of the kernel for a product, or None where it isn't taken."""
    if card.capability != HOPPER or layout.in_features % 8:  # a tensor map's rows are multiples of 16 bytes
        return None
    table = TABLES.get(card.capability, {})
    key = layout.bits, rows_of(rows), layout.out_features, layout.in_features
    return table[key] if key in table else default_settings(layout, rows, card)


def rows_of(rows: int) -> int:
    """A number of rows' class in the tables: the next power of two, 16 to 2048."""
    return next((limit for limit in (16, 32, 64, 128, 256, 512, 1024) if rows <= limit), 2048)


def multiply(x: Tensor, records: Tensor, bias: Tensor | None, layout: Layout, settings: Settings) -> Tensor:
    """The kernel on a Hopper GPU: y [rows, out] of x [rows, in]."""
    rows, device = len(x), records.device
    y = x.new_empty(rows, layout.out_features)
    shape = plan(layout, rows, card_of(device.index or 0), settings)
    with torch.cuda.device(device):
        kernel = _kernel(device.index or 0, layout[:3], x.dtype == torch.bfloat16, shape.settings, shape.records)
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        x = x.clone() if x.data_ptr() % 16 else x
        tiles = nvrtc.tensor_map(x, shape.settings.columns, CHUNK)
        sizes = rows, layout.in_features, layout.out_features, layout.tiles, layout.steps
        given = [tiles, records, bias, y, *sizes, cuda_records.first(layout.bits, x.dtype == torch.bfloat16)]
        nvrtc.launch(kernel, (shape.grid, 1), THREADS, shape.shared, given, True, shape.settings.split)
    return y


def plan(layout: Layout, rows: int, card: Card, settings: Settings) -> Launch:
    """How a product is launched; what doesn't fit the card's shared memory is made smaller, stages of x first."""
    split, held = settings.split, settings.blocks * WORKERS * 64 // TILE * sum(layout.sizes)
    room = card.shared - RESERVED - STAGED - SLACK
    tile = settings.columns * CHUNK * 2
    while settings.stages > 2 and room < settings.stages * tile + 2 * held:
        settings = settings._replace(stages=settings.stages - 1)
    records = min(MOST_STAGES, (room - settings.stages * tile) // held)
    assert records >= 2, "settings that no card has room for"
    rings = settings.stages * tile + records * held
    exchanged = settings.blocks * WORKERS * 64 * settings.columns * 4 if split > 1 else 0
    pieces = pieces_of(layout, rows, settings)
    grid = pieces * split if split > 1 else min(pieces, card.processors)
    return Launch(settings, records, grid, max(rings, exchanged) + STAGED + SLACK)


def pieces_of(layout: Layout, rows: int, settings: Settings) -> int:
    return -(-rows // settings.columns) * -(-layout.out_features // (64 * WORKERS * settings.blocks))


def candidates() -> Iterator[Settings]:
    """Ways to cut work: a block of a cluster writes at least 8 rows, and only few rows leave a lane room for two
    blocks' sums (with more, measured on an H100, a second block costs more than it saves)."""
    for blocks, columns, split in itertools.product((1, 2), (16, 32, 64, 128, 256), (1, 2, 4, 8)):
        if (blocks == 1 or columns <= 32) and columns // split >= 8:
            yield Settings(blocks, columns, split, 4 if columns >= 128 else 8)


@functools.lru_cache(maxsize=4096)
def default_settings(layout: Layout, rows: int, card: Card) -> Settings:
    """The way to cut work that takes the fewest clocks by `clocks`."""
    return min(candidates(), key=lambda settings: clocks(layout, rows, card, settings))


def clocks(layout: Layout, rows: int, card: Card, settings: Settings) -> float:
    """A rule for how long a product takes: waves of tiles, whose steps multiply, decode or wait for the L2 cache."""
    blocks, columns, split, _ = settings
    multiplies = 16 * blocks * columns
    decodes = 900 * blocks
    reads = 700 + (512 * columns + 8 * blocks * sum(layout.sizes)) / 38
    # clusters of 4 and 8 took as long as if a quarter of them had to wait: a guess that fits the times
    clusters = card.processors // split if split < 4 else card.processors // 16 * 12 // split
    waves = -(-pieces_of(layout, rows, settings) // clusters)
    ends = 2500 + 8 * blocks * columns + (1500 + 12 * blocks * columns if split > 1 else 0)
    return waves * (max(multiplies, decodes, reads) * -(-layout.steps // split) + ends)


def macros(layout: tuple[int, int, bool], bf16: bool, settings: Settings, records: int) -> dict[str, int]:
    """What cuda_gemm.cu is compiled for; `layout` is bits, group, has_zero."""
    names = "BLOCKS", "COLUMNS", "SPLIT", "TILES", "RECORDS"
    return cuda_records.macros(layout, bf16, True) | dict(zip(names, (*settings, records), strict=True))


def source(columns: int, bf16: bool) -> str:
    """The kernel's text: wgmma of so many columns, what kernels share, and the rest."""
    return wgmma(columns, "bf16" if bf16 else "f16") + cuda_records.source("cuda_hopper", "cuda_gemm")


def wgmma(columns: int, kind: str) -> str:
    """d [64, columns] += a b, of which a warpgroup holds d and a; it takes a name a number. `kind`: f16, bf16 or s8."""
    count, whole = columns // 2, kind == "s8"
    name, letter, size = ("int", "r", 1) if whole else ("float", "f", 2)
    shape, flags = ("k32.s32", "1") if whole else ("k16.f32", "1, 1, 1, 0")
    sums = ", ".join(f"%{i}" for i in range(count))
    left = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+{letter}"(d[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    return f"""
typedef {name} Sum;
#define REGISTER(sum) "{letter}"(sum)
constexpr int INPUT_BYTES = {size};
#ifndef EMULATED
__device__ __forceinline__ void wgmma({name} (&d)[{count}], const unsigned (&a)[4], unsigned long long b) {{
    asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}{shape}.{kind}.{kind} "
                 "{{{sums}}}, {{{left}}}, %{count + 4}, {flags};" : {outputs} : {inputs}, "l"(b));
}}
#endif
"""


@functools.cache
def _kernel(
    device: int, layout: tuple[int, int, bool], bf16: bool, settings: Settings, records: int
) -> ctypes.c_void_p:
    code = _compiled(layout, bf16, settings, records)
    return nvrtc.load_kernel(code, "gemm", card_of(device).shared - RESERVED)


@functools.cache
def _compiled(layout: tuple[int, int, bool], bf16: bool, settings: Settings, records: int) -> bytes:
    made = macros(layout, bf16, settings, records)
    return nvrtc.compile_source(source(settings.columns, bf16), made, TARGET)
