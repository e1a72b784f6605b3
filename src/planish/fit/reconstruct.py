"""Reconstruct: fit a span of blocks so that, quantized, it computes what its float self computes.

    minimise over the slots' parameters   loss(block(x; W_hat), target)

x is what the quantized prefix of the model gives (`quant` stream), the target what the float block makes
of the float stream (or of the quantized one). A fixed set of samples is held out: the state kept is the
best on them, step 0 counted, so that a fit is never worse than where it started. A loss that isn't finite
rolls back to that state and halves the rate.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from planish.errors import PlanishError, nearest
from planish.feed import Feed
from planish.fit.loss import squared, trimmed
from planish.fit.optim import OPTIMIZERS
from planish.fit.step import Step
from planish.quant import Quantizer

TARGETS = ("float", "quantized", "both")
NORM, TRANSFORM = "norm", "transform"  # what is trained besides slots
FLOOR = 1 / 20  # of the cosine, as EfficientQAT has it
# epochs that aren't given: as many as pass over PASSED windows, but no fewer and no more than these
PASSED, FEWEST, MOST = 2048, 2.0, 8.0
# a rate that isn't given is this over the root of the steps: 0.0045 of a grid step in 250 steps, 0.0011 in 4096,
# which is what EfficientQAT's 2e-5 comes to
RATE = 0.07
# below this many weights a step is short and compiling doesn't pay
COMPILE_WEIGHTS = 50_000_000


def linear(share: float) -> float:
    """Factor on the rate after a share of the steps."""
    return 1 - share


def cosine(share: float) -> float:
    """Half a cosine from 1 to FLOOR."""
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * share)) / 2


def constant(share: float) -> float:
    """No change."""
    return 1.0


SCHEDULES = {"linear": linear, "cosine": cosine, "constant": constant}


def steps_for(samples: int, batch_size: int, epochs: float | None, *, passed: int, fewest: float) -> int:
    """Optimizer steps of so many epochs; if None, of those that pass over `passed` windows, `fewest` to MOST times."""
    times = min(MOST, max(fewest, passed / samples)) if epochs is None else epochs
    return max(1, round(times * samples / min(batch_size, samples)))


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """How a block is fitted.

    Args:
        steps: optimizer steps a span; None has as many as `epochs` passes over the samples take, and
        epochs: None has as many as pass over `passed` windows, so the more of them, the fewer samples there are.
        batch_size: samples a step.
        rates: slot (or "range.zero", one parameter of it, or "norm", the norms of the blocks, or "transform") ->
            learning rate at step 0, None for one by the number of steps. What isn't named stays as it is.
        schedule: the rate falls "linear" to 0, or as half a "cosine" to FLOOR of it, or stays "constant".
        optimizer: name in `fit.optim.OPTIMIZERS`.
        target: "float" prefix (the field's default) or "quantized": the float block on the quantized stream; or
            their mean, "both", whose gradient is that of the sum of both errors.
        trim: share of elements with the largest errors left out of the loss.
        holdout: samples held out, at most a quarter of all.
        checks: how often the held-out loss is measured after step 0.
        span: consecutive blocks fitted together, the loss taken behind the last.
        compile: whether torch.compile fuses the blocks' elementwise work; None decides by the span's size,
            since compiling takes half a minute, once for all blocks.
    """

    steps: int | None = 200
    epochs: float | None = None
    batch_size: int = 8
    rates: Mapping[str, float | None] = field(default_factory=dict)
    optimizer: str = "signsgd"
    schedule: str = "linear"
    target: str = "float"
    trim: float = 0.0
    holdout: int = 8
    checks: int = 8
    span: int = 1
    compile: bool | None = None
    passed: int = PASSED

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise PlanishError(f"target={self.target!r}: {nearest(self.target, TARGETS)}")
        if self.optimizer not in OPTIMIZERS:
            raise PlanishError(f"optimizer={self.optimizer!r}: {nearest(self.optimizer, OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise PlanishError(f"schedule={self.schedule!r}: {nearest(self.schedule, SCHEDULES)}")
        for slot, rate in self.rates.items():
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                raise PlanishError(f"the learning rate of {slot} is {rate}; it must be above 0")
        if not 0 <= self.trim < 1:
            raise PlanishError(f"trim={self.trim} isn't a share; give 0 to leave nothing out, or such as 0.003")
        steps = 1 if self.steps is None else self.steps
        if min(steps, self.batch_size, self.holdout, self.checks, self.span) < 1:
            raise PlanishError("steps, batch size, holdout, checks and span must be 1 or more")
        if self.epochs is not None and self.epochs <= 0:
            raise PlanishError(f"epochs={self.epochs}; give more than 0")

    def steps_on(self, samples: int) -> int:
        """Optimizer steps for so many samples to train on."""
        if self.steps is not None:
            return self.steps
        return steps_for(samples, self.batch_size, self.epochs, passed=self.passed, fewest=FEWEST)

    def rates_in(self, steps: int) -> dict[str, float]:
        """The rate of each slot in a fit of so many steps."""
        return {slot: RATE / math.sqrt(steps) if rate is None else rate for slot, rate in self.rates.items()}

    def compiled(self, device: torch.device, weights: int) -> bool:
        """Is a span with so many weights to be compiled?"""
        return self.compile if self.compile is not None else device.type == "cuda" and weights >= COMPILE_WEIGHTS


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Held-out loss at step 0 and of the state kept, and what went wrong on the way, if anything did."""

    before: float
    after: float
    notes: tuple[str, ...] = ()


class Samples:
    """Which samples are held out, and in which order the others come: fixed by the seed alone."""

    def __init__(self, count: int, holdout: int, batch_size: int, seed: int) -> None:
        held = max(1, min(holdout, count // 4)) if count > 1 else 0
        self.held_out = torch.arange(held) if held else torch.arange(count)
        self.rest = torch.arange(held, count)
        self.batch_size = min(batch_size, len(self.rest))
        self._generator = torch.Generator().manual_seed(seed)
        self._queue = self.rest[:0]

    def next(self) -> Tensor:
        """Indices of the next batch; every sample comes once an epoch, and an epoch may end within a batch."""
        if len(self._queue) < self.batch_size:
            shuffled = self.rest[torch.randperm(len(self.rest), generator=self._generator)]
            self._queue = torch.cat([self._queue, shuffled])
        batch, self._queue = self._queue[: self.batch_size], self._queue[self.batch_size :]
        return batch


class Best:
    """The parameters at the lowest held-out loss so far."""

    def __init__(self, parameters: Sequence[Tensor], loss: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.loss = loss
        self.state = [p.detach().clone() for p in parameters]

    def offer(self, loss: float) -> None:
        if loss < self.loss:
            self.loss = loss
            torch._foreach_copy_(self.state, [p.detach() for p in self.parameters])

    def restore(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.state)


def slot_groups(
    quantizers: Mapping[str, Quantizer],
    rates: Mapping[str, float],
    besides: Mapping[str, Sequence[Tensor]] | None = None,
) -> list[tuple[list[Tensor], float]]:
    """(parameters, rate) for each slot and unit of rate; every other parameter of a quantizer is frozen.

    Args:
        besides: what rates name that are no slots, NORM and TRANSFORM, and their parameters.
    """
    groups: dict[tuple[str, float], list[Tensor]] = {}
    for quantizer in quantizers.values():
        quantizer.requires_grad_(False)
    for slot, rate in rates.items():
        if slot in (NORM, TRANSFORM):
            found = [(parameter, 1.0) for parameter in (besides or {}).get(slot, ())]
        else:
            found = [pair for quantizer in quantizers.values() for pair in quantizer.trainable(slot)]
        for parameter, unit in found:
            groups.setdefault((slot, rate * unit), []).append(parameter.requires_grad_(True))
    return [(parameters, rate) for (_, rate), parameters in groups.items()]


def reconstruct(
    run: Callable[[Tensor], Tensor],
    quantizers: Mapping[str, Quantizer],
    inputs: Tensor,
    targets: Tensor,
    fit: Reconstruct,
    *,
    device: torch.device,
    micro_batch: int,
    seed: int,
    besides: Mapping[str, Sequence[Tensor]] | None = None,
    capture: bool = True,
) -> Outcome:
    """Fit the quantizers of one span in place.

    Args:
        run: the span with its quantizers on hidden states [batch, tokens, hidden].
        quantizers: by linear.
        inputs, targets: [samples, tokens, hidden], wherever the streams live.
        device: where to compute. micro_batch: samples in one backward pass.
        seed: of the order of samples.
        besides: as of `slot_groups`. capture: as of `Step`.
    """
    samples = Samples(len(inputs), fit.holdout, fit.batch_size, seed)
    steps = fit.steps_on(len(samples.rest))
    groups = slot_groups(quantizers, fit.rates_in(steps), besides)
    measure = functools.partial(trimmed, share=fit.trim) if fit.trim else squared

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        return measure(run(hidden), target)

    held = functools.partial(_held_out_loss, loss, inputs, targets, samples.held_out, device, micro_batch)
    before = held()
    if not groups:
        return Outcome(before=before, after=before)
    best = Best([p for params, _ in groups for p in params], before)
    batches = [samples.next() for _ in range(steps)]
    make_step = functools.partial(
        Step, loss, groups, OPTIMIZERS[fit.optimizer], micro_batch=micro_batch, capture=capture
    )
    with Feed((inputs, targets), batches, device) as feed:
        notes = _descend(fit, feed, steps, make_step, held, best)
    best.restore()
    return Outcome(before=before, after=best.loss, notes=tuple(notes))


def _descend(
    fit: Reconstruct,
    feed: Iterable[tuple[Tensor, ...]],
    steps: int,
    make_step: Callable[..., Step],
    held: Callable[[], float],
    best: Best,
) -> list[str]:
    """Step through the batches, offering the best state what the held-out loss says; notes of what went wrong."""
    every, factor = max(1, steps // fit.checks), SCHEDULES[fit.schedule]
    step, damping, notes = None, 1.0, list[str]()
    for i, (inputs, targets) in enumerate(feed):
        step = step or make_step(inputs=inputs, targets=targets)
        step.inputs.copy_(inputs)
        step.targets.copy_(targets)
        step(damping * factor(i / steps))
        if (i + 1) % every == 0 or i + 1 == steps:
            after = held()
            if torch.isfinite(torch.tensor([after, step.read_total()])).all():
                best.offer(after)
            else:
                best.restore()
                step.forget()
                damping /= 2
                notes.append(f"loss not finite at step {i + 1}: rolled back, rate halved")
    return notes


def _take(stream: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    return stream[indices.to(stream.device)].to(device, non_blocking=True)


@torch.no_grad()
def _held_out_loss(
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    held_out: Tensor,
    device: torch.device,
    micro_batch: int,
) -> float:
    total = torch.zeros((), device=device)
    for part in held_out.split(micro_batch):
        total += loss(_take(inputs, part, device), _take(targets, part, device)) * len(part)
    return total.item() / len(held_out)
