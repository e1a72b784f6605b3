"""Integer products on a Hopper GPU, activations rounded on the way: the kernels behind `int8`.

One kernel rounds tokens and writes their codes in the order that the other's tensor cores want (cuda_tokens.cu), the
other multiplies and scales (cuda_int8.cu, cuda_hopper.cu; they say how). The weight lies as records (gemv_layout.py) of
4 or 8 bits, without zeros. How work is cut is a rule, or a table; nothing is timed at run time. Knows nothing of
layers.
"""

import ctypes
import functools

import torch
from torch import Tensor

from planish.kernels import cuda_gemm, cuda_records, nvrtc
from planish.kernels.cuda_gemm import HOPPER, RESERVED, TARGET, THREADS, Settings
from planish.kernels.cuda_gemv import Card, card_of
from planish.kernels.gemv_layout import STEP, TILE, Layout

DTYPES = (torch.bfloat16, torch.float16)
CHUNK = 128  # inputs of a tile of tokens
WIDTH = 32  # what divides a row of tokens' codes
EIGHTS, MOST_THREADS = 4, 1024  # of a row: eights of numbers that a thread holds, if the threads suffice

# by capability, then by (bits, rows_of, out, in), as `cuda_gemm.TABLES`; what no table has goes by `clocks`
TABLES: dict[tuple[int, int], dict[tuple[int, int, int, int], Settings]] = {
    (9, 0): {
        (4, 16, 4096, 4096): Settings(1, 16, 2, 8),
        (4, 16, 8192, 8192): Settings(1, 16, 2, 8),
        (4, 256, 4096, 4096): Settings(1, 128, 2, 6),
        (4, 256, 8192, 8192): Settings(1, 128, 1, 4),
        (4, 2048, 4096, 4096): Settings(1, 256, 1, 3),
        (4, 2048, 8192, 8192): Settings(1, 256, 1, 6),
        (8, 16, 4096, 4096): Settings(1, 16, 2, 8),
        (8, 16, 8192, 8192): Settings(1, 16, 2, 8),
        (8, 256, 4096, 4096): Settings(1, 128, 2, 4),
        (8, 256, 8192, 8192): Settings(1, 128, 1, 4),
        (8, 2048, 4096, 4096): Settings(1, 256, 1, 3),
        (8, 2048, 8192, 8192): Settings(1, 256, 1, 3),
    },
}


def runs_on(device: torch.device) -> bool:
    """Whether the kernels do: on a Hopper GPU with a compiler for it."""
    if device.type != "cuda" or card_of(device.index or 0).capability != HOPPER:
        return False
    return "sm_90" in nvrtc.targets()


def layout_of(records: Tensor, out_features: int, in_features: int) -> Layout:
    """That of records that `int8.records_of` made."""
    layouts = (Layout(bits, STEP, False, out_features, in_features) for bits in (4, 8))
    return next(layout for layout in layouts if sum(layout.sizes) == records.shape[2])


def product(
    x: Tensor,
    records: Tensor,
    lines: Tensor,
    bias: Tensor | None,
    in_features: int,
    token_bits: int,
    symmetric: bool,
    settings: Settings | None = None,
) -> Tensor:
    """`int8.int8_product` of at least one row of bf16 or fp16, and of records; cut as `choose` says, if not told."""
    layout, card = layout_of(records, len(lines), in_features), card_of(records.device.index or 0)
    settings = settings or choose(layout, len(x), card)
    with torch.cuda.device(records.device):
        codes, tokens = round_tokens(x, layout.bits, token_bits, symmetric)
        return multiply(codes, tokens, records, lines, bias, layout, settings, x.dtype)


