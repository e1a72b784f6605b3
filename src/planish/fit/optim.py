"""Optimizers of a fit, by name. Each takes groups of parameters whose `lr` is a tensor on the device, so that a
CUDA graph of the step reads the rate of the moment; none decays weights.

SignSGD: p -= lr * sign(grad). No momentum. SignRound's optimizer (arXiv 2309.05516): with lr falling linearly
from 1/T to 0, a parameter can travel at most half of one unit, which is what a rounding offset needs.
"""

from collections.abc import Callable, Iterable
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


def adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW without decay, in one kernel where there is a GPU."""
    groups = list(params)
    device = groups[0]["params"][0].device
    on_gpu = device.type == "cuda"
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=on_gpu, capturable=on_gpu)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"signsgd": SignSGD, "adamw": adamw}
