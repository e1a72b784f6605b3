"""Smooth: a learned scale and shift for each channel of a block's edges (OmniQuant's LET, arXiv 2308.13137).

    x' = (x - d) / s,   W' = W * s,   b' = b + W d        so that W' x' + b' = W x + b

An outlying channel is divided down where it is rounded and multiplied up in a weight. s starts as SmoothQuant's,
act^a / wmax^(1-a) (arXiv 2211.10438), d as the middle of the channel; between query and key s starts as one. While a
block is fitted its parameters are seen through parametrizations, then folded: both compute the same. Rates of s are
relative, since it is trained as a logarithm. Knows nothing of quantizers.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from planish.edges import NORM, QUERY, VALUE, Edge, Move
from planish.errors import PlanishError, nearest

SITES = (NORM, VALUE, QUERY)
# of a linear's inputs: the lowest and the highest of each channel
Extremes = Mapping[str, tuple[Tensor, Tensor]]


class Channels(nn.Module):
    """s and d of one edge."""

    def __init__(self, scale: Tensor, shift: Tensor | None) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(scale.float().log())
        self.shift = None if shift is None else nn.Parameter(shift.float())

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()


class Moved(nn.Module):
    """A parameter as an edge's move leaves it, in its own dtype."""

    def __init__(self, move: Move, channels: Channels, weight: Tensor) -> None:
        super().__init__()
        # where it is needed: nothing may be copied to a GPU while a step is captured
        self.move = dataclasses.replace(move, index=move.index.to(weight.device))
        self.channels = channels
        self.weight = (weight,) if move.how == "columns" and move.leaf == "bias" else None

    def forward(self, value: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight[0]
        return self.move(value, self.channels.scale, self.channels.shift, weight).to(value.dtype)


@dataclass(frozen=True, kw_only=True)
class Smooth:
    """A learned equivalent transform of each block.

    Args:
        alpha: share of the activations in the start of s, SmoothQuant's a.
        sites: kinds of edges, of SITES.
        shift: whether channels are shifted too, where both sides have a bias.
        always: also where activations stay in 16 bits.
        strict: a block without edges is refused; else it is left as it is.
    """

    alpha: float = 0.5
    sites: tuple[str, ...] = SITES
    shift: bool = True
    always: bool = False
    strict: bool = True

    def __post_init__(self) -> None:
        for site in self.sites:
            if site not in SITES:
                raise PlanishError(f"no edge {site!r}: {nearest(site, SITES)}")
        if not 0 <= self.alpha <= 1:
            raise PlanishError(f"alpha={self.alpha} isn't a share; 0.5 is usual, 0.75 where activations are hard")

    def attach(
        self, name: str, block: nn.Module, edges: Sequence[Edge], extremes: Extremes, leave: Collection[str] = ()
    ) -> "Smoothed":
        """See the block's parameters moved, at first by the start of s and d.

        Args:
            name: of the block, full.
            extremes: by full name of each linear.
            leave: full names of linears whose channels are mixed: what feeds them isn't moved.

        Raises:
            PlanishError: if none of the edges that are wanted is there, and strict.
        """
        chosen = [edge for edge in edges if edge.kind in self.sites]
        if self.strict and not any(edge.kind == NORM for edge in chosen):
            raise PlanishError(
                f"{name}: no norm is found that feeds linears only, so that its channels can't be smoothed; "
                "let=false trains clipping alone, fallback=true where it has to"
            )
        smoothed = Smoothed(name, block)
        for edge in chosen:
            if any(f"{name}.{taker}" in leave for taker in edge.takes):
                continue
            smoothed.add(edge, *self._start(name, block, edge, extremes))
        return smoothed

    def _start(
        self, name: str, block: nn.Module, edge: Edge, extremes: Extremes
    ) -> tuple[Tensor, Tensor | None]:
        device = weight_of(block, edge.moves[0].module).device
        low, high, weight = (torch.zeros(edge.size, device=device) for _ in range(3))
        for taker, index in edge.takes.items():
            seen = extremes.get(f"{name}.{taker}")
            if seen is None:  # a router, which isn't rounded, or an expert without a token
                continue
            index, largest = index.to(device), weight_of(block, taker).abs().amax(0).float()
            low.scatter_reduce_(0, index, seen[0].float(), "amin")
            high.scatter_reduce_(0, index, seen[1].float(), "amax")
            weight.scatter_reduce_(0, index, largest, "amax")
        shift = (low + high) / 2 if self.shift and edge.shifts else None
        reach = torch.maximum(-low, high) if shift is None else (high - low) / 2
        if edge.kind == QUERY:
            return torch.ones(edge.size, device=device), None
        scale = reach.clamp(min=1e-5) ** self.alpha / weight.clamp(min=1e-5) ** (1 - self.alpha)
        # a common factor changes nothing but how near scales come to the ends of fp16
        return scale / scale.log().mean().exp(), shift


def weight_of(block: nn.Module, name: str) -> Tensor:
    """A module's weight, as it is seen."""
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


class Smoothed:
    """A block whose parameters are seen moved.

    Attributes:
        parameters: what is trained.
    """

    def __init__(self, name: str, block: nn.Module) -> None:
        self.name, self.block = name, block
        self.parameters: list[Tensor] = []
        self._channels: list[tuple[Edge, Channels]] = []
        self._moved: list[tuple[str, nn.Module, str]] = []  # full name, module, leaf

    def add(self, edge: Edge, scale: Tensor, shift: Tensor | None) -> None:
        channels = Channels(scale, shift)
        self._channels.append((edge, channels))
        self.parameters += channels.parameters()
        for move in edge.moves:
            module = self.block.get_submodule(move.module)
            if shift is None and move.how == "columns" and move.leaf == "bias":
                continue
            moved = Moved(move, channels, weight_of(self.block, move.module))
            parametrize.register_parametrization(module, move.leaf, moved, unsafe=True)
            self._moved.append((f"{self.name}.{move.module}", module, move.leaf))

    def columns(self, linear: str) -> Tensor | None:
        """What the columns of a linear are multiplied by at the moment, by its full name."""
        found = [
            channels.scale.detach()[index.to(channels.log_scale.device)]
            for edge, channels in self._channels
            for name, index in edge.takes.items()
            if f"{self.name}.{name}" == linear
        ]
        return torch.stack(found).prod(0) if found else None

    def fold(self, quantized: Collection[str] = ()) -> dict[str, Tensor]:
        """Leave the parameters as they were seen last; by full name, but for the weights of linears in `quantized`."""
        folded = {}
        for name, module, leaf in self._moved:
            if parametrize.is_parametrized(module, leaf):
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
                module.requires_grad_(False)
            if leaf == "bias" or name not in quantized:
                folded[f"{name}.{leaf}"] = module.get_parameter(leaf).detach()
        self._moved = []
        return folded