def round_tokens(x: Tensor, weight_bits: int, token_bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """int8 [rows, in and some], ordered for a weight of so many bits; int32 [rows, 4]: s, t, sum of u - t, nothing."""
    rows, width = x.shape
    x = x.contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    codes = torch.empty(rows, -(-width // WIDTH) * WIDTH, dtype=torch.int8, device=x.device)
    lines = torch.empty(rows, 4, dtype=torch.int32, device=x.device)
    threads, eights = _threads(width)
    kernel = _tokens(x.device.index or 0, weight_bits, x.dtype == torch.bfloat16, threads, eights)
    given = (x, codes, lines, width, codes.shape[1], token_bits, int(symmetric))
    nvrtc.launch(kernel, (rows, 1), threads, 3 * threads // 32 * 4, given, True)
    return codes, lines


def multiply(
    codes: Tensor,
    tokens: Tensor,
    records: Tensor,
    lines: Tensor,
    bias: Tensor | None,
    layout: Layout,
    settings: Settings,
    dtype: torch.dtype,
) -> Tensor:
    """y [rows, out] of what `round_tokens` gives, on the current device."""
    rows, device = len(codes), records.device.index or 0
    y = torch.empty(rows, layout.out_features, dtype=dtype, device=codes.device)
    shape = cuda_gemm.plan(layout, rows, card_of(device), settings)
    kernel = _kernel(device, layout.bits, dtype == torch.bfloat16, shape.settings, shape.records)
    tiles = nvrtc.tensor_map(codes, shape.settings.columns, CHUNK)
    sizes = rows, layout.in_features, layout.out_features, layout.tiles, layout.steps
    bias = None if bias is None else bias.contiguous()
    given = [tiles, records, bias, lines, tokens, y, *sizes]
    nvrtc.launch(kernel, (shape.grid, 1), THREADS, shape.shared, given, True, shape.settings.split)
    return y


def choose(layout: Layout, rows: int, card: Card) -> Settings:
    """How a product's work is cut: as a table says, else in the fewest clocks by `clocks`."""
    table = TABLES.get(card.capability, {})
    key = layout.bits, cuda_gemm.rows_of(rows), layout.out_features, layout.in_features
    if key in table:
        return table[key]
    return min(cuda_gemm.candidates(), key=lambda settings: clocks(layout, rows, card, settings))


def clocks(layout: Layout, rows: int, card: Card, settings: Settings) -> float:
    """A rule for how long a product takes, as `cuda_gemm.clocks`; steps multiply, or wait for the L2 cache."""
    blocks, columns, split, _ = settings
    multiplies = 8 * blocks * columns
    reads = (STEP * columns + 128 * blocks // TILE * sum(layout.sizes)) / 28
    clusters = card.processors // split if split < 4 else card.processors // 16 * 16 // split
    waves = -(-cuda_gemm.pieces_of(layout, rows, settings) // clusters)
    ends = 2500 + 12 * blocks * columns + (1500 + 12 * blocks * columns if split > 1 else 0)
    return waves * (max(multiplies, 150 * blocks, reads) * -(-layout.steps // split) + ends)


def macros(bits: int, bf16: bool, settings: Settings, records: int) -> dict[str, int]:
    """What cuda_int8.cu is compiled for."""
    return cuda_gemm.macros((bits, STEP, False), bf16, settings, records)


def source(columns: int) -> str:
    """The text of the kernel that multiplies."""
    return cuda_gemm.wgmma(columns, "s8") + cuda_records.source("cuda_hopper", "cuda_int8")


def token_macros(weight_bits: int, bf16: bool, threads: int, eights: int) -> dict[str, int]:
    """What cuda_tokens.cu is compiled for."""
    made = cuda_records.macros((weight_bits, STEP, False), bf16, True)
    return made | {"THREADS": threads, "EIGHTS": eights}


def token_source() -> str:
    """The text of the kernel that rounds tokens."""
    return cuda_records.source("cuda_tokens")


def _threads(width: int) -> tuple[int, int]:
    """Threads of a row, a power of two, and eights of numbers that each holds."""
    threads = 32
    while threads < MOST_THREADS and threads * EIGHTS * 8 < width:
        threads *= 2
    return threads, -(-width // (8 * threads))


@functools.cache
def _tokens(device: int, weight_bits: int, bf16: bool, threads: int, eights: int) -> ctypes.c_void_p:
    code = nvrtc.compile_source(token_source(), token_macros(weight_bits, bf16, threads, eights), TARGET)
    return nvrtc.load_kernel(code, "tokens")


@functools.cache
def _kernel(device: int, bits: int, bf16: bool, settings: Settings, records: int) -> ctypes.c_void_p:
    return nvrtc.load_kernel(_compiled(bits, bf16, settings, records), "int8", card_of(device).shared - RESERVED)


@functools.cache
def _compiled(bits: int, bf16: bool, settings: Settings, records: int) -> bytes:
    return nvrtc.compile_source(source(settings.columns), macros(bits, bf16, settings, records), TARGET)
