"""Triton kernels of factors inside the quantizer, registered for CUDA under the ops of `quant.low_rank`.

    W' = base * unit + alpha B A,   W_hat = s (clamp(round(W' / s) + z) - z)
    dA = alpha B^T dW',   dB = alpha dW' A^T,   dW' = G inside,   ds, dz as of `kernels.fakequant`

W' is never in memory while a model is trained: each tile is added up where it is rounded, rank by rank in order and
without fused multiply-adds, so that it has the same bits in every kernel, `merged` among them, by which codes are
converted. Of the gradient dW' only sums leave a tile: those of its groups, its share of dB, and its share of dA, which
a program adds up over the tiles below one another that it walks. No atomics, fixed tiles: a run repeats itself.

Groups that don't divide a tile's columns, and high ranks, take the ops' own definitions, on top of `merged`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from planish.kernels.fakequant import _clamp, _round
from planish.kernels.triton_train import _spread
from planish.quant import low_rank
from planish.quant.low_rank import merged, merged_backward, merged_round

ROWS, COLUMNS, WARPS = 16, 128, 4  # of a tile
WALK = 16  # tiles below one another that a program's gradient goes through
NARROWEST, WIDEST = 16, 32  # ranks that a product in a tile takes


@triton.jit
def _merged(
    base_ptr, unit_ptr, a_ptr, b_ptr, alpha, first, row, start, rows, columns, groups, RANK: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # W' of a tile, fp32; 0 outside of the matrix. Rows are counted from the tile's `first`, so that offsets are short
    column = start + tl.arange(0, COLUMNS)
    inside = column < columns
    at = row[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    values = tl.load(base_ptr + first * columns + at, mask=mask, other=0.0).to(tl.float32)
    if unit_ptr is not None:
        values *= _spread(unit_ptr + first * groups, row, start, rows, groups, GROUP, ROWS, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for rank in range(RANK):
        left = tl.load(b_ptr + first * RANK + row * RANK + rank, mask=row < rows, other=0.0)
        total += left[:, None] * tl.load(a_ptr + rank * columns + column, mask=inside, other=0.0)[None, :]
    return values + alpha * total


@triton.jit
def _forward_kernel(
    base_ptr, unit_ptr, a_ptr, b_ptr, scale_ptr, zero_ptr, out_ptr, alpha, rows, columns, groups, TOP: tl.constexpr,
    RANK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, start = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows -= first.to(tl.int32)
    values = _merged(
        base_ptr, unit_ptr, a_ptr, b_ptr, alpha, first, row, start, rows, columns, groups, RANK, GROUP, ROWS, COLUMNS
    )  # fmt: skip
    column = start + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    if scale_ptr is not None:
        scale = _spread(scale_ptr + first * groups, row, start, rows, groups, GROUP, ROWS, COLUMNS)
        zero = _spread(zero_ptr + first * groups, row, start, rows, groups, GROUP, ROWS, COLUMNS)
        ratio = tl.div_rn(values, tl.where(mask, scale, 1.0))
        values = scale * (_clamp(_round(ratio) + zero, 0.0, TOP) - zero)
    at = row[:, None] * columns + column[None, :]
    tl.store(out_ptr + first * columns + at, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_ptr, base_ptr, unit_ptr, a_ptr, b_ptr, scale_ptr, zero_ptr, grad_a_ptr, grad_b_ptr, grad_scale_ptr,
    grad_zero_ptr, alpha, rows, columns, groups, TOP: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    start, share = tl.program_id(1) * COLUMNS, tl.program_id(0)
    column, rank = start + tl.arange(0, COLUMNS), tl.arange(0, WIDE)
    slot = start // GROUP + tl.arange(0, COLUMNS // GROUP)
    held = (rank < RANK)[:, None] & (column < columns)[None, :]
    a = tl.load(a_ptr + rank[:, None] * columns + column[None, :], mask=held, other=0.0)
    grad_a = tl.zeros([WIDE, COLUMNS], tl.float32)
    row = tl.arange(0, ROWS)
    at = row[:, None] * columns + column[None, :]
    for tile in range(WALK):
        first = (share * WALK + tile).to(tl.int64) * ROWS
        left = rows - first.to(tl.int32)
        values = _merged(
            base_ptr, unit_ptr, a_ptr, b_ptr, alpha, first, row, start, left, columns, groups, RANK, GROUP, ROWS,
            COLUMNS,
        )  # fmt: skip
        mask = (row < left)[:, None] & (column < columns)[None, :]
        grad = tl.load(grad_ptr + first * columns + at, mask=mask, other=0.0).to(tl.float32)
        scale = _spread(scale_ptr + first * groups, row, start, left, groups, GROUP, ROWS, COLUMNS)
        scale = tl.where(mask, scale, 1.0)
        zero = _spread(zero_ptr + first * groups, row, start, left, groups, GROUP, ROWS, COLUMNS)
        ratio = tl.div_rn(values, scale)
        shifted = _round(ratio) + zero
        codes = _clamp(shifted, 0.0, TOP)
        moved = grad * (shifted == codes).to(tl.float32)
        place = first * groups + row[:, None] * groups + slot[None, :]
        there = (row < left)[:, None] & (slot < groups)[None, :]
        terms = tl.reshape(grad * (codes - zero) - moved * ratio, (ROWS, COLUMNS // GROUP, GROUP))
        tl.store(grad_scale_ptr + place, tl.sum(terms, 2), mask=there)
        terms = tl.reshape((moved - grad) * scale, (ROWS, COLUMNS // GROUP, GROUP))
        tl.store(grad_zero_ptr + place, tl.sum(terms, 2), mask=there)
        known = (row < left)[:, None] & (rank < RANK)[None, :]
        ranks = row[:, None] * RANK + rank[None, :]
        b = tl.load(b_ptr + first * RANK + ranks, mask=known, other=0.0)
        grad_a = tl.dot(tl.trans(b), moved, grad_a, input_precision="ieee")
        part = tl.dot(moved, tl.trans(a), input_precision="ieee")
        mine = grad_b_ptr + (tl.program_id(1).to(tl.int64) * rows + first) * RANK
        tl.store(mine + ranks, alpha * part, mask=known)
    mine = (share.to(tl.int64) * RANK + rank)[:, None] * columns + column[None, :]
    tl.store(grad_a_ptr + mine, alpha * grad_a, mask=held)


def _takes(group_size: int, rank: int) -> bool:
    return COLUMNS % group_size == 0 and rank <= WIDEST


low_rank.fused["cuda"] = _takes


def _about(base: Tensor, unit: Tensor | None, a: Tensor, b: Tensor, group_size: int) -> tuple[list[Tensor | None], int]:
    """The tensors that W' is made of, as kernels read them; and the groups of a row."""
    groups = triton.cdiv(base.shape[1], group_size)
    if unit is not None and len(unit) == 1:
        unit = unit.expand(len(base), groups, 1)
    parts = base, unit, a.float(), b.float()
    return [None if part is None else part.contiguous() for part in parts], groups


