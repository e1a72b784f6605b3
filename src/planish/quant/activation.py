"""Activations rounded as they come: each token by its own range (dynamic, per token).

    s = (max(x, 0) - min(x, 0)) / (2^b - 1),   z = round(-min(x, 0) / s)        asymmetric
    s = max |x| / (2^(b-1) - 1),               z = 2^(b-1)                      symmetric
    Q = clamp(round(x / s) + z, 0, 2^b - 1),   x_hat = s * (Q - z)

The last dimension is what shares a range: a linear's input, or one head of a query, key or value. s stays in fp32,
since it is never stored: a token's values may be far below what fp16 can tell apart. Training, evaluation and
packed layers call the same two functions. Knows nothing of layers.
"""

import torch
from torch import Tensor

from planish.qtensor import encode, fake_quantize, midpoint
from planish.quant.hadamard import turn
from planish.scheme import Activations

SMALLEST = 1e-12  # of a scale: a token of zeros has one too


@torch.library.custom_op("planish::token_grid", mutates_args=())
def token_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """s and z of tokens from low <= 0 to high >= 0, fp32; opaque, since compilers divide in their own ways."""
    if symmetric:
        reach = torch.maximum(-low, high)
        scale = (reach / torch.full_like(reach, 2 ** (bits - 1) - 1)).clamp(min=SMALLEST)
        return scale, torch.full_like(scale, midpoint(bits))
    # by a number, a GPU would multiply by its inverse
    scale = ((high - low) / torch.full_like(low, 2**bits - 1)).clamp(min=SMALLEST)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


@token_grid.register_fake
def _(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(low), torch.empty_like(low)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    low, high, ctx.bits, ctx.symmetric = inputs
    ctx.save_for_backward(low, high, output[0])


def _backward(ctx, grad_scale, grad_zero):  # type: ignore[no-untyped-def]
    low, high, scale = ctx.saved_tensors
    if ctx.symmetric:
        share = grad_scale / (2 ** (ctx.bits - 1) - 1)
        lower = -low > high
        return -share * lower, share * ~lower, None, None
    grad_scale = (grad_scale + grad_zero * low / scale.square()) / (2**ctx.bits - 1)
    return -grad_scale - grad_zero / scale, grad_scale, None, None


token_grid.register_autograd(_backward, setup_context=_save)


def token_ranges(x: Tensor, how: Activations) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., n] as rows [tokens, 1, n], and their s and z, fp32 [tokens, 1, 1]."""
    rows = x.reshape(-1, 1, x.shape[-1])
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)  # aminmax has no gradient before torch 2.12
    return rows, *token_grid(low.float().clamp(max=0), high.float().clamp(min=0), how.bits, how.symmetric)


def fake_quantize_tokens(x: Tensor, how: Activations) -> Tensor:
    """x_hat in the dtype of x, with straight-through gradients; x itself where activations stay in 16 bits."""
    if how.bits == 16 or not x.numel():
        return x
    x = turn(x) if how.turned else x
    rows, scale, zero = token_ranges(x, how)
    return fake_quantize(rows, None, scale, zero, how.bits, x.dtype).view(x.shape)


def quantize_tokens(x: Tensor, how: Activations) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [tokens, n], s and z fp32 [tokens, 1]: what `fake_quantize_tokens` stands for."""
    x = turn(x) if how.turned else x
    rows, scale, zero = token_ranges(x, how)
    return encode(rows, scale, zero, how.bits).squeeze(1).to(torch.uint8), scale.squeeze(1), zero.squeeze(1)
