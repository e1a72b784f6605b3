"""The range slot gives the grid of each group: a scale s (signed, as it will be stored) and a zero point z.

`MinMax` spans each group's own ends, `Searched` the ends that lose least, `TunedMinMax` learns factors on
either, `Clip` factors on the ends of a weight that may move, `Learned` trains s and z themselves. A symmetric
grid is full-range: levels run from -2^(b-1) to 2^(b-1) - 1, and the sign of the scale puts the extra level on the
larger tail. A slot is a module built from (groups [out, G, g], scheme, importance) whose forward maps groups to a
Grid.

Legend: groups [out, G, g]; grids [out, G, 1], fp32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from planish.qtensor import QTensor, midpoint, store
from planish.quant.search import search_grid
from planish.scheme import Scheme


class Grid(NamedTuple):
    """Scale (fp32, storable in fp16), zero point (fp32 integers in [0, 2^bits - 1]) and, in few methods, an offset in
    weight units, each [out, G, 1]."""

    scale: Tensor
    zero: Tensor
    offset: Tensor | None = None


def grid_of(weight: QTensor) -> Grid:
    """The grid of what is quantized already."""
    scale = weight.scale.float().unsqueeze(-1)
    zero = torch.full_like(scale, midpoint(weight.bits)) if weight.zero is None else weight.zero.float().unsqueeze(-1)
    return Grid(scale, zero, None if weight.offset is None else weight.offset.unsqueeze(-1))


class RoundThrough(torch.autograd.Function):
    """Round half to even; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return torch.round(values)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return grad


