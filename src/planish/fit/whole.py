"""EndToEnd: train the quantized model as a whole: scales move, and zero points, norms or the codes if asked for.

    minimise over s (and z)   (1 - distill) * CE(text) + distill * KL(float model || model),   W_hat = s * (Q - z)

E2E-QP, the second half of EfficientQAT (arXiv 2407.11062), and PEQA (arXiv 2305.14152) are of this kind. Where the
codes move too, Q = round(V) + z and V, a weight in steps of the grid, is trained: quantization-aware training as of
LLM-QAT (arXiv 2305.17888), but s changes no code, as in LR-QAT (arXiv 2406.06385). With factors of low rank inside the
quantizer, a float model is trained so (L4Q, LR-QAT: see `quant.low_rank`). This file says what is trained and how;
`fit.finetune` does it with transformers' Trainer, `fit.lean` in little memory.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from planish.errors import PlanishError, nearest
from planish.fit.reconstruct import steps_for
from planish.quant import Learned, LowRank, LowRankSteps, Searched, Unclipped

# epochs that aren't given: as many as pass over PASSED windows, but no fewer than this
PASSED, FEWEST = 1024, 1.0
BASES = ("auto", "16", "int8")


@dataclass(frozen=True, kw_only=True)
class Inside:
    """Factors of low rank inside the quantizer, and where its grid starts.

    Args:
        rank, alpha: as of `quant.LowRank`.
        in_steps: in steps of the grid, on a frozen weight of 8 bits (LR-QAT); else in the weight's units (L4Q).
        base: what L4Q's frozen weight is held in: "16" (or 32) bits, "int8", or "auto", int8 where memory is short.
        search: the grid starts where it loses least; else at L4Q_init.
        start: a quantized folder of the same model to start from instead.
        offset: an offset in weight units is trained.
    """

    rank: int = 16
    alpha: float = 1.0
    in_steps: bool = False
    base: str = "auto"
    search: bool = True
    start: str = ""
    offset: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not (math.isfinite(self.alpha) and self.alpha > 0):
            raise PlanishError(f"rank={self.rank} and alpha={self.alpha}; the rank must be 1 or more, alpha above 0")
        if self.base not in BASES:
            raise PlanishError(f"base={self.base!r}: {nearest(self.base, BASES)}")

    @property
    def in_8_bits(self) -> bool:
        return self.in_steps or self.base == "int8"

    @property
    def own_teacher(self) -> bool:
        """Do the frozen weights give the float model, to distil from? Those of a start have moved."""
        return not (self.in_steps or self.start)

    @property
    def weight_slot(self) -> Callable[..., nn.Module]:
        if self.in_steps:
            return functools.partial(LowRankSteps, rank=self.rank, alpha=self.alpha)
        return functools.partial(LowRank, rank=self.rank, alpha=self.alpha, int8=self.in_8_bits)

    def range_slot(self, start: Callable[..., nn.Module] | None = None) -> Callable[..., nn.Module]:
        """What builds the range slot, from `start` if that is given."""
        return functools.partial(Learned, start=start or (Searched if self.search else Unclipped), offset=self.offset)


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """One whole-model stage.

    Args:
        name: shown in progress.
        rates: slot ("scale", "zero", "norm": the norms of the blocks, "weight": V; of `inside` "factors" and "offset")
            -> learning rate at its peak. Slots that aren't named stay.
        inside: factors inside the quantizers of a float model; None trains a packed one.
        if_room: slots that are trained by the Trainer, or stay where it has no memory for them.
        relative: rates of scales are in units of each matrix's mean |s|, those of norms of each one's mean size, so
            that one rate suits every layer; else in the numbers' own units, as published.
        distill: share of distillation from the float model in the loss; the rest is cross-entropy.
        temperature: of the distillation.
        steps: optimizer steps; None has as many as `epochs` passes over the samples take, and
        epochs: None has as many as pass over `passed` windows, so the more of them, the fewer samples there are.
        batch_size: samples a step.
        warmup: share of the steps in which the rate rises. Then it falls as half a cosine to 0.
        clip: largest norm of all gradients together.
        betas: of AdamW.
        weight_decay: of AdamW, on the factors alone, since 0 is no place for a scale or a norm to go.
        holdout: samples held out to choose the state that is kept, at most a quarter of all.
        checks: how often the held-out loss is measured after step 0.
        optional: where memory is too short, the run goes without this stage, and says so.
    """

    name: str
    rates: Mapping[str, float] = field(default_factory=dict)
    inside: Inside | None = None
    if_room: tuple[str, ...] = ()
    relative: bool = True
    distill: float = 0.0
    temperature: float = 1.0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    warmup: float = 0.03
    clip: float = 0.3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    holdout: int = 8
    checks: int = 8
    optional: bool = False
    passed: int = PASSED

    def __post_init__(self) -> None:
        for slot, rate in self.rates.items():
            if not (math.isfinite(rate) and rate > 0):
                raise PlanishError(f"the learning rate of {slot} is {rate}; it must be above 0")
        if not 0 <= self.distill <= 1:
            raise PlanishError(f"distill={self.distill} isn't a share; 0 is cross-entropy alone, 1 distillation alone")
        if self.temperature <= 0 or self.clip <= 0 or not 0 <= self.warmup < 1:
            raise PlanishError("temperature and clip must be above 0, warmup a share below 1")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise PlanishError(f"weight_decay={self.weight_decay}; it must be 0 or more")
        steps = 1 if self.steps is None else self.steps
        if min(steps, self.batch_size, self.holdout, self.checks) < 1:
            raise PlanishError("steps, batch size, holdout and checks must be 1 or more")
        if self.epochs is not None and self.epochs <= 0:
            raise PlanishError(f"epochs={self.epochs}; give more than 0")

    @property
    def needs_data(self) -> bool:
        return True

    def ways(self) -> list["EndToEnd"]:
        """The stage and what is tried instead where memory is short: without the slots of `if_room`; with frozen
        weights in 8 bits, where it may choose."""
        if self.if_room:
            rates = {slot: rate for slot, rate in self.rates.items() if slot not in self.if_room}
            return [self, replace(self, rates=rates, if_room=())]
        if self.inside is None or self.inside.in_steps or self.inside.base != "auto":
            return [self]
        return [self, replace(self, inside=replace(self.inside, base="int8"))]

    @property
    def spared(self) -> str:
        """What the next way goes without, in words."""
        return " and ".join(f"{slot}s" for slot in self.if_room)

    def steps_on(self, samples: int) -> int:
        """Optimizer steps for so many samples to train on."""
        if self.steps is not None:
            return self.steps
        return steps_for(samples, self.batch_size, self.epochs, passed=self.passed, fewest=FEWEST)
