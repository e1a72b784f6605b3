"""SignSGD: p -= lr * sign(grad). No momentum, no decay.

SignRound's optimizer (arXiv 2309.05516): with lr falling linearly from 1/T to 0, a parameter can travel
at most half of one unit, which is what a rounding offset needs. The rate may be a tensor on the device,
so that a CUDA graph of the step reads the rate of the moment.
"""

from collections.abc import Iterable
from typing import Any

import torch


class SignSGD(torch.optim.Optimizer):
    """Signed gradient descent over groups of parameters, each with its `lr` (float or 0-d tensor)."""

    def __init__(self, params: Iterable[Any], lr: float | torch.Tensor = 5e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            signs = [p.grad for p in params]
            torch._foreach_sign_(signs)
            torch._foreach_mul_(signs, group["lr"])
            torch._foreach_sub_(params, signs)


OPTIMIZERS = {"signsgd": SignSGD}
