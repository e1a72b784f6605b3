"""What linears see while a stream goes through them: how much their inputs matter, and how far they reach.

Knows nothing of streams or quantizers: hooks on linears, and a forward pass of the caller's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from planish.experts import Experts
from planish.qtensor import to_groups
from planish.transform.smooth import Extremes


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the linears of a span saw in the float model, by full name.

    Args:
        importance: how much inputs matter, see `input_moments`. extremes: lowest and highest of each input.
    """

    importance: dict[str, Tensor] = field(default_factory=dict)
    extremes: Extremes = field(default_factory=dict)


class Extent:
    """While it lasts, the lowest and highest of each input of the linears of some blocks, by full name."""

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self.linears = {
            f"{block}.{path}": part
            for block, module in blocks.items()
            for path, part in module.named_modules()
            if isinstance(part, nn.Linear)
        }

    def __enter__(self) -> "Extent":
        self.handles = [part.register_forward_pre_hook(self._note(name)) for name, part in self.linears.items()]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            low, high = args[0].detach().flatten(0, -2).aminmax(dim=0)
            if name in self.found:
                low, high = torch.minimum(low, self.found[name][0]), torch.maximum(high, self.found[name][1])
            self.found[name] = low, high

        return hook


class Routed:
    """While it lasts, how many tokens reach each expert, by the full name of the block's Experts.

    Args:
        blocks: by full name. found: where the counts go, added to; what is there already of these experts goes.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], found: dict[str, list[int]]) -> None:
        self.found = found
        self.experts = {
            f"{block}.{path}": part
            for block, module in blocks.items()
            for path, part in module.named_modules()
            if isinstance(part, Experts)
        }

    def __enter__(self) -> "Routed":
        for name, part in self.experts.items():
            self.found[name] = [0] * len(list(part.children()))
        self.handles = [part.register_forward_pre_hook(self._note(name)) for name, part in self.experts.items()]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            before = self.found[name]
            if args[1].is_meta:  # without numbers each is reached
                self.found[name] = [1] * len(before)
                return
            counts = torch.bincount(args[1].flatten(), minlength=len(before)).tolist()
            self.found[name] = [old + new for old, new in zip(before, counts, strict=True)]

        return hook


def input_moments(
    linears: Mapping[str, nn.Linear], forward: Callable[[], None], group_sizes: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """How much each linear's inputs matter, over all tokens of a forward pass.

    Returns:
        By name fp32 [in], the mean square of each input; for a linear in `group_sizes` [G, g, g], the mean
        products of each group's inputs.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().flatten(0, -2).float()
            if group_sizes and name in group_sizes:
                groups = to_groups(rows, group_sizes[name]).transpose(0, 1)  # [G, tokens, g]
                moment = groups.transpose(1, 2) @ groups
            else:
                moment = rows.square().sum(0)
            totals[name] = totals.get(name, 0) + moment
            counts[name] = counts.get(name, 0) + len(rows)

        return record

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: totals[name] / counts[name] for name in totals}
