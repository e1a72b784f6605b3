"""Fused Triton kernels that round activations token by token, registered for CUDA under the ops of
`planish.quant.activation`.

    s, z from a token's own ends,   x_hat = s * (clamp(round(x / s) + z, 0, 2^b - 1) - z)

Rounding by ordinary operations takes some 40 launches, forward and backward; these take one each, which read x twice
and three times, from the cache as a rule, and write once. The ops' eager definitions are the slow twins: the forward
equals them bit for bit, gradients are the same terms summed in another, fixed order. A program takes some rows and
walks them in chunks. Needs triton: `planish.kernels` imports it where there is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from planish.kernels.fakequant import LONGEST_CHUNK, TILE, _clamp, _load, _round
from planish.quant.activation import SMALLEST, round_tokens, round_tokens_backward


@triton.jit
def _ends(x_ptr, first, row, live, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    # what is masked is 0, which lies between the ends anyhow; reduced behind the loop: within it, Triton 3.6 fails to
    # compile where a zero point follows
    low = tl.zeros([ROWS, CHUNK], tl.float32)
    high = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in range(0, WIDTH, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        mask = live[:, None] & (column < WIDTH)
        x = _load(x_ptr, first * WIDTH + (row[:, None] * WIDTH + column), mask)
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
    return tl.min(low, 1), tl.max(high, 1)


@triton.jit
def _grid_of(low, high, TOP: tl.constexpr, LEVELS: tl.constexpr, SMALLEST: tl.constexpr, SYMMETRIC: tl.constexpr):
    if SYMMETRIC:
        scale = tl.maximum(tl.div_rn(tl.maximum(-low, high), tl.full(low.shape, LEVELS, tl.float32)), SMALLEST)
        zero = tl.full(low.shape, (TOP + 1) / 2, tl.float32)
    else:
        scale = tl.maximum(tl.div_rn(high - low, tl.full(low.shape, LEVELS, tl.float32)), SMALLEST)
        zero = _clamp(_round(tl.div_rn(-low, scale)), 0.0, TOP)
    return scale, zero


@triton.jit
def _forward_kernel(
    x_ptr, out_ptr, tokens, TOP: tl.constexpr, LEVELS: tl.constexpr, SMALLEST: tl.constexpr, SYMMETRIC: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    live = first + row < tokens
    low, high = _ends(x_ptr, first, row, live, WIDTH, ROWS, CHUNK)
    scale, zero = _grid_of(low, high, TOP, LEVELS, SMALLEST, SYMMETRIC)
    scale, zero = scale[:, None], zero[:, None]
    for start in range(0, WIDTH, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        at = first * WIDTH + (row[:, None] * WIDTH + column)
        mask = live[:, None] & (column < WIDTH)
        codes = _clamp(_round(tl.div_rn(_load(x_ptr, at, mask), scale)) + zero, 0.0, TOP)
        tl.store(out_ptr + at, (scale * (codes - zero)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, out_ptr, tokens, TOP: tl.constexpr, LEVELS: tl.constexpr, SMALLEST: tl.constexpr,
    SYMMETRIC: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    live = first + row < tokens
    low, high = _ends(x_ptr, first, row, live, WIDTH, ROWS, CHUNK)
    scale, zero = _grid_of(low, high, TOP, LEVELS, SMALLEST, SYMMETRIC)
    of_scale = tl.zeros([ROWS], tl.float32)
    outside = tl.zeros([ROWS], tl.float32)
    lows = tl.zeros([ROWS], tl.float32)
    highs = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        at = first * WIDTH + (row[:, None] * WIDTH + column)
        mask = live[:, None] & (column < WIDTH)
        x, grad = _load(x_ptr, at, mask), _load(grad_ptr, at, mask)
        ratio = tl.div_rn(x, scale[:, None])
        shifted = _round(ratio) + zero[:, None]
        codes = _clamp(shifted, 0.0, TOP)
        passed = grad * (shifted == codes).to(tl.float32)
        # masked elements have a gradient of 0 and add nothing
        of_scale += tl.sum(grad * (codes - zero[:, None]) - passed * ratio, 1)
        outside += tl.sum(passed - grad, 1)
        lows += tl.sum((mask & (x == low[:, None])).to(tl.float32), 1)
        highs += tl.sum((mask & (x == high[:, None])).to(tl.float32), 1)
    if SYMMETRIC:
        share = of_scale / LEVELS
        lower = (-low > high).to(tl.float32)
        of_low, of_high = -share * lower, share * (1 - lower)
    else:
        of_high = (of_scale + outside * low / scale) / LEVELS
        of_low = -of_high - outside
    of_low, of_high = of_low / tl.maximum(lows, 1.0), of_high / tl.maximum(highs, 1.0)
    for start in range(0, WIDTH, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        at = first * WIDTH + (row[:, None] * WIDTH + column)
        mask = live[:, None] & (column < WIDTH)
        x, grad = _load(x_ptr, at, mask), _load(grad_ptr, at, mask)
        shifted = _round(tl.div_rn(x, scale[:, None])) + zero[:, None]
        passed = grad * (shifted == _clamp(shifted, 0.0, TOP)).to(tl.float32)
        passed += (x == low[:, None]).to(tl.float32) * of_low[:, None]
        passed += (x == high[:, None]).to(tl.float32) * of_high[:, None]
        tl.store(out_ptr + at, passed.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, bits: int, symmetric: bool, *tensors: Tensor) -> None:  # type: ignore[no-untyped-def]
    """Run a kernel over all rows of tensors [tokens, n]."""
    tokens, width = tensors[0].shape
    chunk = min(triton.next_power_of_2(width), LONGEST_CHUNK)
    rows = TILE // chunk
    if tokens:
        with torch.cuda.device_of(tensors[0]):
            kernel[(triton.cdiv(tokens, rows),)](
                *tensors, tokens, TOP=float(2**bits - 1),
                LEVELS=float(2 ** (bits - 1) - 1 if symmetric else 2**bits - 1), SMALLEST=SMALLEST,
                SYMMETRIC=symmetric, WIDTH=width, ROWS=rows, CHUNK=chunk, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def forward(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """`planish::round_tokens` in one launch; arguments and result as there."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(_forward_kernel, bits, symmetric, x, out)
    return out


def backward(grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """`planish::round_tokens_backward` in one launch; arguments and result as there."""
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    _launch(_backward_kernel, bits, symmetric, grad, x, out)
    return out


round_tokens.register_kernel("cuda")(forward)
round_tokens_backward.register_kernel("cuda")(backward)
