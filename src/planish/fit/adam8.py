"""Adam8: Adam whose two moments take one byte each, updated one parameter at a time.

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
    p -= lr * decay * p,  p -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Between steps, blocks of 256 elements keep codes and their largest |m| and v in fp32 (arXiv 2110.02861):

    m = sign(c) (c / 127)^2 max        int8
    v = (c / 255)^4 max                uint8: the code is the root of sqrt(v), the size that divides

The powers give small elements finer steps than a linear map: sqrt(v) reaches down to 1.5e-5 of its block's
largest, and no code of v is 0, so that nothing is divided by eps alone. v moves by 0.1 % a step, far less
than a code is wide: rounded to nearest it would stand still. It is rounded at random so that its
expectation is exact, from a seed made of (seed, parameter, step), so that a resumed run repeats itself.
Knows nothing of what the parameters mean.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from planish.errors import PlanishError

BLOCK = 256  # elements that share a largest value
CHUNK = 2**12  # blocks updated at a time: 4 MiB for each fp32 temporary
STATE = {"first": torch.int8, "first_max": torch.float32, "second": torch.uint8, "second_max": torch.float32}


class Adam8(torch.optim.Optimizer):
    """Adam with 8-bit moments: 2.03 bytes of state an element.

    Args:
        params: parameters or groups of them as torch.optim takes them, each group with its own `lr`, which
            may be changed between steps; contiguous, any float dtype (updates are computed in fp32). If
            they are given with names, the state is kept under these.
        lr, betas, eps, weight_decay: as in AdamW; a group may have its own `weight_decay` too.
        seed: of the random rounding.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._places: dict[Tensor, tuple[int, str, dict[str, Any]]] = {}
        for group in self.param_groups:
            numbers = range(len(self._places), len(self._places) + len(group["params"]))
            names = group.get("param_names", map(str, numbers))
            for number, name, parameter in zip(numbers, names, group["params"], strict=True):
                self._places[parameter] = number, name, group

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; the gradients are dropped."""
        for parameter in self._places:
            if parameter.grad is not None:
                self.step_one(parameter)

    @torch.no_grad()
    def step_one(self, parameter: Tensor, factor: float = 1.0) -> None:
        """Update one parameter by `factor` times its gradient, and drop the gradient.

        Fit for `parameter.register_post_accumulate_grad_hook`.
        """
        assert parameter.grad is not None
        number, _, group = self._places[parameter]
        state = self.state[parameter]
        if not state:
            state.update(_fresh(parameter))
        state["step"] += 1
        step = int(state["step"])
        generator = self._generator(parameter.device, self.seed + (number << 20) + step)
        values, gradients = parameter.view(-1), parameter.grad.reshape(-1)
        for start in range(0, len(state["first"]), CHUNK):
            rows = slice(start, start + CHUNK)
            moments = {key: state[key][rows] for key in STATE}
            elements = slice(start * BLOCK, (start + CHUNK) * BLOCK)
            update = _chunk(moments, gradients[elements].float() * factor, group, step, generator)
            values[elements].mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)
        parameter.grad = None

    def _generator(self, device: torch.device, seed: int) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(seed)

    def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The moments as flat tensors, "NAME.first" and so on: what safetensors can hold. Rates aren't in it."""
        found = {}
        for parameter, (_, name, _) in self._places.items():
            for key, value in self.state[parameter].items() if parameter in self.state else ():
                found[f"{name}.{key}"] = value
        return found

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        """Take over what `state_dict` gave; parameters that had no step yet start anew.

        Raises:
            PlanishError: if it is of other parameters.
        """
        left = dict(state_dict)
        loaded = {}
        for parameter, (_, name, _) in self._places.items():
            if f"{name}.step" not in left:
                continue
            state = _fresh(parameter)
            for key, like in state.items():
                value = left.pop(f"{name}.{key}", None)
                if value is None or (value.shape, value.dtype) != (like.shape, like.dtype):
                    raise PlanishError(f"the optimizer state doesn't fit {name}; it is of another run, start anew")
                state[key] = value.to(like.device, copy=True)
            loaded[parameter] = state
        if left:
            raise PlanishError(f"the optimizer state holds {next(iter(left))}, which isn't trained here; start anew")
        self.state.clear()
        self.state.update(loaded)


def _fresh(parameter: Tensor) -> dict[str, Tensor]:
    """Moments of 0, [blocks, 256] and [blocks, 1], and the count of steps (on the CPU, so that reading is free)."""
    blocks = -(-parameter.numel() // BLOCK)
    state = {
        key: torch.zeros((blocks, 1 if key.endswith("max") else BLOCK), dtype=dtype, device=parameter.device)
        for key, dtype in STATE.items()
    }
    return {**state, "step": torch.zeros((), dtype=torch.int64)}


def _chunk(
    moments: dict[str, Tensor], gradient: Tensor, group: dict[str, Any], step: int, generator: torch.Generator
) -> Tensor:
    """What to subtract from the elements of `gradient` (fp32 [n]); the moments (views) are brought forward."""
    (beta1, beta2), count = group["betas"], gradient.numel()
    gradient = torch.nn.functional.pad(gradient, (0, -count % BLOCK)).view(-1, BLOCK)
    first = decode_signed(moments["first"], moments["first_max"]).lerp_(gradient, 1 - beta1)
    second = decode_positive(moments["second"], moments["second_max"]).mul_(beta2)
    second.addcmul_(gradient, gradient, value=1 - beta2)
    for key, (codes, largest) in {
        "first": encode_signed(first),
        "second": encode_positive(second, generator),
    }.items():
        moments[key].copy_(codes)
        moments[f"{key}_max"].copy_(largest)
    divisor = second.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    return first.div_(divisor).mul_(group["lr"] / (1 - beta1**step)).view(-1)[:count]


def encode_signed(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [blocks, 256] -> codes int8 and the largest |value| fp32 [blocks, 1]; to nearest."""
    largest = values.abs().amax(1, keepdim=True)
    roots = (values.abs() / _positive(largest)).sqrt_().mul_(127).round_()
    return roots.copysign_(values).to(torch.int8), largest


def decode_signed(codes: Tensor, largest: Tensor) -> Tensor:
    """sign(c) (c / 127)^2 max, fp32."""
    ratio = codes.float().div_(127)
    return ratio.mul_(ratio.abs()).mul_(largest)


def encode_positive(values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """fp32 >= 0 [blocks, 256] -> codes uint8 in [1, 255] and the largest value fp32 [blocks, 1].

    A value between two levels takes the upper one with the probability that makes its expectation exact.
    """
    largest = values.amax(1, keepdim=True)
    ratio = values / _positive(largest)
    low = ratio.sqrt().sqrt_().mul_(255).floor_()
    below, above = _fourth(low), _fourth(low + 1)
    chance = ratio.sub_(below).div_(above.sub_(below))
    low += torch.rand(chance.shape, generator=generator, device=chance.device) < chance
    return low.clamp_(1, 255).to(torch.uint8), largest


def decode_positive(codes: Tensor, largest: Tensor) -> Tensor:
    """(c / 255)^4 max, fp32."""
    return _fourth(codes.float()).mul_(largest)


def _fourth(codes: Tensor) -> Tensor:
    return (codes / 255).square_().square_()


def _positive(largest: Tensor) -> Tensor:
    """A block of zeros is divided by the smallest normal number instead of 0."""
    return largest.clamp(min=torch.finfo(torch.float32).tiny)
