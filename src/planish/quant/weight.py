"""The weight slot gives W', the weight that is rounded.

`Fixed` is the weight as it is, `Free` a trained copy of it, `Steps` one in steps of the grid. A slot is a module built
from (weight, scheme) whose forward maps the layer's weight [out, in] to W' [out, in]. A slot of any kind may have
`units`: by the name of a parameter what its learning rate is multiplied by, 1 if it isn't there.
"""

from torch import Tensor, nn

from planish.qtensor import SCALE_FLOOR, from_groups, to_groups
from planish.scheme import Scheme


class Fixed(nn.Module):
    """W' = W: the weight itself isn't trained."""

    def __init__(self, weight: Tensor, scheme: Scheme) -> None:
        super().__init__()

    def forward(self, weight: Tensor) -> Tensor:
        return weight


class Free(nn.Module):
    """W' is trained, starting from W (EfficientQAT's Block-AP, arXiv 2407.11062, section 3.2).

    Held in fp32, since a step is smaller than bf16 can tell apart. Its rate is in units of the matrix's mean grid
    step from min/max, so that one suits every layer and width: what matters is how many levels a weight travels.

    Args:
        relative: False has the rate in the weight's own units, as published.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, relative: bool = True) -> None:
        super().__init__()
        groups = to_groups(weight.detach().float(), scheme.group_in(weight.shape[1]))
        step = (groups.amax(-1) - groups.amin(-1)).mean().item() / (2**scheme.bits - 1)
        self.units = {"value": max(step, SCALE_FLOOR)} if relative else {}
        self.value = nn.Parameter(weight.detach().float().clone())

    def forward(self, weight: Tensor) -> Tensor:
        return self.value


class Steps(nn.Module):
    """V = W / s is trained, and Q = clamp(round(V) + z): a code changes when V does, never because s did.

    With s trained too, what a group's codes stand for moves with it, as where codes are frozen; a weight in its own
    units would stay where it is, and s only choose other codes for it.

    Args:
        scale: of the grid that the weight is on, fp32 [out, G, 1].
    """

    def __init__(self, weight: Tensor, scheme: Scheme, *, scale: Tensor) -> None:
        super().__init__()
        steps = to_groups(weight.detach().float(), scheme.group_in(weight.shape[1])) / scale
        self.value = nn.Parameter(from_groups(steps, weight.shape[1]).contiguous())

    def forward(self, weight: Tensor) -> Tensor:
        return self.value
