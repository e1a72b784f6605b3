"""Training on packed weights: a product with gradients for x, the scale and the zero point.

    y  = x W_hat^T + b,   W_hat = s * (Q - z) + o, rounded once to the dtype of x
    dX = dY W_hat
    ds = sum of dW * (Q - z),   dz = -sum of s * dW   over each group,   dW = dY^T X in fp32

Codes don't learn. The one rounding of W_hat is passed straight through. A graph holds x (only if s or z
learns) and the packed weight, never W_hat or dW: W_hat is decoded anew in the backward, dW exists a block of
rows at a time. These definitions are for any device; Triton kernels for CUDA register themselves in
`kernels.triton_train`. Knows nothing of layers, nor of what trains them.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from planish.kernels import reference
from planish.kernels.pack import Packed, unpack_codes
from planish.qtensor import midpoint, to_groups

BLOCK = 2**20  # weights whose gradient exists at a time: 4 MiB, and as much again for its products


def supports(weight: Packed | None, x: Tensor) -> bool:
    """Whatever needs a gradient for x: the weight may be frozen."""
    return torch.is_grad_enabled() and x.requires_grad


def matmul(x: Tensor, weight: Packed, bias: Tensor | None, cache: dict[str, Tensor]) -> Tensor:
    """y = x W_hat^T + b, differentiable in x, bias, `weight.scale` and `weight.zero`.

    Args:
        x: [..., in], any float dtype; under autocast it is cast as for nn.Linear.
        weight: its scale fp16, or fp32 holding fp16 values (`store`); its zero uint8, or fp32 integers of that range.
        bias: float [out] or None.
        cache: nothing is kept in it.
    Returns:
        [..., out] in the dtype of x; on a CPU the bits of the reference.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if bias is None else bias.to(x.dtype)
    layout = weight.bits, weight.group_size, weight.in_features
    return packed_matmul(x, weight.codes, weight.scale, weight.zero, weight.offset, bias, *layout)


def multiply(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """y [..., out] of x [..., in], by the reference's dense weight."""
    return functional.linear(x, dense(weight, x.dtype), bias)


def multiply_back(grad: Tensor, weight: Packed) -> Tensor:
    """dX [..., in] of dY [..., out], in its dtype."""
    return grad @ dense(weight, grad.dtype)


def grid_gradients(grad: Tensor, x: Tensor, weight: Packed, need_zero: bool) -> tuple[Tensor, Tensor]:
    """ds and dz, fp32 [out, G], of dY [..., out] and x [..., in]; dz is empty unless it is needed."""
    grad, x = rows_of(grad), rows_of(x).float()
    grad_scale = torch.empty_like(weight.scale, dtype=torch.float32)
    grad_zero = torch.empty_like(grad_scale) if need_zero else grad_scale.new_empty(0)
    step = max(1, BLOCK // weight.in_features)
    for start in range(0, weight.out_features, step):
        rows = slice(start, start + step)
        grad_weight = to_groups(grad[:, rows].float().T @ x, weight.group_size)
        codes = to_groups(unpack_codes(weight.codes[rows], weight.bits, weight.in_features), weight.group_size)
        zero = midpoint(weight.bits) if weight.zero is None else weight.zero[rows].float().unsqueeze(-1)
        grad_scale[rows] = (grad_weight * (codes.float() - zero)).sum(-1)
        if need_zero:
            grad_zero[rows] = -weight.scale[rows] * grad_weight.sum(-1)
    return grad_scale, grad_zero


def dense(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The reference's W_hat [out, in]; a scale and a zero that learn hold values that can be stored as they are."""
    zero = None if weight.zero is None else weight.zero.to(torch.uint8)
    return reference.dense(dataclasses.replace(weight, scale=weight.scale.half(), zero=zero), dtype)


def rows_of(values: Tensor) -> Tensor:
    """[..., n] -> contiguous [rows, n]."""
    return values.reshape(-1, values.shape[-1]).contiguous()


def as_packed(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Packed:
    """A Packed from the flat arguments that an op takes."""
    return Packed(
        codes=codes,
        scale=scale,
        zero=zero,
        offset=offset,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
    )


@torch.library.custom_op("planish::packed_matmul", mutates_args=())
def packed_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """y = x W_hat^T + b; gradients for x, scale, zero and bias, none for the offset.

    Args:
        x: [..., in], any float dtype.
        codes: uint8 [out, bits * ceil(in / 8)], as in `Packed`.
        scale: [out, G], fp16 or fp32 holding fp16 values.
        zero: [out, G], uint8 or fp32 integers; None for the symmetric constant.
        offset: fp32 [out, G] in weight units, or None.
        bias: [out] in the dtype of x, or None.
        bits, group_size, in_features: as in `Packed`.
    """
    return multiply(x, as_packed(codes, scale, zero, offset, bits, group_size, in_features), bias)


@packed_matmul.register_fake
def _(x: Tensor, codes: Tensor, *rest) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("planish::packed_input_grad", mutates_args=())
def packed_input_grad(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """dX = dY W_hat [..., in], in the dtype of dY [..., out]; the rest as in `packed_matmul`."""
    return multiply_back(grad, as_packed(codes, scale, zero, offset, bits, group_size, in_features))


@packed_input_grad.register_fake
def _(grad: Tensor, *parts) -> Tensor:  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], parts[-1])


@torch.library.custom_op("planish::packed_grid_grad", mutates_args=())
def packed_grid_grad(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    need_zero: bool,
) -> tuple[Tensor, Tensor]:
    """(ds, dz), fp32 [out, G], of dY [..., out] and x [..., in]; dz is empty unless it is needed."""
    return grid_gradients(grad, x, as_packed(codes, scale, zero, None, bits, group_size, in_features), need_zero)


@packed_grid_grad.register_fake
def _(grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, *rest) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    grad_scale = torch.empty_like(scale, dtype=torch.float32)
    return grad_scale, torch.empty_like(grad_scale) if rest[-1] else grad_scale.new_empty(0)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, codes, scale, zero, offset, _, *ctx.layout = inputs
    grid_learns = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(x if grid_learns else None, codes, scale, zero, offset)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, codes, scale, zero, offset = ctx.saved_tensors
    need_x, _, need_scale, need_zero, _, need_bias = ctx.needs_input_grad[:6]
    grad_x = packed_input_grad(grad, codes, scale, zero, offset, *ctx.layout) if need_x else None
    grad_scale = grad_zero = None
    if need_scale or need_zero:
        grad_scale, grad_zero = packed_grid_grad(grad, x, codes, scale, zero, *ctx.layout, need_zero)
    grad_bias = rows_of(grad).sum(0) if need_bias else None
    grads = grad_x, None, grad_scale if need_scale else None, grad_zero if need_zero else None, None, grad_bias
    return *grads, None, None, None


packed_matmul.register_autograd(_backward, setup_context=_save)
