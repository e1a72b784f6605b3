"""Reconstruct: which samples are used, what is kept, and what happens when a loss isn't finite."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.fit.loss import squared, trimmed
from planish.fit.optim import OPTIMIZERS, SignSGD
from planish.fit.reconstruct import Best, Outcome, Reconstruct, Samples, reconstruct, slot_groups
from planish.fit.step import Step
from planish.quant import Offset, QLinear, Quantizer, TunedMinMax
from planish.scheme import Scheme

CPU = torch.device("cpu")
RATES = {"rounding": 0.02, "range": 0.02}


class Toy:
    """One quantized linear, its float twin's outputs as target, and what the fit was seen to do."""

    def __init__(self, samples: int = 20) -> None:
        generator = torch.Generator().manual_seed(0)
        linear = nn.Linear(64, 16)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(16, 64, generator=generator))
        # correlated inputs: of independent ones, rounding to nearest is the best there is
        self.inputs = torch.randn(samples, 5, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
        # a sample is recognised by its first value, too small to matter
        self.inputs[:, 0, 0] = torch.arange(samples) / 1000
        with torch.no_grad():
            self.targets = linear(self.inputs)
        quantizer = Quantizer(
            linear.weight.detach(), Scheme.parse("w2g32"), range_slot=TunedMinMax, rounding_slot=Offset
        )
        self.layer = QLinear(linear, quantizer)
        self.trained: list[int] = []
        self.measured: list[int] = []

    def run(self, hidden: Tensor) -> Tensor:
        seen = self.trained if torch.is_grad_enabled() else self.measured
        seen += (hidden[:, 0, 0] * 1000).round().int().tolist()
        return self.layer(hidden)

    def fit(
        self, run: Callable[[Tensor], Tensor] | None = None, *, micro_batch: int = 8, seed: int = 0, **how: Any
    ) -> Outcome:
        fit = Reconstruct(**{"steps": 16, "batch_size": 4, "holdout": 4, "checks": 4, "rates": RATES, **how})
        return reconstruct(
            run or self.run,
            {"linear": self.layer.quantizer},
            self.inputs,
            self.targets,
            fit,
            device=CPU,
            micro_batch=micro_batch,
            seed=seed,
        )

    def held_out(self, count: int = 4) -> float:
        with torch.no_grad():
            return squared(self.layer(self.inputs[:count]), self.targets[:count]).item()

    def state(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.layer.quantizer.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_fit_lowers_the_loss_and_the_outcome_says_how_far() -> None:
    toy = Toy()
    before = toy.held_out()
    outcome = toy.fit(steps=80)
    assert outcome.before == pytest.approx(before) and outcome.after == pytest.approx(toy.held_out())
    assert outcome.after < 0.9 * outcome.before and outcome.notes == ()


def test_no_sample_is_both_held_out_and_trained_on() -> None:
    toy = Toy()
    toy.fit()
    assert set(toy.measured) == {0, 1, 2, 3} and set(toy.trained) == set(range(4, 20))
    assert sorted(toy.trained) == sorted([*range(4, 20)] * 4)


@pytest.mark.parametrize(("count", "batch"), [(20, 4), (20, 5), (21, 8), (9, 8), (2, 8)])
def test_every_sample_once_an_epoch(count: int, batch: int) -> None:
    samples = Samples(count, 4, batch, seed=0)
    rest = set(range(count)) - set(samples.held_out.tolist())
    assert len(samples.held_out) == max(1, min(4, count // 4))
    drawn = [index for _ in range(3 * len(rest)) for index in samples.next().tolist()]
    for start in range(0, len(drawn) - len(rest) + 1, len(rest)):
        assert set(drawn[start : start + len(rest)]) == rest


def test_the_order_is_the_seeds() -> None:
    def order(seed: int) -> list[list[int]]:
        samples = Samples(40, 8, 8, seed)
        return [samples.next().tolist() for _ in range(8)]

    assert order(0) == order(0) != order(1)
    first = order(0)
    assert first[:4] != first[4:], "a new order each epoch"


def test_a_single_sample_is_trained_on_and_measured() -> None:
    samples = Samples(1, 8, 8, seed=0)
    assert samples.held_out.tolist() == samples.next().tolist() == samples.next().tolist() == [0]


def test_same_seed_same_bits_other_seed_others() -> None:
    states = []
    for seed in (0, 0, 1):
        toy = Toy()
        toy.fit(seed=seed)
        states.append(toy.state())
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_an_absurd_rate_restores_step_0() -> None:
    toy = Toy()
    start = toy.state()
    outcome = toy.fit(rates=dict.fromkeys(RATES, 1e8))
    assert outcome.after == outcome.before == pytest.approx(toy.held_out()) and same(toy.state(), start)


def test_what_is_kept_is_the_best_of_all_checks() -> None:
    toy = Toy()
    losses: list[float] = []

    def run(hidden: Tensor) -> Tensor:
        output = toy.layer(hidden)
        if not torch.is_grad_enabled():
            losses.append(squared(output, toy.targets[:4]).item())
        return output

    outcome = toy.fit(run, rates=dict.fromkeys(RATES, 0.5), steps=40, checks=10)
    assert len(losses) == 11 and outcome.before == pytest.approx(losses[0])
    assert outcome.after == pytest.approx(min(losses)) == pytest.approx(toy.held_out())


@pytest.mark.parametrize(("steps", "checks", "expected"), [(16, 4, 5), (10, 4, 6), (3, 8, 4), (1, 1, 2)])
def test_the_last_step_is_always_measured(steps: int, checks: int, expected: int) -> None:
    toy = Toy()
    toy.fit(steps=steps, checks=checks)
    assert len(toy.measured) == 4 * expected


class Spied(SignSGD):
    """SignSGD that notes its first group's rate at each step."""

    rates: list[float]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        Spied.rates.append(float(self.param_groups[0]["lr"]))
        super().step()


def rates_of(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, run: Callable[[Tensor], Tensor] | None = None, **how: Any
) -> tuple[Outcome, list[float]]:
    Spied.rates = []
    monkeypatch.setitem(OPTIMIZERS, "signsgd", Spied)
    return toy.fit(run, rates={"rounding": 1.0}, **how), Spied.rates


def test_the_rate_falls_linearly_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    _, rates = rates_of(Toy(), monkeypatch, steps=8)
    assert rates == pytest.approx([1 - step / 8 for step in range(8)])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("trim", [0.0, 0.1])
def test_a_loss_that_is_not_finite_rolls_back_and_halves_the_rate(
    monkeypatch: pytest.MonkeyPatch, bad: float, trim: float
) -> None:
    toy, calls = Toy(), 0
    measured: list[tuple[float, list[Tensor]]] = []
    resumed: list[Tensor] = []

    def run(hidden: Tensor) -> Tensor:
        nonlocal calls
        output = toy.run(hidden)
        if not torch.is_grad_enabled():
            measured.append((squared(output, toy.targets[:4]).item(), toy.state()))
            return output
        calls += 1
        if calls == 9:  # the first step after the rollback
            resumed.extend(toy.state())
        return output * (bad if calls == 6 else 1)

    outcome, rates = rates_of(toy, monkeypatch, run, trim=trim)
    assert outcome.notes == ("loss not finite at step 8: rolled back, rate halved",)
    assert rates == pytest.approx([(1 - step / 16) * (1 if step < 8 else 0.5) for step in range(16)])
    assert len(measured) == 5 and not same(measured[2][1], measured[0][1])
    _, best = min(measured[:2], key=lambda one: one[0])
    assert same(resumed, best) and all(bool(p.isfinite().all()) for p in toy.state())
    assert math.isfinite(outcome.after) and outcome.after <= outcome.before


def test_a_fit_that_never_is_finite_leaves_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    start = toy.state()

    def run(hidden: Tensor) -> Tensor:
        return toy.run(hidden) * (math.nan if torch.is_grad_enabled() else 1)

    outcome, rates = rates_of(toy, monkeypatch, run)
    assert len(outcome.notes) == 4 and rates[-1] == pytest.approx(1 / 16 / 8)
    assert same(toy.state(), start) and outcome.after == outcome.before


def test_slots_without_a_rate_stay() -> None:
    toy = Toy()
    start = toy.state()
    toy.fit(rates={"rounding": 0.1})
    names = [name for name, _ in toy.layer.quantizer.named_parameters()]
    changed = {name for name, a, b in zip(names, start, toy.state(), strict=True) if not torch.equal(a, b)}
    assert changed == {"rounding.v"} and not toy.layer.quantizer.get_parameter("range.low_factor").requires_grad


def test_nothing_to_train_is_measured_only() -> None:
    toy = Toy()
    outcome = toy.fit(rates={"weight": 0.1})
    assert outcome == Outcome(before=outcome.before, after=outcome.before) and toy.trained == []
    assert slot_groups({"linear": toy.layer.quantizer}, {}) == []


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
@pytest.mark.parametrize("measure", [squared, lambda a, b: trimmed(a, b, 0.1)], ids=["squared", "trimmed"])
def test_micro_batches_add_up_to_the_batch(micro_batch: int, measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = []
    for size in (4, micro_batch):
        p = nn.Parameter(torch.ones(3))
        inputs, targets = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
        step = Step(lambda x, y, p=p: squared(x * p, y), [([p], 0.5)], SignSGD, inputs, targets, size)
        step.inputs.copy_(inputs)
        step.targets.copy_(targets)
        step._once()
        found.append((p.grad, p.detach().clone(), step.read_total()))
        assert step.read_total() == 0
    (_, whole, total), (_, parts, summed) = found
    assert torch.equal(whole, parts) and summed == pytest.approx(total)


def test_squared_is_the_mean_in_fp32() -> None:
    output, target = torch.full((2, 3, 4), 100.0).half(), torch.full((2, 3, 4), -300.0).half()
    assert squared(output, target).item() == 160_000, "which fp16 can't hold"


def test_trimmed_leaves_out_the_largest_errors_and_their_gradient() -> None:
    output = torch.randn(8, 50, 211, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        output[..., 0] = 1e4  # every 211th: the ones that the threshold is read off
        output[..., 0].view(-1)[::2] = 1.0
    loss = trimmed(output, torch.zeros_like(output), 0.51)
    loss.backward()
    assert loss.item() < 1.1 and output.grad is not None
    large = output.detach().abs() > 1.0
    assert bool((output.grad[large] == 0).all()) and bool((output.grad[~large] != 0).any())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_trimming_never_hides_what_is_not_finite(bad: float) -> None:
    output = torch.zeros(4, 50, 10)
    output[1, 7, 3] = bad
    assert not math.isfinite(trimmed(output, torch.zeros_like(output), 0.003).item())


def test_best_keeps_a_copy() -> None:
    p = nn.Parameter(torch.zeros(2))
    best = Best([p], 2.0)
    for value, loss in [(1.0, 3.0), (2.0, 1.0), (3.0, 1.0), (4.0, math.nan)]:
        with torch.no_grad():
            p.fill_(value)
        best.offer(loss)
    best.restore()
    assert p.tolist() == [2, 2] and best.loss == 1.0


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("target", "flaot", "target='flaot': did you mean 'float'?"),
        ("optimizer", "signgd", "optimizer='signgd': did you mean 'signsgd'?"),
        ("trim", 1.0, "trim=1.0 isn't a share"),
        ("trim", -0.1, "trim=-0.1 isn't a share"),
        ("trim", math.nan, "trim=nan isn't a share"),
        *[(key, 0, "must be 1 or more") for key in ("steps", "batch_size", "holdout", "checks", "span")],
    ],
)
def test_refusals(key: str, value: Any, said: str) -> None:
    with pytest.raises(PlanishError) as error:
        Reconstruct(**{key: value})
    assert said in str(error.value)


def test_compiling_is_for_large_spans_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    assert not Reconstruct().compiled(CPU, 10**9) and not Reconstruct().compiled(gpu, 10**6)
    assert Reconstruct().compiled(gpu, 10**9) and Reconstruct(compile=True).compiled(CPU, 1)
    assert not Reconstruct(compile=False).compiled(gpu, 10**9)
