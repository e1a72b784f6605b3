"""PackedLinear: an nn.Linear whose weight is a packed QTensor.

    y = x W_hat^T + b

Which kernel multiplies is chosen call by call (`planish.kernels.choose`). A kernel that wants the weight in
a layout of its own makes it at its first call. Knows nothing of how the codes were found, nor of files.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from planish.kernels import choose
from planish.kernels.pack import Packed
from planish.qtensor import QTensor


class PackedLinear(nn.Module):
    """Multiplies by a packed QTensor; its buffers are its state.

    Casting a model (`.to(bfloat16)`, `.half()`) casts the bias only: scales and offsets keep the dtype
    they are stored in, since the codes mean nothing without them.

    Args:
        weight: what to multiply by, [out, in].
        bias: float [out], or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bits, self.group_size = weight.bits, weight.group_size
        for name in ("codes", "scale", "zero", "offset"):
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", bias)
        self._cache: dict[str, Tensor] = {}

    @classmethod
    def from_qtensor(cls, q: QTensor, bias: Tensor | None, dtype: torch.dtype) -> "PackedLinear":
        """Pack a QTensor.

        Args:
            q: the weight; its scale, zero and offset are held as they are, not copied.
            bias: float [out], or None.
            dtype: what the bias is held in; activations may come in any float dtype.
        """
        return cls(Packed.from_qtensor(q), None if bias is None else bias.detach().to(dtype))

    @property
    def packed(self) -> Packed:
        return Packed(
            codes=self.codes,
            scale=self.scale,
            zero=self.zero,
            offset=self.offset,
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
        )

    def qtensor(self) -> QTensor:
        """The QTensor this was made from, bit for bit."""
        return self.packed.qtensor()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        weight = self.packed
        return choose(weight, x).matmul(x, weight, self.bias, self._cache)

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
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, {grid}, bias={self.bias is not None}"
        )
