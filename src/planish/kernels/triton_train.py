"""Triton kernels of training on packed weights, registered for CUDA under the ops of `kernels.train`.

    y = x W_hat^T + b,   dX = dY W_hat,   ds = sum of dW * (Q - z),   dz = -s * sum of dW,   dW = dY^T X

Products run on tensor cores with fp32 sums. W_hat is the reference's bit for bit (no fused multiply-add, one
rounding); it is decoded tile by tile inside the product, or written whole by a kernel of its own for cuBLAS to
read: `writes_dense` says which. A tile of dW lives in registers and leaves them as one number for each group.
Groups longer than a tile leave one for each piece, which a second sum joins; so nothing is added atomically
and a run repeats itself bit for bit. Tile shapes are fixed, never timed.

Knows nothing of autograd. Needs triton: `planish.kernels` imports it where there is one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from planish.kernels import train
from planish.kernels.pack import Packed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # others take the definitions in `train`
# tokens from which y and dX go through a dense W_hat; it costs out * in values of the dtype of x for one call
DENSE_FROM: int | None = 512


class Tiles(NamedTuple):
    """A program's result is [high, wide]; it sums over `deep` at a time."""

    high: int
    wide: int
    deep: int
    warps: int
    stages: int


PRODUCT = Tiles(128, 256, 64, warps=8, stages=3)  # y and dX
GRID = Tiles(128, 256, 64, warps=8, stages=3)  # ds and dz: outputs, inputs, tokens
EXACT = Tiles(64, 64, 16, warps=4, stages=2)  # fp32, on the plain cores
# a small matrix has few tiles for a GPU: more programs share its tokens, none taking fewer than these
PROGRAMS, SHORTEST = 256, 1024
DENSE_ROWS, DENSE_COLUMNS = 16, 256
BAND = 8


def writes_dense(tokens: int) -> bool:
    """Whether y and dX of so many tokens go through a dense W_hat and cuBLAS."""
    return DENSE_FROM is not None and tokens >= DENSE_FROM


@triton.jit
def _place(down, across, BAND: tl.constexpr):
    # bands of a few rows of tiles are walked column by column: programs that run together read the same tiles
    program = tl.program_id(0)
    first = program // (BAND * across) * BAND
    height = tl.minimum(down - first, BAND)
    inside = program % (BAND * across)
    return first + inside % height, inside // height


@triton.jit
def _tile(pointer, row, column, rows, columns, width):
    # values [row, column] of a matrix whose rows lie `width` apart; zeros outside of [rows, columns)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)


