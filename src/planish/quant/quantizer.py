"""Quantizer: the equation with its three slots.

    W_hat = decode(encode(weight(W), *range(W'), rounding()))

`forward(W)` fake-quantizes for training, `quantize(W)` gives the codes; both go through the one codec, so
that `quantize(W).dequantize(dtype)` equals `forward(W)` bit for bit. It knows neither linears nor models.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from planish.qtensor import QTensor, encode, fake_quantize, from_groups, store_shared, to_groups
from planish.quant.low_rank import LowRank, LowRankSteps
from planish.quant.range import Grid, Learned, MinMax
from planish.quant.rounding import Nearest
from planish.quant.weight import Fixed, Steps
from planish.scheme import Scheme

SLOTS = ("weight", "range", "rounding")


class Quantizer(nn.Module):
    """Quantizes one weight matrix.

    Args:
        weight: [out, in]; read to build the slots, not kept.
        scheme: bits, group size, symmetry.
        weight_slot, range_slot, rounding_slot: what builds each slot; see `quant.weight`, `quant.range`,
            `quant.rounding`.
        importance: fp32 [in], mean square of each input over calibration data; or [G, g, g], mean products of
            the inputs of each group; or None.
    """

    def __init__(
        self,
        weight: Tensor,
        scheme: Scheme,
        *,
        weight_slot: Callable[..., nn.Module] = Fixed,
        range_slot: Callable[..., nn.Module] = MinMax,
        rounding_slot: Callable[..., nn.Module] = Nearest,
        importance: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.in_features = scheme, weight.shape[1]
        self.group_size = scheme.group_in(weight.shape[1])
        self.weight = weight_slot(weight, scheme)
        groups = to_groups(self.weight(weight), self.group_size).detach()
        if importance is not None and importance.ndim == 1:
            importance = to_groups(importance.float().unsqueeze(0), self.group_size)[0]
        self.range = range_slot(groups, scheme, importance)
        if isinstance(self.weight, LowRank):
            self.weight.start(weight, self.range(groups))
        self.rounding = rounding_slot(groups, scheme)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W_hat^T + bias, [..., out] of [..., in]."""
        if isinstance(self.weight, LowRank):
            assert isinstance(self.range, Learned) and isinstance(self.rounding, Nearest)
            return self.weight.multiply(x, weight, bias, self._grid())
        return functional.linear(x, self(weight), bias)

    def _parts(self, weight: Tensor) -> tuple[Tensor, Grid, Tensor | None]:
        groups = to_groups(self.weight(weight), self.group_size)
        return groups, self._grid(groups), self.rounding()

    def _grid(self, *groups: Tensor) -> Grid:
        """As it will be stored; of a `Learned` range without groups."""
        grid: Grid = self.range(*groups)
        return grid._replace(scale=store_shared(grid.scale)) if self.scheme.shared else grid

    def forward(self, weight: Tensor) -> Tensor:
        """W_hat [out, in] in the weight's dtype, with straight-through gradients to the slots."""
        groups, grid, rounding = self._parts(weight)
        if isinstance(self.weight, LowRankSteps):
            assert rounding is None
            values = self.weight.latent(weight).rounded(groups, grid, weight.dtype)
        elif isinstance(self.weight, Steps):
            one = torch.ones_like(grid.scale)
            levels = fake_quantize(groups, rounding, one, grid.zero, self.scheme.bits, torch.float32)
            values = (grid.scale * levels).to(weight.dtype)
        elif grid.offset is not None:
            shifted = groups - grid.offset
            values = fake_quantize(shifted, rounding, grid.scale, grid.zero, self.scheme.bits, torch.float32)
            values = (values + grid.offset).to(weight.dtype)
        else:
            values = fake_quantize(groups, rounding, grid.scale, grid.zero, self.scheme.bits, weight.dtype)
        return from_groups(values, self.in_features)

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> QTensor:
        """The codes that `forward` multiplies by."""
        groups, grid, rounding = self._parts(weight)
        if isinstance(self.weight, LowRankSteps):
            codes = self.weight.latent(weight).levels(groups, grid) + grid.zero
        else:
            step = torch.ones_like(grid.scale) if isinstance(self.weight, Steps) else grid.scale
            codes = encode(groups, step, grid.zero, self.scheme.bits, rounding, grid.offset)
        zero = None if self.scheme.symmetric else grid.zero.squeeze(-1).to(torch.uint8)
        return QTensor(
            codes=from_groups(codes, self.in_features).to(torch.uint8).contiguous(),
            scale=grid.scale.squeeze(-1).half(),
            zero=zero,
            offset=None if grid.offset is None else grid.offset.detach().squeeze(-1).float(),
            bits=self.scheme.bits,
            group_size=self.group_size,
        )

    def trainable(self, slot: str) -> list[tuple[nn.Parameter, float]]:
        """Parameters of a slot, one of SLOTS, or of one in it, such as "range.zero", with the units of their rates."""
        slot, _, leaf = slot.partition(".")
        module = self.get_submodule(slot)
        units: dict[str, float] = getattr(module, "units", {})
        return [(p, units.get(name, 1.0)) for name, p in module.named_parameters() if leaf in ("", name)]
