"""PackedLinear: an nn.Linear whose weight is a packed QTensor.

    y = x W_hat^T + b,   W_hat = s * (Q - z) + o

The weight is held as codes, with scale and zero beside them, or as records, which decode kernels read
(`to_records`, `to_codes`); never as both. Beside records it may lie as Humming reads it (`lay_out`). Of codes, which
kernel multiplies is chosen call by call (`planish.kernels.choose`); one that wants the weight in a layout of its own
makes it at its first call. Where the codes' columns have an order of their own, x is put in that order first, and no
kernel knows. Scale and zero can be made trainable, the codes never are. Knows nothing of how the codes were found, nor
of files.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError, nearest
from planish.kernels import choose, cpu, humming, int8, train
from planish.kernels.gemv_layout import Layout
from planish.kernels.pack import Packed
from planish.kernels.records import Records, Weight, multiply
from planish.qtensor import PARTS, QTensor, store, store_shared
from planish.quant.activation import fake_quantize_tokens
from planish.quant.hadamard import turn
from planish.scheme import Activations, Scheme

if TYPE_CHECKING:
    from planish.kernels.siblings import Siblings

SLOTS = ("scale", "zero")


class PackedLinear(nn.Module):
    """Multiplies by a packed QTensor; its buffers are its state.

    Casting a model (`.to(bfloat16)`, `.half()`) casts the bias only: scales and offsets keep the dtype
    they are stored in, since the codes mean nothing without them; those that are trained keep fp32.

    Args:
        weight: what to multiply by, [out, in].
        bias: float [out], or None.
        activations: how inputs are rounded, token by token; None leaves them.
        shared: what a trained scale is stored by, see `Scheme`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    records: Tensor | None
    layout: Layout | None

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        activations: Activations | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.activations, self.shared = activations, shared
        about: Any = weight.layout if isinstance(weight, Records) else weight
        self.in_features, self.out_features, self.bits = about.in_features, about.out_features, about.bits
        self.group_size = weight.group_size
        self.symmetric = not about.has_zero if isinstance(weight, Records) else weight.zero is None
        for name in (*PARTS, "records"):
            self.register_buffer(name, None)
        self.register_buffer("bias", bias)
        self._hold(weight)

    @classmethod
    def from_qtensor(
        cls,
        q: QTensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        activations: Activations | None = None,
        shared: bool = False,
    ) -> "PackedLinear":
        """Pack a QTensor.

        Args:
            q: the weight; its scale, zero, offset and order are held as they are, not copied.
            bias: float [out], or None.
            dtype: what the bias is held in; activations may come in any float dtype.
            activations: how those are rounded. shared: as of the class.
        """
        return cls(Packed.from_qtensor(q), None if bias is None else bias.detach().to(dtype), activations, shared)

    def _hold(self, weight: Weight) -> None:
        """Take a weight in the place of what is held."""
        self.records, self.layout = (weight.tiles, weight.layout) if isinstance(weight, Records) else (None, None)
        for name in PARTS:
            setattr(self, name, getattr(weight, name, None))
        self.siblings: Siblings | None = None
        self.span: tuple[int, int] | None = None  # of its outputs among the siblings'
        self.laid: humming.Laid | None = None
        self._cache: dict[str, Tensor] = {}

    def to_records(self) -> bool:
        """Hold the weight as records, for inference; a weight that can't be, or is trained, or is multiplied by rounded
        inputs, stays as it is.

        Returns:
            whether it is held so now.
        """
        free = self.records is None and not self.trainable and self.activations is None
        if free and (records := Records.of(self.packed)):
            self._hold(records)
        return self.records is not None

    def to_codes(self) -> None:
        """Hold the weight as codes, scale and zero; bit for bit those that records were made of."""
        if self.records is not None:
            self._hold(self.packed)

    def lay_out(self, dtype: torch.dtype) -> None:
        """Hold records for Humming too, where tables have it take many rows of activations of `dtype`."""
        if self.records is not None and self.laid is None:
            assert self.layout is not None
            self.laid = humming.hold(self.records, self.layout, dtype)

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
            if slot == "zero" and self.symmetric:
                raise PlanishError(f"a symmetric grid has no {slot} to train; quantize with an asymmetric scheme")
        self.to_codes()
        self._cache = {}
        for slot in slots:
            if slot not in self.trainable:
                start = getattr(self, slot).float()
                delattr(self, slot)
                self.register_parameter(slot, nn.Parameter(start))
        return {slot: self.trainable[slot] for slot in slots}

    def freeze(self) -> None:
        """Turn parameters back into buffers, fp16 and uint8, that hold what the forward multiplied by."""
        if not self.trainable:
            return
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
            symmetric=self.symmetric,
            activations=self.activations,
            shared=self.shared,
        )

    @property
    def packed(self) -> Packed:
        """The weight as `freeze` would leave it, detached."""
        if self.records is not None:
            return Packed.from_qtensor(self.qtensor())
        weight = self._weight(self.scale.detach(), None if self.zero is None else self.zero.detach())
        zero = None if weight.zero is None else weight.zero.to(torch.uint8)
        return replace(weight, scale=weight.scale.half(), zero=zero, order=self.order)

    def _weight(self, scale: Tensor, zero: Tensor | None) -> Packed:
        """What a kernel is given: columns in the codes' order, scale and zero as they will be stored, differentiable
        where they are trained."""
        if "scale" in self.trainable:
            scale = store_shared(scale) if self.shared else store(scale)
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
        if self.records is not None:
            assert self.layout is not None
            found = Records(tiles=self.records, layout=self.layout, group_size=self.group_size, order=self.order)
            return found.qtensor()
        return self.packed.qtensor()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        if self.activations is not None:
            return self._rounded(x, self.activations)
        held = self._buffers  # attributes of a module are found slowly, and decoding on a CPU feels it
        if self._cache and held["order"] is None:
            y = cpu.again(x, held["bias"], self._cache, self.in_features)
            if y is not None:
                return y
        learns = train.supports(None, x)
        laid = self.laid if humming.takes(self.laid, x) else None
        if self.siblings is not None and not learns and laid is None:
            return self.siblings.product(self, x)
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.records is not None and not learns:
            assert self.layout is not None
            return multiply(x, self.records, self.layout, self.bias, laid)
        weight = self._weight(self.scale, self.zero) if self.records is None else replace(self.packed, order=None)
        kernel = train if self.trainable else choose(weight, x)
        return kernel.matmul(x, weight, self.bias, self._cache)

    def _rounded(self, x: Tensor, how: Activations) -> Tensor:
        """The product of rounded inputs: of integers where that can be."""
        if self.order is not None:
            assert not how.turned, "what is turned has no columns of its own"
            x = x.index_select(-1, self.order)
        weight = self._weight(self.scale, self.zero)
        if how.bits < 16 and not self.trainable and int8.supports(weight, x, how.bits, how.symmetric):
            x = turn(x) if how.turned else x
            return int8.matmul(x, weight, self.bias, self._cache, how.bits, how.symmetric)
        x = fake_quantize_tokens(x, how)
        return (train if self.trainable else choose(weight, x)).matmul(x, weight, self.bias, self._cache)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = moved.dtype == tensor.dtype or tensor is self.bias
            return moved if kept else tensor.to(moved.device)

        self._cache = {}
        if self.records is not None:
            here, there = self.records.device.type, fn(self.records.new_empty(0)).device.type
            if there not in (here, "cuda"):
                self.to_codes()  # elsewhere no kernel reads records
        before = self.records
        super()._apply(move, recurse)
        if self.records is not before:
            self.siblings = self.laid = None
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._cache, self.laid = {}, None
        if f"{prefix}codes" in state_dict:
            self.to_codes()
        elif f"{prefix}records" in state_dict:
            self.to_records()
        before = self.records
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.records is not before:
            self.siblings = None

    def extra_repr(self) -> str:
        grid = "symmetric" if self.symmetric else "asymmetric"
        trained = f", trains {' and '.join(self.trainable)}" if self.trainable else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, {grid}, bias={self.bias is not None}{trained}"
            f"{', as records' if self.records is not None else ''}"
        )


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed linears of a model by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
