"""Decoding on a CPU: torch's own int4 matrix-vector product, for a few rows of bf16 activations.

    W_hat = s * (q - 8) + t       q in 0..15, s and t in bf16 for each group

A code becomes q = Q - z + 8 and t = 0 where that fits 4 bits, which it does for every symmetric grid and
for all of 2 and 3 bits; otherwise q = Q and t = (8 - z) * s. So 2 and 3 bits take the room of 4 here.
Matches the reference within TOLERANCE: scales are rounded to bf16, and W_hat itself isn't; it is as near to
the exact product as the reference is. For many rows (a prompt, perplexity) the reference is taken. In fp32
torch's op is a scalar loop, slower than a dense product, so it is not used.
"""

import torch
from torch import Tensor

from planish.kernels.pack import Packed
from planish.qtensor import midpoint

MAX_ROWS = 16
TOLERANCE = 2**-8  # of |x| |W_hat|^T, element by element
GROUPS = (256, 128, 64, 32)  # that torch's op knows, a longer group being several of these
OUT_MULTIPLE = 16
VECTOR_UNITS = ("AVX2", "AVX512")  # elsewhere the op is a scalar loop


def supports(weight: Packed, x: Tensor) -> bool:
    """A few rows of bf16 on a CPU with vector units, no gradient, not while a graph is traced."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    few = 0 < x.numel() <= MAX_ROWS * weight.in_features
    if not few or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return (
        weight.bits <= 4
        and weight.offset is None
        and _group(weight) is not None
        and weight.out_features % OUT_MULTIPLE == 0
        and torch.backends.cpu.get_cpu_capability() in VECTOR_UNITS
    )


def matmul(x: Tensor, weight: Packed, bias: Tensor | None, cache: dict[str, Tensor]) -> Tensor:
    """x [..., in] bf16 -> [..., out] bf16; what the op wants of the weight is kept in `cache`."""
    group = _group(weight)
    assert group is not None
    if not cache:
        cache["int4"], cache["grid"] = _prepare(weight, group)
    return _multiply(x, bias, cache, weight.in_features)


def again(x: Tensor, bias: Tensor | None, cache: dict[str, Tensor], in_features: int) -> Tensor | None:
    """The product of a layer that `matmul` has prepared, or None where another kernel may be asked for.

    What `supports` says of the weight holds still; a token goes through hundreds of layers, so that asking it anew
    costs more than the products of a small model.
    """
    plain = x.dtype == torch.bfloat16 and not x.is_cuda and not torch.compiler.is_compiling()
    few = 0 < x.numel() <= MAX_ROWS * in_features
    if not plain or not few or "int4" not in cache or (x.requires_grad and torch.is_grad_enabled()):
        return None
    return _multiply(x, bias, cache, in_features)


def _multiply(x: Tensor, bias: Tensor | None, cache: dict[str, Tensor], in_features: int) -> Tensor:
    grid = cache["grid"]
    flat = x.reshape(-1, in_features).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, cache["int4"], in_features // grid.shape[0], grid)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias.to(y.dtype)


def _group(weight: Packed) -> int | None:
    """The longest group that the op knows and that divides the weight's; None if there is none."""
    if weight.in_features % weight.group_size:
        return None
    return next((group for group in GROUPS if weight.group_size % group == 0), None)


def _prepare(weight: Packed, group: int) -> tuple[Tensor, Tensor]:
    """Codes as torch's op packs them, and its grid [in / group, out, 2] of s and t in bf16."""
    q = weight.qtensor()
    scale = q.scale.float()
    zero = torch.full_like(scale, midpoint(q.bits)) if q.zero is None else q.zero.float()
    shift = torch.zeros_like(zero) if q.bits == 4 and q.zero is not None else 8 - zero
    codes = q.codes.int() + shift.int().repeat_interleave(q.group_size, dim=1)
    grid = torch.stack([scale, (8 - zero - shift) * scale], dim=-1).bfloat16()
    grid = grid.repeat_interleave(q.group_size // group, dim=1).transpose(0, 1).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), grid