@triton.jit
def _plane(
    codes_ptr, row, start, rows, eighth, BITS: tl.constexpr, LOW: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # the fields of one plane from column `start` on, a multiple of 8: each byte is loaded once, then spread
    PER: tl.constexpr = 8 // WIDTH
    byte = start // PER + tl.arange(0, COLUMNS // PER)
    mask = (row < rows)[:, None] & (byte < WIDTH * eighth)[None, :]
    at = row.to(tl.int64)[:, None] * (BITS * eighth) + LOW * eighth + byte[None, :]
    packed = tl.load(codes_ptr + at, mask=mask, other=0).to(tl.int32)
    fields = (packed[:, :, None] >> (tl.arange(0, PER) * WIDTH)[None, None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(fields, (ROWS, COLUMNS))


@triton.jit
def _codes(
    codes_ptr, row, start, rows, eighth, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    if BITS == 3:
        low = _plane(codes_ptr, row, start, rows, eighth, BITS, 0, 2, ROWS, COLUMNS)
        codes = low | (_plane(codes_ptr, row, start, rows, eighth, BITS, 2, 1, ROWS, COLUMNS) << 2)
    elif BITS == 6:
        low = _plane(codes_ptr, row, start, rows, eighth, BITS, 0, 4, ROWS, COLUMNS)
        codes = low | (_plane(codes_ptr, row, start, rows, eighth, BITS, 4, 2, ROWS, COLUMNS) << 4)
    else:
        codes = _plane(codes_ptr, row, start, rows, eighth, BITS, 0, BITS, ROWS, COLUMNS)
    # 2^23 + Q has Q as its last bits: exact, and an integer is converted at a quarter of this speed
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _spread(
    grid_ptr, row, start, rows, groups, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    # a grid's value for each weight of a tile; [ROWS, 1] where a tile lies in one group
    at = grid_ptr + row.to(tl.int64) * groups
    live = row < rows
    if GROUP % COLUMNS == 0:
        values = tl.load(at + start // GROUP, mask=live, other=0)[:, None]
    elif COLUMNS % GROUP == 0:
        group = start // GROUP + tl.arange(0, COLUMNS // GROUP)
        loaded = tl.load(at[:, None] + group[None, :], mask=live[:, None] & (group < groups)[None, :], other=0)
        loaded = tl.broadcast_to(loaded[:, :, None], (ROWS, COLUMNS // GROUP, GROUP))
        values = tl.reshape(loaded, (ROWS, COLUMNS))
    else:
        group = (start + tl.arange(0, COLUMNS)) // GROUP
        values = tl.load(at[:, None] + group[None, :], mask=live[:, None] & (group < groups)[None, :], other=0)
    return values.to(tl.float32)


@triton.jit
def _steps(
    codes_ptr, zero_ptr, row, start, rows, eighth, groups, BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Q - z, fp32
    codes = _codes(codes_ptr, row, start, rows, eighth, BITS, ROWS, COLUMNS)
    if zero_ptr is None:
        return codes - (1 << (BITS - 1))
    else:
        return codes - _spread(zero_ptr, row, start, rows, groups, GROUP, ROWS, COLUMNS)


@triton.jit
def _weights(
    codes_ptr, scale_ptr, zero_ptr, offset_ptr, row, start, rows, eighth, groups, BITS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # W_hat of a tile in fp32; the caller rounds it once
    steps = _steps(codes_ptr, zero_ptr, row, start, rows, eighth, groups, BITS, GROUP, ROWS, COLUMNS)
    values = _spread(scale_ptr, row, start, rows, groups, GROUP, ROWS, COLUMNS) * steps
    if offset_ptr is not None:
        values += _spread(offset_ptr, row, start, rows, groups, GROUP, ROWS, COLUMNS)
    return values


@triton.jit(do_not_specialize=["tokens"])  # batches differ, a kernel needn't
def _forward_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, bias_ptr, y_ptr, tokens, out_features, in_features, eighth,
    groups, BITS: tl.constexpr, GROUP: tl.constexpr, BAND: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    down, across = _place(tl.cdiv(tokens, HIGH), tl.cdiv(out_features, WIDE), BAND)
    token = down * HIGH + tl.arange(0, HIGH)
    output = across * WIDE + tl.arange(0, WIDE)
    total = tl.zeros([HIGH, WIDE], tl.float32)
    for start in range(0, in_features, DEEP):
        x = _tile(x_ptr, token, start + tl.arange(0, DEEP), tokens, in_features, in_features)
        weight = _weights(
            codes_ptr, scale_ptr, zero_ptr, offset_ptr, output, start, out_features, eighth, groups,
            BITS, GROUP, WIDE, DEEP,
        )  # fmt: skip
        total = tl.dot(x, tl.trans(weight.to(x.dtype)), total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + output, mask=output < out_features, other=0.0).to(tl.float32)[None, :]
    at = token.to(tl.int64)[:, None] * out_features + output[None, :]
    mask = (token < tokens)[:, None] & (output < out_features)[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])  # batches differ, a kernel needn't
def _input_kernel(
    grad_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, grad_x_ptr, tokens, out_features, in_features, eighth,
    groups, BITS: tl.constexpr, GROUP: tl.constexpr, BAND: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    down, across = _place(tl.cdiv(tokens, HIGH), tl.cdiv(in_features, WIDE), BAND)
    token = down * HIGH + tl.arange(0, HIGH)
    total = tl.zeros([HIGH, WIDE], tl.float32)
    for start in range(0, out_features, DEEP):
        output = start + tl.arange(0, DEEP)
        grad = _tile(grad_ptr, token, output, tokens, out_features, out_features)
        weight = _weights(
            codes_ptr, scale_ptr, zero_ptr, offset_ptr, output, across * WIDE, out_features, eighth, groups,
            BITS, GROUP, DEEP, WIDE,
        )  # fmt: skip
        total = tl.dot(grad, weight.to(grad.dtype), total, input_precision="ieee")
    column = across * WIDE + tl.arange(0, WIDE)
    at = token.to(tl.int64)[:, None] * in_features + column[None, :]
    mask = (token < tokens)[:, None] & (column < in_features)[None, :]
    tl.store(grad_x_ptr + at, total.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "length"])  # batches differ, a kernel needn't
def _grid_kernel(
    grad_ptr, x_ptr, codes_ptr, zero_ptr, scale_sum_ptr, zero_sum_ptr, tokens, out_features, in_features, eighth,
    groups, pieces, length, BITS: tl.constexpr, GROUP: tl.constexpr, BAND: tl.constexpr, HIGH: tl.constexpr,
    WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    # a tile of columns is some whole groups, or one piece of one group; of each the part of the tokens that is its own
    SHARE: tl.constexpr = WIDE // GROUP if WIDE % GROUP == 0 else 1
    slots = groups * pieces
    down, across = _place(tl.cdiv(out_features, HIGH), tl.cdiv(slots, SHARE), BAND)
    output = down * HIGH + tl.arange(0, HIGH)
    start, end = across * WIDE, in_features
    if WIDE % GROUP != 0:
        start = across // pieces * GROUP + across % pieces * WIDE
        end = tl.minimum((across // pieces + 1) * GROUP, in_features)
    column = start + tl.arange(0, WIDE)
    total = tl.zeros([HIGH, WIDE], tl.float32)
    part = tl.program_id(1)
    for first in range(part * length, tl.minimum((part + 1) * length, tokens), DEEP):
        token = first + tl.arange(0, DEEP)
        grad = _tile(grad_ptr, token, output, tokens, out_features, out_features)
        x = _tile(x_ptr, token, column, tokens, end, in_features)
        total = tl.dot(tl.trans(grad), x, total, input_precision="ieee")
    # columns past the end have zeros in dW, and add nothing
    slot = across * SHARE + tl.arange(0, SHARE)
    at = (part * out_features + output.to(tl.int64))[:, None] * slots + slot[None, :]
    mask = (output < out_features)[:, None] & (slot < slots)[None, :]
    steps = _steps(codes_ptr, zero_ptr, output, start, out_features, eighth, groups, BITS, GROUP, HIGH, WIDE)
    terms = tl.reshape(total * steps, (HIGH, SHARE, WIDE // SHARE))
    tl.store(scale_sum_ptr + at, tl.sum(terms, 2), mask=mask)
    if zero_sum_ptr is not None:
        terms = tl.reshape(total, (HIGH, SHARE, WIDE // SHARE))
        tl.store(zero_sum_ptr + at, tl.sum(terms, 2), mask=mask)


@triton.jit
def _dense_kernel(
    codes_ptr, scale_ptr, zero_ptr, offset_ptr, weight_ptr, out_features, in_features, eighth, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    values = _weights(
        codes_ptr, scale_ptr, zero_ptr, offset_ptr, row, start, out_features, eighth, groups,
        BITS, GROUP, ROWS, COLUMNS,
    )  # fmt: skip
    at = row.to(tl.int64)[:, None] * in_features + column[None, :]
    mask = (row < out_features)[:, None] & (column < in_features)[None, :]
    tl.store(weight_ptr + at, values.to(weight_ptr.dtype.element_ty), mask=mask)


def multiply(x: Tensor, weight: Packed, bias: Tensor | None, through_dense: bool | None = None) -> Tensor:
    """y [..., out] of x [..., in]; `through_dense` overrules `writes_dense`."""
    if x.dtype not in DTYPES:
        return train.multiply(x, weight, bias)
    flat = train.rows_of(x)
    if writes_dense(len(flat)) if through_dense is None else through_dense:
        return functional.linear(x, dense(weight, x.dtype), bias)
    y = flat.new_empty(len(flat), weight.out_features)
    parts = flat, *_parts(weight), None if bias is None else bias.contiguous(), y
    _product(_forward_kernel, weight, y, *parts)
    return y.view(*x.shape[:-1], weight.out_features)


def multiply_back(grad: Tensor, weight: Packed, through_dense: bool | None = None) -> Tensor:
    """dX [..., in] of dY [..., out]; `through_dense` overrules `writes_dense`."""
    if grad.dtype not in DTYPES:
        return train.multiply_back(grad, weight)
    flat = train.rows_of(grad)
    if writes_dense(len(flat)) if through_dense is None else through_dense:
        return grad @ dense(weight, grad.dtype)
    grad_x = flat.new_empty(len(flat), weight.in_features)
    _product(_input_kernel, weight, grad_x, flat, *_parts(weight), grad_x)
    return grad_x.view(*grad.shape[:-1], weight.in_features)


def grid_gradients(grad: Tensor, x: Tensor, weight: Packed, need_zero: bool) -> tuple[Tensor, Tensor]:
    """ds and dz, fp32 [out, G]; no dW in memory, only a sum for each group's piece."""
    if x.dtype not in DTYPES:
        return train.grid_gradients(grad, x, weight, need_zero)
    grad, x = train.rows_of(grad), train.rows_of(x)
    tiles = EXACT if x.dtype == torch.float32 else GRID
    wide, pieces, share = _columns(weight.group_size, tiles.wide)
    out_features, groups = weight.scale.shape
    programs = triton.cdiv(out_features, tiles.high) * triton.cdiv(groups * pieces, share)
    parts = max(1, min(PROGRAMS // programs, len(x) // SHORTEST))
    length = triton.cdiv(triton.cdiv(len(x), parts), tiles.deep) * tiles.deep
    scale_sum = grad.new_empty(parts, out_features, groups, pieces, dtype=torch.float32)
    zero_sum = torch.empty_like(scale_sum) if need_zero else None
    codes, _, zero, _ = _parts(weight)
    with torch.cuda.device_of(x):
        _grid_kernel[(programs, parts)](
            grad, x, codes, zero, scale_sum, zero_sum, len(x), *_sizes(weight), pieces, length,
            **_constants(weight, tiles._replace(wide=wide)),
        )  # fmt: skip
    grad_scale = scale_sum.sum((0, -1))
    return grad_scale, grad_scale.new_empty(0) if zero_sum is None else -weight.scale * zero_sum.sum((0, -1))


def dense(weight: Packed, dtype: torch.dtype) -> Tensor:
    """W_hat [out, in] in `dtype`: the reference's bits, in one pass."""
    out_features, in_features = weight.out_features, weight.in_features
    values = torch.empty(out_features, in_features, dtype=dtype, device=weight.codes.device)
    programs = triton.cdiv(out_features, DENSE_ROWS), triton.cdiv(in_features, DENSE_COLUMNS)
    with torch.cuda.device_of(values):
        _dense_kernel[programs](
            *_parts(weight), values, *_sizes(weight), BITS=weight.bits, GROUP=weight.group_size,
            ROWS=DENSE_ROWS, COLUMNS=DENSE_COLUMNS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return values


def _product(kernel, weight: Packed, result: Tensor, *tensors: Tensor | None) -> None:  # type: ignore[no-untyped-def]
    """Run a kernel over the tiles of `result` [tokens, n]."""
    tokens, width = result.shape
    tiles = EXACT if result.dtype == torch.float32 else PRODUCT
    tiles = tiles._replace(high=min(tiles.high, max(16, triton.next_power_of_2(tokens))))
    programs = triton.cdiv(tokens, tiles.high) * triton.cdiv(width, tiles.wide)
    if programs:
        with torch.cuda.device_of(result):
            kernel[(programs,)](*tensors, tokens, *_sizes(weight), **_constants(weight, tiles))


def _columns(group: int, wide: int) -> tuple[int, int, int]:
    """Of a tile of dW: its columns, in how many pieces it takes a group, how many whole groups it holds."""
    if wide % group == 0:
        return wide, 1, wide // group
    wide = min(wide, triton.next_power_of_2(group))
    return wide, triton.cdiv(group, wide), 1


def _parts(weight: Packed) -> tuple[Tensor | None, ...]:
    parts = weight.codes, weight.scale, weight.zero, weight.offset
    return tuple(None if part is None else part.contiguous() for part in parts)


def _sizes(weight: Packed) -> tuple[int, int, int, int]:
    """Outputs, inputs, inputs over 8, groups: counted here, for Triton to see what divides them."""
    return weight.out_features, weight.in_features, triton.cdiv(weight.in_features, 8), weight.scale.shape[1]


def _constants(weight: Packed, tiles: Tiles) -> dict[str, int]:
    return {
        "BITS": weight.bits, "GROUP": weight.group_size, "BAND": BAND,
        "HIGH": tiles.high, "WIDE": tiles.wide, "DEEP": tiles.deep,
        "num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": False,
    }  # fmt: skip


@train.packed_matmul.register_kernel("cuda")
def _(x, codes, scale, zero, offset, bias, *layout):  # type: ignore[no-untyped-def]
    return multiply(x, train.as_packed(codes, scale, zero, offset, *layout), bias)


@train.packed_input_grad.register_kernel("cuda")
def _(grad, *parts):  # type: ignore[no-untyped-def]
    return multiply_back(grad, train.as_packed(*parts))


@train.packed_grid_grad.register_kernel("cuda")
def _(grad, x, codes, scale, zero, *layout):  # type: ignore[no-untyped-def]
    *sizes, need_zero = layout
    return grid_gradients(grad, x, train.as_packed(codes, scale, zero, None, *sizes), need_zero)
