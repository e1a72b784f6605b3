"""Integer products on CUDA: tokens are rounded in one pass, and scales applied where the sums of a tile lie.

Registered under the ops of `planish.kernels.int8`, whose torch definitions are the slow twins: codes, scales and
sums are the same bit for bit, y too but for one rounding. Tiles are fixed by the number of tokens, never timed: few
tokens are bound by reading weights, and want many narrow ones. Needs triton: `planish.kernels` imports it where there
is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from planish.kernels import int8
from planish.kernels.fakequant import _clamp, _round
from planish.qtensor import midpoint
from planish.quant.activation import SMALLEST

BAND = 8  # tiles of rows that go through all columns together
# up to so many tokens: rows, columns and depth of a tile, warps, stages
TILES = {16: (16, 64, 256, 4, 4), 64: (64, 64, 256, 4, 4), 512: (128, 128, 128, 8, 4), 2**31: (128, 256, 128, 8, 4)}


@triton.jit
def _rows_kernel(
    x_ptr, codes_ptr, scale_ptr, grid_ptr, size,
    TOP: tl.constexpr, MIDDLE: tl.constexpr, EVEN: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    x = tl.load(x_ptr + row * size + column, mask=mask, other=0.0).to(tl.float32)
    low, high = tl.minimum(tl.min(x, 0), 0.0), tl.maximum(tl.max(x, 0), 0.0)
    if EVEN:
        scale = tl.maximum(tl.div_rn(tl.maximum(-low, high), MIDDLE - 1.0), LEAST)
        zero = MIDDLE + 0.0 * scale
    else:
        scale = tl.maximum(tl.div_rn(high - low, TOP), LEAST)
        zero = _clamp(_round(tl.div_rn(-low, scale)), 0.0, TOP)
    shifted = _clamp(_round(tl.div_rn(x, scale)) + zero, 0.0, TOP) - MIDDLE
    shifted = tl.where(mask, shifted, 0.0)
    tl.store(codes_ptr + row * size + column, shifted.to(tl.int8), mask=mask)
    tl.store(scale_ptr + row, scale)
    tl.store(grid_ptr + 2 * row, (zero - MIDDLE).to(tl.int32))
    tl.store(grid_ptr + 2 * row + 1, tl.sum(shifted.to(tl.int32), 0))


@triton.jit
def _linear_kernel(
    x_ptr, scale_ptr, grid_ptr, weight_ptr, weight_scale_ptr, sums_ptr, zeros_ptr, bias_ptr, y_ptr,
    tokens, outputs, inputs,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, BAND: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    # tiles of a band of rows go through all columns together, so that weights are read from the cache
    program, across = tl.program_id(0), tl.cdiv(outputs, WIDE)
    band = program // (BAND * across) * BAND
    height = tl.minimum(tl.cdiv(tokens, TALL) - band, BAND)
    row = (band + program % (BAND * across) % height) * TALL + tl.arange(0, TALL)
    column = program % (BAND * across) // height * WIDE + tl.arange(0, WIDE)
    deep = tl.arange(0, DEEP)
    x_at = x_ptr + (row % tokens).to(tl.int64)[:, None] * inputs + deep[None, :]
    weight_at = weight_ptr + (column % outputs).to(tl.int64)[None, :] * inputs + deep[:, None]
    total = tl.zeros([TALL, WIDE], tl.int32)
    for start in range(0, inputs, DEEP):
        if RAGGED:
            live = start + deep < inputs
            x = tl.load(x_at + start, mask=live[None, :], other=0)
            weight = tl.load(weight_at + start, mask=live[:, None], other=0)
        else:
            x, weight = tl.load(x_at + start), tl.load(weight_at + start)
        total += tl.dot(x, weight, out_dtype=tl.int32)
    high, wide = row < tokens, column < outputs
    zero = tl.load(grid_ptr + 2 * row, mask=high, other=0)[:, None]
    total_x = tl.load(grid_ptr + 2 * row + 1, mask=high, other=0)[:, None]
    sums = tl.load(sums_ptr + column, mask=wide, other=0)[None, :]
    zeros = tl.load(zeros_ptr + column, mask=wide, other=0)[None, :]
    total += inputs * zero * zeros - zero * sums - zeros * total_x
    scale = tl.load(scale_ptr + row, mask=high, other=0.0)[:, None]
    y = scale * tl.load(weight_scale_ptr + column, mask=wide, other=0.0).to(tl.float32)[None, :] * total.to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=wide, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=high[:, None] & wide[None, :])


def rows(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`planish::int8_rows` in one pass."""
    x = x.contiguous()
    tokens, size = x.shape
    codes = torch.empty(tokens, size, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    grid = torch.empty(tokens, 2, dtype=torch.int32, device=x.device)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        _rows_kernel[(tokens,)](
            x, codes, scale, grid, size, TOP=float(2**bits - 1), MIDDLE=float(midpoint(bits)), EVEN=symmetric,
            LEAST=SMALLEST, BLOCK=block, num_warps=min(16, max(1, block // 1024)), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale, grid


def linear(
    codes: Tensor, scale: Tensor, grid: Tensor, weight: Tensor, weight_scale: Tensor, sums: Tensor, zeros: Tensor,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`planish::int8_linear` in one kernel."""
    (tokens, inputs), outputs = codes.shape, len(weight)
    y = torch.empty(tokens, outputs, dtype=dtype, device=codes.device)
    tall, wide, deep, warps, stages = next(tile for most, tile in TILES.items() if tokens <= most)
    tiles = triton.cdiv(tokens, tall) * triton.cdiv(outputs, wide)
    with torch.cuda.device_of(codes):
        _linear_kernel[(tiles,)](
            codes, scale, grid, weight, weight_scale, sums, zeros, bias, y, tokens, outputs, inputs,
            TALL=tall, WIDE=wide, DEEP=deep, BAND=BAND, RAGGED=inputs % deep != 0, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y


int8.int8_rows.register_kernel("cuda")(rows)
int8.int8_linear.register_kernel("cuda")(linear)
