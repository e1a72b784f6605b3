"""Fused Triton kernels of the fake quantizer, registered for CUDA under the ops of `planish.qtensor`.

    Q = clamp(round(W / s + V) + z, 0, 2^bits - 1),   W_hat = s * (Q - z)

The ops' eager definitions are the slow twins: the forward equals them bit for bit (IEEE division, round
half to even, no fused multiply-add, one rounding to the compute dtype), and so do dW and dV; ds and dz
are the same terms summed in another, fixed order. Block sizes are fixed, never timed, so that a run
repeats itself. A program takes a tile of groups; a group longer than a tile's row is walked in chunks.

Knows nothing of what the gradients are for. Needs triton: `planish.kernels` imports it where there is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from planish.qtensor import fake_quantize, fake_quantize_backward

TILE = 4096  # elements of a program: 32 a thread with 4 warps
LONGEST_CHUNK = 2048


@triton.jit
def _clamp(values, low: tl.constexpr, high: tl.constexpr):
    # NaN must come through, as it does in torch: a fit sees it in its loss
    return tl.clamp(values, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round(steps):
    # adding 1.5 * 2^23 leaves no fraction bits, so that the addition itself rounds half to even; the clamp
    # keeps that true, and whatever it moves would be clamped to the same code anyway
    return (_clamp(steps, -1048576.0, 1048576.0) + 12582912.0) - 12582912.0


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _grid(scale_ptr, zero_ptr, at, mask):
    # loaded as vectors and then spread: a [ROWS, 1] load is repeated for every column
    scale = tl.load(scale_ptr + at, mask=mask, other=1.0)
    zero = tl.load(zero_ptr + at, mask=mask, other=0.0)
    return scale[:, None], zero[:, None]


@triton.jit
def _shifted(ratio, rounding_ptr, at, mask, zero):
    # the code before it is clamped: round(W / s + V) + z
    if rounding_ptr is not None:
        ratio += _load(rounding_ptr, at, mask)
    return _round(ratio) + zero


@triton.jit
def _forward_kernel(
    weight_ptr, rounding_ptr, scale_ptr, zero_ptr, out_ptr, groups, TOP: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    live = first + row < groups
    scale, zero = _grid(scale_ptr, zero_ptr, first + row, live)
    for start in range(0, GROUP, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        at = first * GROUP + (row[:, None] * GROUP + column)
        mask = live[:, None] & (column < GROUP)
        ratio = tl.div_rn(_load(weight_ptr, at, mask), scale)
        codes = _clamp(_shifted(ratio, rounding_ptr, at, mask, zero), 0.0, TOP)
        tl.store(out_ptr + at, (scale * (codes - zero)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_ptr, weight_ptr, rounding_ptr, scale_ptr, zero_ptr, grad_weight_ptr, grad_rounding_ptr, grad_scale_ptr,
    grad_zero_ptr, groups, TOP: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    live = first + row < groups
    scale, zero = _grid(scale_ptr, zero_ptr, first + row, live)
    grad_scale = tl.zeros([ROWS], tl.float32)
    grad_zero = tl.zeros([ROWS], tl.float32)
    for start in range(0, GROUP, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        at = first * GROUP + (row[:, None] * GROUP + column)
        mask = live[:, None] & (column < GROUP)
        grad = _load(grad_ptr, at, mask)
        ratio = tl.div_rn(_load(weight_ptr, at, mask), scale)
        shifted = _shifted(ratio, rounding_ptr, at, mask, zero)
        codes = _clamp(shifted, 0.0, TOP)
        passed = grad * (shifted == codes).to(tl.float32)
        if grad_weight_ptr is not None:
            tl.store(grad_weight_ptr + at, passed, mask=mask)
        if grad_rounding_ptr is not None:
            tl.store(grad_rounding_ptr + at, passed * scale, mask=mask)
        # masked elements have a gradient of 0 and add nothing
        grad_scale += tl.sum(grad * (codes - zero) - passed * ratio, 1)
        grad_zero += tl.sum((passed - grad) * scale, 1)
    tl.store(grad_scale_ptr + first + row, grad_scale, mask=live)
    tl.store(grad_zero_ptr + first + row, grad_zero, mask=live)


def _launch(kernel, like: Tensor, bits: int, *tensors: Tensor | None) -> None:  # type: ignore[no-untyped-def]
    """Run a kernel over all groups of `like` [out, G, g]."""
    group = like.shape[-1]
    groups = like.numel() // group
    chunk = min(triton.next_power_of_2(group), LONGEST_CHUNK)
    rows = TILE // chunk
    if groups:
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(groups, rows),)](
                *tensors, groups, TOP=float(2**bits - 1), GROUP=group, ROWS=rows, CHUNK=chunk, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip


def forward(
    weight: Tensor, rounding: Tensor | None, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """`planish::fake_quantize` in one pass; arguments and result as in `qtensor.fake_quantize`."""
    weight, scale, zero = weight.contiguous(), scale.contiguous(), zero.contiguous()
    out = torch.empty_like(weight, dtype=dtype)
    _launch(_forward_kernel, weight, bits, weight, _contiguous(rounding), scale, zero, out)
    return out


def backward(
    grad: Tensor, weight: Tensor, rounding: Tensor | None, scale: Tensor, zero: Tensor, bits: int, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`planish::fake_quantize_backward` in one pass; arguments and results as in `qtensor`."""
    grad, weight, scale, zero = grad.contiguous(), weight.contiguous(), scale.contiguous(), zero.contiguous()
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if need_weight else None
    grad_rounding = None if rounding is None else torch.empty_like(weight, dtype=torch.float32)
    grad_scale, grad_zero = torch.empty_like(scale), torch.empty_like(zero)
    arguments = grad, weight, _contiguous(rounding), scale, zero, grad_weight, grad_rounding, grad_scale, grad_zero
    _launch(_backward_kernel, weight, bits, *arguments)
    return (_or_empty(grad_weight, scale), _or_empty(grad_rounding, scale), grad_scale, grad_zero)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


fake_quantize.register_kernel("cuda")(forward)
fake_quantize_backward.register_kernel("cuda")(backward)
