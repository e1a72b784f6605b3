"""Optimizers of a fit, by name. Each takes groups of parameters whose `lr` is a tensor on the device, so that a
CUDA graph of the step reads the rate of the moment; none decays weights. And `Rated`, AdamW of a whole model.

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


class Rated(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with a rate for each parameter, in a few launches and a few lines of Python for all.

    torch has a rate a group, and goes through groups one by one, in Python: some hundred matrices, each with a unit of
    its own, would be as many groups and launches. A step needs room for one more copy of what is trained.

    Args:
        groups: "params", "rates" (one for each of them), "weight_decay"; all are multiplied by the group's `lr`.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(groups, {"lr": 1.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            pairs = zip(group["params"], group["rates"], strict=True)
            members = [(p, group["lr"] * rate) for p, rate in pairs if p.grad is not None]
            if members:
                self._step(group, [p for p, _ in members], [rate for _, rate in members])

    def _step(self, group: dict[str, Any], params: list[torch.Tensor], rates: list[float]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                                 "exp_avg_sq": torch.zeros_like(p)}  # fmt: skip
        grads, states = [p.grad for p in params if p.grad is not None], [self.state[p] for p in params]
        steps, means, squares = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        first, second = ([1 - beta ** float(step) for step in steps] for beta in group["betas"])
        if group["weight_decay"]:
            torch._foreach_mul_(params, [1 - rate * group["weight_decay"] for rate in rates])
        torch._foreach_lerp_(means, grads, 1 - group["betas"][0])
        torch._foreach_mul_(squares, group["betas"][1])
        torch._foreach_addcmul_(squares, grads, grads, 1 - group["betas"][1])
        # m / first / (sqrt(v / second) + eps), its constants drawn together
        sizes = torch._foreach_sqrt(squares)
        torch._foreach_add_(sizes, [group["eps"] * share**0.5 for share in second])
        constants = zip(rates, first, second, strict=True)
        torch._foreach_addcdiv_(params, means, sizes, [-rate * two**0.5 / one for rate, one, two in constants])


def adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW without decay, in one kernel where there is a GPU."""
    groups = list(params)
    device = groups[0]["params"][0].device
    on_gpu = device.type == "cuda"
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=on_gpu, capturable=on_gpu)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"signsgd": SignSGD, "adamw": adamw}