def ends(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, zero always between them."""
    return groups.amin(-1, keepdim=True).float().clamp(max=0), groups.amax(-1, keepdim=True).float().clamp(min=0)


def signed_scale(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Full-range symmetric scale: the larger tail gets the extra level, so s > 0 if it is the lower one."""
    larger = torch.maximum(-low, high)
    return torch.where(-low > high, larger, -larger) / midpoint(bits)


def symmetric_grid(scale: Tensor, bits: int) -> Grid:
    stored = store(scale)
    return Grid(stored, torch.full_like(stored, midpoint(bits)))


def asymmetric_grid(low: Tensor, high: Tensor, bits: int) -> Grid:
    """Grid from low <= 0 to high >= 0, the zero point rounded to a level (gradient straight through)."""
    return Grid(*span_grid(low, high, bits))


@torch.library.custom_op("planish::span_grid", mutates_args=())
def span_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """s = store((high - low) / (2^bits - 1)), z = clamp(round(-low / s)), both [out, G, 1], fp32.

    Opaque, since compilers divide in their own ways, and a last bit of s or a level of z is another model.
    """
    levels = 2**bits - 1
    scale = store((high - low) / levels)
    return scale, (-low / scale).round().clamp(0, levels)


@span_grid.register_fake
def _(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(low), torch.empty_like(low)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    low, _, ctx.bits = inputs
    ctx.save_for_backward(low, output[0])


def _backward(ctx, grad_scale, grad_zero):  # type: ignore[no-untyped-def]
    low, scale = ctx.saved_tensors
    levels = 2**ctx.bits - 1
    level = -low / scale
    # the clamp is hard, the rounding passes straight through
    passed = grad_zero * ((level.round() >= 0) & (level.round() <= levels))
    grad_scale = (grad_scale + passed * low / scale.square()) / levels
    return -grad_scale - passed / scale, grad_scale, None


span_grid.register_autograd(_backward, setup_context=_save)


class MinMax(nn.Module):
    """Each group from its lowest to its highest value."""

    def __init__(self, groups: Tensor, scheme: Scheme, importance: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.symmetric = scheme.bits, scheme.symmetric

    def forward(self, groups: Tensor) -> Grid:
        low, high = ends(groups)
        if self.symmetric:
            return symmetric_grid(signed_scale(low, high, self.bits), self.bits)
        return asymmetric_grid(low, high, self.bits)


class Unclipped(MinMax):
    """L4Q_init (arXiv 2402.04902): s = max(|low| / 2^(b-1), |high| / (2^(b-1) - 1)), so that neither end is clipped;
    asymmetric it is min/max."""

    def forward(self, groups: Tensor) -> Grid:
        if not self.symmetric:
            return super().forward(groups)
        low, high = ends(groups)
        level = midpoint(self.bits)
        return symmetric_grid(torch.maximum(-low / level, high / (level - 1)), self.bits)


class Given(nn.Module):
    """A grid that is there already, such as that of a quantized model."""

    def __init__(self, groups: Tensor, scheme: Scheme, importance: Tensor | None = None, *, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, groups: Tensor) -> Grid:
        return self.grid


class Searched(nn.Module):
    """The grid of least squared error, each input weighed by its mean square over the calibration data."""

    def __init__(self, groups: Tensor, scheme: Scheme, importance: Tensor | None = None) -> None:
        super().__init__()
        start = MinMax(groups, scheme)(groups)
        scale, zero = search_grid(groups, scheme, importance, start.scale, start.zero)
        self.scale, self.zero = nn.Buffer(scale), nn.Buffer(zero)

    def forward(self, groups: Tensor) -> Grid:
        return Grid(self.scale, self.zero)


class TunedMinMax(nn.Module):
    """Learned factors on a start grid (SignRound, arXiv 2309.05516, and its successor, arXiv 2512.04746).

    Symmetric: s = s0 * a. Asymmetric: low * a_low and high * a_high, and the grid between them. Factors
    start at 1 and may grow up to 2; from the plain min/max they only shrink, as in the original.

    Args:
        search: start from `Searched` instead of min/max.
    """

    def __init__(self, groups: Tensor, scheme: Scheme, importance: Tensor | None = None, search: bool = True) -> None:
        super().__init__()
        self.bits, self.symmetric = scheme.bits, scheme.symmetric
        self.limit = 2.0 if search else 1.0
        scale, zero, _ = (Searched if search else MinMax)(groups, scheme, importance)(groups)
        self.scale, self.zero = nn.Buffer(scale), nn.Buffer(zero)
        self.low_factor = nn.Parameter(torch.ones_like(scale))
        if not self.symmetric:
            self.high_factor = nn.Parameter(torch.ones_like(scale))

    def forward(self, groups: Tensor) -> Grid:
        low_factor = self.low_factor.clamp(0, self.limit)
        if self.symmetric:
            return symmetric_grid(self.scale * low_factor, self.bits)
        low = -self.zero * self.scale * low_factor
        high = (2**self.bits - 1 - self.zero) * self.scale * self.high_factor.clamp(0, self.limit)
        return asymmetric_grid(low, high, self.bits)


class Learned(nn.Module):
    """s and z are trained themselves (EfficientQAT's Block-AP, arXiv 2407.11062, equations 2 to 4).

    The rate of s is in units of the matrix's mean |s|, so that one suits every layer; z is rounded to a level, its
    gradient straight through.

    Args:
        search: start from `Searched` instead of min/max.
        relative: False has the rate of s in the weight's own units, as published.
        start: what builds the slot to start from instead of either.
        offset: an offset o in weight units is trained too, starting at 0 (L4Q's b, arXiv 2402.04902); its rate is in
            units of the mean |s| too.
    """

    def __init__(
        self,
        groups: Tensor,
        scheme: Scheme,
        importance: Tensor | None = None,
        search: bool = True,
        relative: bool = True,
        start: Callable[..., nn.Module] | None = None,
        offset: bool = False,
    ) -> None:
        super().__init__()
        self.bits, self.symmetric = scheme.bits, scheme.symmetric
        built = start or (Searched if search else MinMax)
        scale, zero, given = built(groups, scheme, importance)(groups)
        step = scale.abs().mean().item()
        self.units = {"scale": step, "offset": step} if relative else {}
        self.scale = nn.Parameter(scale.clone())
        if not self.symmetric:
            self.zero = nn.Parameter(zero.clone())
        if offset or given is not None:
            self.offset = nn.Parameter(torch.zeros_like(scale) if given is None else given.clone())

    def forward(self, groups: Tensor | None = None) -> Grid:
        offset = getattr(self, "offset", None)
        if self.symmetric:
            return symmetric_grid(self.scale, self.bits)._replace(offset=offset)
        return Grid(store(self.scale), RoundThrough.apply(self.zero).clamp(0, 2**self.bits - 1), offset)


@torch.library.custom_op("planish::clipped", mutates_args=())
def clipped(end: Tensor, logit: Tensor, limit: float) -> Tensor:
    """end * limit * sigmoid(logit), fp32 [out, G, 1]; opaque, since compilers have a sigmoid of their own."""
    return end * (limit * torch.sigmoid(logit))


@clipped.register_fake
def _(end: Tensor, logit: Tensor, limit: float) -> Tensor:
    return torch.empty_like(end)


def _save_clipped(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    end, logit, ctx.limit = inputs
    ctx.save_for_backward(end, logit)


def _backward_clipped(ctx, grad):  # type: ignore[no-untyped-def]
    end, logit = ctx.saved_tensors
    share = torch.sigmoid(logit)
    passed = grad * ctx.limit * share
    return passed, passed * end * (1 - share), None


clipped.register_autograd(_backward_clipped, setup_context=_save_clipped)


class Clip(nn.Module):
    """Learned clipping of a group's ends (OmniQuant's LWC, arXiv 2308.13137, equation 2).

    low * sigmoid(a) and high * sigmoid(b), and the grid between them; a symmetric one has the larger of both as its
    reach. Ends are those of the weight of the moment, so that the factors stay right while a transform moves it.

    Args:
        search: start from `Searched`, factors up to 2; else at sigmoid(START), factors at most 1, as published.
    """

    START = 4.0

    def __init__(self, groups: Tensor, scheme: Scheme, importance: Tensor | None = None, search: bool = False) -> None:
        super().__init__()
        self.bits, self.symmetric = scheme.bits, scheme.symmetric
        self.limit = 2.0 if search else 1.0
        grid = (Searched if search else MinMax)(groups, scheme, importance)(groups)
        low, high = ends(groups)
        factors = [torch.full_like(low, torch.tensor(self.START).sigmoid().item())] * 2
        if search and self.symmetric:
            factors = [grid.scale.abs() * midpoint(self.bits) / torch.maximum(-low, high).clamp(min=1e-30)] * 2
        elif search:
            levels = 2**self.bits - 1
            factors = [-grid.zero * grid.scale / low.clamp(max=-1e-30)]
            factors += [(levels - grid.zero) * grid.scale / high.clamp(min=1e-30)]
        if self.symmetric:
            self.sign = nn.Buffer(torch.where(grid.scale < 0, -1.0, 1.0))
        self.low, self.high = (nn.Parameter(self._logit(factor)) for factor in factors)

    def _logit(self, factor: Tensor) -> Tensor:
        return torch.logit((factor / self.limit).clamp(0.02, torch.tensor(self.START).sigmoid().item()))

    def forward(self, groups: Tensor) -> Grid:
        low, high = ends(groups)
        low, high = clipped(low, self.low, self.limit), clipped(high, self.high, self.limit)
        if self.symmetric:
            return symmetric_grid(self.sign * torch.maximum(-low, high) / midpoint(self.bits), self.bits)
        return asymmetric_grid(low, high, self.bits)
