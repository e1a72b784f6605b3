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

from planish.qtensor import decode, encode, midpoint
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


def token_ranges(x: Tensor, how: Activations) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., n] as rows [tokens, 1, n], and their s and z, fp32 [tokens, 1, 1]."""
    rows = x.reshape(-1, 1, x.shape[-1])
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)  # aminmax has no gradient before torch 2.12
    return rows, *token_grid(low.float().clamp(max=0), high.float().clamp(min=0), how.bits, how.symmetric)


@torch.library.custom_op("planish::round_tokens", mutates_args=())
def round_tokens(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """x_hat of x [tokens, n], in its dtype. A kernel for CUDA registers itself in `kernels.tokens`."""
    rows, scale, zero = token_ranges(x, Activations(bits=bits, symmetric=symmetric))
    return decode(encode(rows, scale, zero, bits), scale, zero).to(x.dtype).view(x.shape)


@round_tokens.register_fake
def _(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("planish::round_tokens_backward", mutates_args=())
def round_tokens_backward(grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """dx, in the dtype of x: straight through where no code was clamped, and by s and z at the ends of a token.

    With A = sum of g * ((Q - z) - inside * x / s) and C = -sum of g * outside: of an asymmetric range
    d high = (A + C * low / s) / (2^b - 1) and d low = -d high - C; of a symmetric one A / (2^(b-1) - 1), at its
    farther end. Elements that are an end together share it.
    """
    rows, scale, zero = token_ranges(x, Activations(bits=bits, symmetric=symmetric))
    values, grad = rows.float(), grad.float().view(rows.shape)
    shifted = torch.round(values / scale) + zero
    codes = shifted.clamp(0, 2**bits - 1)
    passed = grad * (shifted == codes)
    of_scale = (grad * (codes - zero) - passed * (values / scale)).sum(-1, keepdim=True)
    low = values.amin(-1, keepdim=True).clamp(max=0)
    high = values.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        share = of_scale / (2 ** (bits - 1) - 1)
        of_low, of_high = -share * (-low > high), share * (-low <= high)
    else:
        outside = (passed - grad).sum(-1, keepdim=True)
        of_high = (of_scale + outside * low / scale) / (2**bits - 1)
        of_low = -of_high - outside
    for end, of_end in ((low, of_low), (high, of_high)):
        there = values == end
        passed = passed + there * (of_end / there.sum(-1, keepdim=True).clamp(min=1))
    return passed.to(x.dtype).view(x.shape)


@round_tokens_backward.register_fake
def _(grad: Tensor, x: Tensor, bits: int, symmetric: bool) -> Tensor:
    return torch.empty_like(x)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, ctx.bits, ctx.symmetric = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return round_tokens_backward(grad.contiguous(), *ctx.saved_tensors, ctx.bits, ctx.symmetric), None, None


round_tokens.register_autograd(_backward, setup_context=_save)


def fake_quantize_tokens(x: Tensor, how: Activations) -> Tensor:
    """x_hat in the dtype of x, with straight-through gradients; x itself where activations stay in 16 bits."""
    if how.bits == 16 or not x.numel():
        return x
    x = turn(x) if how.turned else x
    return round_tokens(x.reshape(-1, x.shape[-1]), how.bits, how.symmetric).view(x.shape)


def quantize_tokens(x: Tensor, how: Activations) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [tokens, n], s and z fp32 [tokens, 1]: what `fake_quantize_tokens` stands for."""
    x = turn(x) if how.turned else x
    rows, scale, zero = token_ranges(x, how)
    return encode(rows, scale, zero, how.bits).squeeze(1).to(torch.uint8), scale.squeeze(1), zero.squeeze(1)
