"""PackedLinear: an nn.Linear whose weight is a packed QTensor.

    y = x W_hat^T + b,   W_hat = s * (Q - z) + o

Which kernel multiplies is chosen call by call (`planish.kernels.choose`). A kernel that wants the weight in
a layout of its own makes it at its first call. Where the codes' columns have an order of their own, x is put
in that order first, and no kernel knows. Scale and zero can be made trainable, the codes never are.
Knows nothing of how the codes were found, nor of files.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError, nearest
from planish.kernels import choose, int8, train
from planish.kernels.pack import Packed
from planish.qtensor import PARTS, QTensor, store
from planish.quant.activation import fake_quantize_tokens
from planish.scheme import Activations, Scheme

SLOTS = ("scale", "zero")


class PackedLinear(nn.Module):
    """Multiplies by a packed QTensor; its buffers are its state.

    Casting a model (`.to(bfloat16)`, `.half()`) casts the bias only: scales and offsets keep the dtype
    they are stored in, since the codes mean nothing without them; those that are trained keep fp32.

    Args:
        weight: what to multiply by, [out, in].
        bias: float [out], or None.
        activations: how inputs are rounded, token by token; None leaves them.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight: Packed, bias: Tensor | None = None, activations: Activations | None = None
    ) -> None:
        super().__init__()
        self.activations = activations
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bits, self.group_size = weight.bits, weight.group_size
        for name in PARTS:
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", bias)
        self._cache: dict[str, Tensor] = {}

    @classmethod
    def from_qtensor(
        cls, q: QTensor, bias: Tensor | None, dtype: torch.dtype, activations: Activations | None = None
    ) -> "PackedLinear":
        """Pack a QTensor.

        Args:
            q: the weight; its scale, zero, offset and order are held as they are, not copied.
            bias: float [out], or None.
            dtype: what the bias is held in; activations may come in any float dtype.
            activations: how those are rounded.
        """
        return cls(Packed.from_qtensor(q), None if bias is None else bias.detach().to(dtype), activations)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that `make_trainable` made, by slot."""
        return {name: value for name in SLOTS if isinstance(value := getattr(self, name), nn.Parameter)}

    def make_trainable(self, slots: Collection[str]) -> dict[str, nn.Parameter]:
        """Turn buffers into parameters, fp32 [out, G], of the same names and values; codes stay as they are.

        The forward then multiplies by the values that `freeze` will keep: a scale through `store`, a zero
        rounded and clamped to [0, 2^bits - 1]. Gradients pass straight through all of that. A scale below
        the codec's SCALE_FLOOR is raised to it.

        Args:
            slots: any of 'scale' and 'zero'; one that is trainable already stays the parameter it is.
        Returns:
            the parameters of these slots.
        Raises:
            PlanishError: for another slot, or the zero of a symmetric grid.
        """
        for slot in slots:
            if slot not in SLOTS:
                raise PlanishError(f"a packed layer can't train {slot!r}; {nearest(slot, SLOTS)}")
            if getattr(self, slot) is None:
                raise PlanishError(f"a symmetric grid has no {slot} to train; quantize with an asymmetric scheme")
        self._cache = {}
        for slot in slots:
            if slot not in self.trainable:
                start = getattr(self, slot).float()
                delattr(self, slot)
                self.register_parameter(slot, nn.Parameter(start))
        return {slot: self.trainable[slot] for slot in slots}

    def freeze(self) -> None:
        """Turn parameters back into buffers, fp16 and uint8, that hold what the forward multiplied by."""
        weight = self.packed
        for slot in self.trainable:
            delattr(self, slot)
            self.register_buffer(slot, getattr(weight, slot))
        self._cache = {}

    @property
    def scheme(self) -> Scheme:
        """How it is stored, as of `QTensor.scheme`; nothing is unpacked."""
        whole = self.group_size == self.in_features
        return Scheme(
            bits=self.bits,
            group_size=None if whole else self.group_size,
            symmetric=self.zero is None,
            activations=self.activations,
        )

    @property
    def packed(self) -> Packed:
        """The weight as `freeze` would leave it, detached."""
        weight = self._weight(self.scale.detach(), None if self.zero is None else self.zero.detach())
        zero = None if weight.zero is None else weight.zero.to(torch.uint8)
        return replace(weight, scale=weight.scale.half(), zero=zero, order=self.order)

    def _weight(self, scale: Tensor, zero: Tensor | None) -> Packed:
        """What a kernel is given: columns in the codes' order, scale and zero as they will be stored, differentiable
        where they are trained."""
        if "scale" in self.trainable:
            scale = store(scale)
        if zero is not None and "zero" in self.trainable:
            zero = zero + (zero.round().clamp(0, 2**self.bits - 1) - zero).detach()  # fp32 holds each step exactly
        return Packed(
            codes=self.codes,
            scale=scale,
            zero=zero,
            offset=self.offset,
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
        )

    def qtensor(self) -> QTensor:
        """The QTensor this was made from, bit for bit; of a trained layer what it has become."""
        return self.packed.qtensor()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        if self.order is not None and (self.activations is None or not self.activations.turned):
            x = x.index_select(-1, self.order)
        weight = self._weight(self.scale, self.zero)
        if self.activations is not None:
            if not self.trainable and int8.supports(weight, self.activations, x):
                return int8.matmul(x, weight, self.activations, self.bias, self._cache)
            x = fake_quantize_tokens(x, self.activations)
        kernel = train if self.trainable else choose(weight, x)
        return kernel.matmul(x, weight, self.bias, self._cache)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = moved.dtype == tensor.dtype or tensor is self.bias
            return moved if kept else tensor.to(moved.device)

        self._cache = {}
        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self._cache = {}
        super()._load_from_state_dict(state_dict, *args, **kwargs)

    def extra_repr(self) -> str:
        grid = "symmetric" if self.zero is None else "asymmetric"
        trained = f", trains {' and '.join(self.trainable)}" if self.trainable else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, {grid}, bias={self.bias is not None}{trained}"
        )


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed linears of a model by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
