"""QTensor and the codec: the only place where the equation of quantization is computed.

    Q     = clamp(round((W - o) / s + V) + z, 0, 2^bits - 1)     codes
    W_hat = s * (Q - z) + o                                      what the layer multiplies by

V is a rounding offset (zero in most methods), o an offset in weight units (absent in most). `round` is
half to even and comes before z is added. s may be negative. Training forward, conversion, reference
kernel, formats and tests all call `encode`, `decode`, `fake_quantize` and `store`; so what was trained
is what is deployed, bit for bit.

Shapes: a weight [out, in] is seen as groups [out, G, g], padded with zeros at the right end of a row if
g doesn't divide `in`; grids (scale, zero, offset) are [out, G, 1] beside it. Columns may lie in an order of
their own (act-order): groups are then of the codes' columns, and `dequantize` puts them back.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from planish.scheme import SHARING, Scheme

# fp16 keeps 7 significant bits at this size; a smaller scale loses the grid itself
SCALE_FLOOR = 1e-5
# of a QTensor
PARTS = ("codes", "scale", "zero", "offset", "order")

Weight = TypeVar("Weight")


@dataclass(frozen=True, kw_only=True, eq=False)
class QTensor:
    """A quantized weight matrix, unpacked: with the codec, the reference semantics of everything else.

    Args:
        codes: uint8 [out, in], each in [0, 2^bits - 1].
        scale: fp16 [out, G], any sign.
        zero: uint8 [out, G] in [0, 2^bits - 1], or None for the symmetric constant 2^(bits-1).
        offset: fp32 [out, G] in weight units, or None.
        bits: bits of a code.
        group_size: inputs of a group; the last group of a row may be shorter.
        order: int32 [in], a permutation: column j of the codes is column order[j] of the weight; None if each
            is its own.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None = None
    bits: int
    group_size: int
    order: Tensor | None = None

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        grid = (out_features, -(-in_features // self.group_size))
        assert self.codes.dtype == torch.uint8 and self.scale.dtype == torch.float16
        assert self.scale.shape == grid, (self.scale.shape, grid)
        assert self.zero is None or (self.zero.dtype == torch.uint8 and self.zero.shape == grid)
        assert self.offset is None or (self.offset.dtype == torch.float32 and self.offset.shape == grid)
        assert self.order is None or (self.order.dtype == torch.int32 and self.order.shape == (in_features,))

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.zero is None

    def to(self, device: torch.device | str) -> "QTensor":
        """The same on another device."""
        return moved(self, device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_hat [out, in] in `dtype`, computed in fp32 and rounded once."""
        codes = to_groups(self.codes, self.group_size)
        zero = torch.full_like(self.scale, midpoint(self.bits)) if self.zero is None else self.zero
        offset = None if self.offset is None else self.offset.unsqueeze(-1)
        values = decode(codes, self.scale.unsqueeze(-1), zero.unsqueeze(-1), offset)
        return own_columns(from_groups(values, self.shape[1]).to(dtype), self.order)

    @property
    def scheme(self) -> Scheme:
        """How it is stored; one group a row is written as 'pc'."""
        whole = self.group_size == self.shape[1]
        return Scheme(bits=self.bits, group_size=None if whole else self.group_size, symmetric=self.symmetric)

    def equal(self, other: "QTensor") -> bool:
        """True if every code, scale, zero, offset and column is the same bit for bit."""
        if (self.bits, self.group_size, self.shape) != (other.bits, other.group_size, other.shape):
            return False
        return same_parts(self, other)


def beside_codes(weight: Any) -> dict[str, Any]:
    """All of a QTensor but its codes, by name; of what holds the same with its codes packed too."""
    return {name: getattr(weight, name) for name in ("scale", "zero", "offset", "order", "bits", "group_size")}


def same_parts(one: Any, other: Any) -> bool:
    """Are all tensors of two QTensors, or of two that hold the same with their codes packed, equal?"""
    pairs = ((getattr(one, name), getattr(other, name)) for name in PARTS)
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


def moved(weight: Weight, device: torch.device | str) -> Weight:
    """A QTensor, or what holds the same with its codes packed, on another device."""
    parts = {name: getattr(weight, name) for name in PARTS}
    there = {name: part.to(device) for name, part in parts.items() if part is not None}
    return dataclasses.replace(weight, **there)  # type: ignore[type-var]


def midpoint(bits: int) -> int:
    """Zero point of a symmetric grid, 2^(bits-1): one level more below zero than above."""
    return 2 ** (bits - 1)


def to_groups(weight: Tensor, group_size: int) -> Tensor:
    """[out, in] -> [out, G, g]; a short last group is padded with zeros."""
    short = -weight.shape[1] % group_size
    if short:
        weight = functional.pad(weight, (0, short))
    return weight.reshape(weight.shape[0], -1, group_size)


def from_groups(groups: Tensor, in_features: int) -> Tensor:
    """[out, G, g] -> [out, in]; what was padded is dropped."""
    return groups.flatten(1)[:, :in_features]


def own_columns(values: Tensor, order: Tensor | None) -> Tensor:
    """[out, in] in the order of a QTensor's codes -> in the weight's own: column j becomes column order[j]."""
    return values if order is None else values.index_select(1, torch.argsort(order))


@torch.library.custom_op("planish::store", mutates_args=())
def store(scale: Tensor) -> Tensor:
    """A scale as it will be stored: |s| at least SCALE_FLOOR, rounded to fp16; returned in fp32.

    Opaque on purpose: a compiler elides a plain half().float() round trip, and what was trained would
    not be what is deployed. Its gradient is the identity (straight through).
    """
    floored = torch.copysign(scale.abs().clamp(SCALE_FLOOR, torch.finfo(torch.float16).max), scale)
    return floored.half().float()


@store.register_fake
def _(scale: Tensor) -> Tensor:
    return torch.empty_like(scale, dtype=torch.float32)


store.register_autograd(lambda ctx, grad: grad)


@torch.library.custom_op("planish::store_shared", mutates_args=())
def store_shared(scale: Tensor) -> Tensor:
    """Scales as GGUF's Q3_K stores them, those of 16 groups in a row together:

        s = d * k    d: fp16 of 6 significant bits, at least SCALE_FLOOR;  k: an integer, 1 <= |k| <= 31

    so that every s is an fp16 number itself. What is stored stays as it is when it is stored again: the largest k is
    31, and d is found from it. Opaque like `store`, and its gradient is the identity too.

    Args:
        scale: fp32 [out, G] or [out, G, 1].
    """
    groups = to_groups(scale.flatten(1), SHARING)
    peak = groups.abs().amax(-1, keepdim=True).clamp(31 * SCALE_FLOOR, 31 * 2**11)
    bits = (peak / 31).view(torch.int32)
    common = (bits + (1 << 17) >> 18 << 18).view(torch.float32)  # of fp32's 23 bits behind the first the upper 5
    times = (groups.abs() / common).round().clamp(1, 31)
    return from_groups(torch.copysign(times * common, groups), scale.shape[1]).reshape(scale.shape).contiguous()


@store_shared.register_fake
def _(scale: Tensor) -> Tensor:
    return torch.empty_like(scale, dtype=torch.float32)


store_shared.register_autograd(lambda ctx, grad: grad)


def encode(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, rounding: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """Codes of a weight, as fp32 integers in [0, 2^bits - 1].

    Args:
        weight: [out, G, g], any float dtype.
        scale, zero: fp32 [out, G, 1]; zero holds integers.
        rounding: fp32 V [out, G, g] in grid units, added before rounding.
        offset: fp32 [out, G, 1] in weight units.
    """
    return (_rounded(weight, scale, rounding, offset) + zero).clamp(0, 2**bits - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None = None) -> Tensor:
    """W_hat = s * (Q - z) + o in fp32; the caller rounds once to its compute dtype."""
    values = scale.float() * (codes.float() - zero.float())
    return values if offset is None else values + offset


def _rounded(weight: Tensor, scale: Tensor, rounding: Tensor | None, offset: Tensor | None) -> Tensor:
    weight = weight.float()
    steps = (weight if offset is None else weight - offset) / scale
    return torch.round(steps if rounding is None else steps + rounding)


@torch.library.custom_op("planish::fake_quantize", mutates_args=())
def fake_quantize(
    weight: Tensor, rounding: Tensor | None, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """decode(encode(weight)), rounded once to `dtype`, with straight-through gradients.

    Round is passed straight through, the clamp is hard: dW and dV are zero where a code was clamped. The
    gradients are those of the equation at the top: ds = sum of g * ((Q - z) - inside * (W / s)),
    dz = -sum of g * s * outside. A kernel for CUDA registers itself in `kernels.fakequant`.

    Args:
        weight: [out, G, g], any float dtype.
        rounding: fp32 V [out, G, g] or None.
        scale, zero: fp32 [out, G, 1]; zero holds integers.
        bits: bits of a code.
        dtype: compute dtype of the result.
    """
    return decode(encode(weight, scale, zero, bits, rounding), scale, zero).to(dtype)


@fake_quantize.register_fake
def _(weight: Tensor, rounding: Tensor | None, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


@torch.library.custom_op("planish::fake_quantize_backward", mutates_args=())
def fake_quantize_backward(
    grad: Tensor, weight: Tensor, rounding: Tensor | None, scale: Tensor, zero: Tensor, bits: int, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dW, dV, ds, dz), all fp32; an empty tensor stands for one that isn't asked for."""
    grad = grad.float()
    shifted = _rounded(weight, scale, rounding, None) + zero
    codes = shifted.clamp(0, 2**bits - 1)
    inside = shifted == codes
    passed = grad * inside
    grad_scale = (grad * (codes - zero) - passed * (weight.float() / scale)).sum(-1, keepdim=True)
    grad_zero = ((passed - grad) * scale).sum(-1, keepdim=True)
    # two empty tensors, since results of an op may not be one another
    grad_weight = passed if need_weight else grad.new_empty(0)
    grad_rounding = grad.new_empty(0) if rounding is None else passed * scale
    return grad_weight, grad_rounding, grad_scale, grad_zero


@fake_quantize_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, rounding: Tensor | None, scale: Tensor, zero: Tensor, bits: int, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    full = functools.partial(torch.empty_like, weight, dtype=torch.float32)
    return (
        full() if need_weight else scale.new_empty(0),
        scale.new_empty(0) if rounding is None else full(),
        torch.empty_like(scale),
        torch.empty_like(zero),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, rounding, scale, zero, ctx.bits, _ = inputs
    ctx.save_for_backward(weight, rounding, scale, zero)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    weight, rounding, scale, zero = ctx.saved_tensors
    grads = fake_quantize_backward(grad.contiguous(), weight, rounding, scale, zero, ctx.bits, ctx.needs_input_grad[0])
    grad_weight = grads[0].to(weight.dtype) if ctx.needs_input_grad[0] else None
    return grad_weight, grads[1] if rounding is not None else None, grads[2], grads[3], None, None


fake_quantize.register_autograd(_backward, setup_context=_save)
