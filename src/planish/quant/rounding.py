"""The rounding slot gives V, which is added to W / s before rounding to the nearest integer.

A slot is a module built from (groups [out, G, g], scheme) whose forward gives V, fp32 [out, G, g], or
None for plain rounding.
"""

import torch
from torch import Tensor, nn

from planish.scheme import Scheme


class Nearest(nn.Module):
    """V = 0: round to nearest, half to even."""

    def __init__(self, groups: Tensor, scheme: Scheme) -> None:
        super().__init__()

    def forward(self) -> None:
        return None


class Offset(nn.Module):
    """V is learned, one for each weight (SignRound, arXiv 2309.05516, equation 3).

    It starts at zero and isn't clamped: sign-SGD with a rate that falls from 1/T to 0 moves it by at
    most half a step of the grid.
    """

    def __init__(self, groups: Tensor, scheme: Scheme) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros_like(groups, dtype=torch.float32))

    def forward(self) -> Tensor:
        return self.v
