"""Integer products: rounded activations times weights of 8 bits or fewer with one scale a row, in int8 x int8.

    y = s_x s_w (sum (Q_x - z_x) (Q_w - z_w)) + b
      = s_x s_w (sum q_x q_w - z_x sum q_w - z_w sum q_x + n z_x z_w) + b,    q = Q - 2^(bits-1), z likewise

The sums are exact in int32 (n up to 32,768), so this is what rounded activations and weights stand for without the
roundings of a float product. Definitions for any device, with torch's own int8 product; Triton kernels for CUDA
register themselves under the ops. 4 and 6 bits are widened once and kept. Knows nothing of layers.
"""

import torch
from torch import Tensor

from planish.kernels.pack import Packed
from planish.qtensor import midpoint
from planish.quant.activation import quantize_tokens
from planish.quant.hadamard import turn
from planish.scheme import Activations

LONGEST = 32_768  # inputs of a row, beyond which int32 may overflow
FEWEST_ROWS = 32  # torch's product on CUDA takes no fewer than 17


def supports(weight: Packed, how: Activations, x: Tensor) -> bool:
    """One scale a row, no offset, nothing that needs a gradient or is being traced."""
    rows, columns = weight.out_features, weight.in_features
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()) or not x.numel():
        return False
    fits = weight.group_size == columns <= LONGEST and rows % 8 == 0 and columns % 8 == 0
    return fits and how.bits <= 8 and weight.offset is None and not weight.scale.requires_grad


def matmul(x: Tensor, weight: Packed, how: Activations, bias: Tensor | None, cache: dict[str, Tensor]) -> Tensor:
    """x [..., in], any float dtype -> [..., out] in that dtype; the widened weight is kept in `cache`."""
    if "int8" not in cache:
        cache["int8"], cache["sums"], cache["zeros"] = widened(weight)
    rows = (turn(x) if how.turned else x).reshape(-1, weight.in_features)
    codes, scale, grid = int8_rows(rows, how.bits, how.symmetric)
    y = int8_linear(
        codes, scale, grid, cache["int8"], weight.scale.flatten(), cache["sums"], cache["zeros"], bias, x.dtype
    )
    return y.view(*x.shape[:-1], weight.out_features)


def widened(weight: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """q_w int8 [out, in], its sums and its z int32 [out]."""
    q, middle = weight.qtensor(), midpoint(weight.bits)
    codes = (q.codes.to(torch.int16) - middle).to(torch.int8)
    zeros = torch.zeros_like(codes[:, 0], dtype=torch.int32) if q.zero is None else q.zero.flatten().int() - middle
    return codes, codes.sum(1, dtype=torch.int32), zeros


@torch.library.custom_op("planish::int8_rows", mutates_args=())
def int8_rows(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q_x int8 [tokens, in], s_x fp32 [tokens], and (z_x, sum of q_x) int32 [tokens, 2]."""
    codes, scale, zero = quantize_tokens(x, Activations(bits=bits, symmetric=symmetric))
    codes = (codes.to(torch.int16) - midpoint(bits)).to(torch.int8)
    grid = torch.stack([zero.flatten().int() - midpoint(bits), codes.sum(1, dtype=torch.int32)], 1)
    return codes, scale.flatten(), grid


@torch.library.custom_op("planish::int8_linear", mutates_args=())
def int8_linear(
    codes: Tensor,
    scale: Tensor,
    grid: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    sums: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y [tokens, out] of what `int8_rows` and `widened` give."""
    return scaled(product(codes, weight), scale, grid, weight_scale, sums, zeros, bias, codes.shape[1], dtype)


def product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes [tokens, in] weight^T, int32 [tokens, out], by torch."""
    short = FEWEST_ROWS - len(codes) if codes.device.type == "cuda" else 0
    if short > 0:
        return torch._int_mm(torch.nn.functional.pad(codes, (0, 0, 0, short)), weight.T)[: len(codes)]
    return torch._int_mm(codes, weight.T)


def scaled(
    total: Tensor,
    scale: Tensor,
    grid: Tensor,
    weight_scale: Tensor,
    sums: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    inputs: int,
    dtype: torch.dtype,
) -> Tensor:
    """What the sums of products int32 [tokens, out] stand for."""
    zero, total_x = grid[:, :1], grid[:, 1:]
    total = total - zero * sums - zeros * total_x + inputs * zero * zeros
    y = scale.unsqueeze(1) * weight_scale.float() * total.float()
    return (y if bias is None else y + bias.float()).to(dtype)