def _forward(
    base: Tensor, unit: Tensor | None, a: Tensor, b: Tensor, alpha: float, group_size: int, scale: Tensor | None,
    zero: Tensor | None, bits: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    base = base.contiguous()  # or what is like it would lie otherwise than it is written
    parts, groups = _about(base, unit, a, b, group_size)
    out, (rows, columns) = torch.empty_like(base, dtype=dtype), base.shape
    grid = [None if part is None else part.contiguous() for part in (scale, zero)]
    with torch.cuda.device_of(base):
        _forward_kernel[triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)](
            *parts, *grid, out, alpha, rows, columns, groups, TOP=float(2**bits - 1), RANK=len(a), GROUP=group_size,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@merged.register_kernel("cuda")
def add(base: Tensor, unit: Tensor | None, a: Tensor, b: Tensor, alpha: float, group_size: int) -> Tensor:
    """`planish::merged` in one pass, but for units of groups that aren't taken."""
    if unit is not None and COLUMNS % group_size:
        base, unit = low_rank.frozen(base, unit, group_size), None
    return _forward(base, unit, a, b, alpha, group_size if unit is not None else COLUMNS, None, None, 2, torch.float32)


@merged_round.register_kernel("cuda")
def add_round(
    base: Tensor, unit: Tensor | None, a: Tensor, b: Tensor, alpha: float, group_size: int, scale: Tensor, zero: Tensor,
    bits: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`planish::merged_round` in one pass."""
    if not _takes(group_size, len(a)):
        return low_rank.round_in_tiles(base, unit, a, b, alpha, group_size, scale, zero, bits, dtype)
    return _forward(base, unit, a, b, alpha, group_size, scale, zero, bits, dtype)


@merged_backward.register_kernel("cuda")
def add_backward(
    grad: Tensor, base: Tensor, unit: Tensor | None, a: Tensor, b: Tensor, alpha: float, group_size: int, scale: Tensor,
    zero: Tensor, bits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`planish::merged_backward` in one pass over the weights."""
    if not _takes(group_size, len(a)):
        return low_rank.gradients_of(grad, base, unit, a, b, alpha, group_size, scale, zero, bits)
    parts, groups = _about(base, unit, a, b, group_size)
    (rows, columns), rank = base.shape, len(a)
    down, across = triton.cdiv(rows, ROWS * WALK), triton.cdiv(columns, COLUMNS)
    grad_a = torch.empty(down, rank, columns, dtype=torch.float32, device=base.device)
    grad_b = torch.empty(across, rows, rank, dtype=torch.float32, device=base.device)
    scale, zero = scale.contiguous(), zero.contiguous()
    grad_scale, grad_zero = torch.empty_like(scale), torch.empty_like(scale)
    with torch.cuda.device_of(base):
        _backward_kernel[down, across](
            grad.contiguous(), *parts, scale, zero, grad_a, grad_b, grad_scale, grad_zero,
            alpha, rows, columns, groups, TOP=float(2**bits - 1), RANK=rank,
            WIDE=max(NARROWEST, triton.next_power_of_2(rank)), GROUP=group_size, ROWS=ROWS, COLUMNS=COLUMNS, WALK=WALK,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return grad_a.sum(0), grad_b.sum(0), grad_scale, grad_zero
