"""The loop over spans: every linear reaches the sink once and in order, blocks are freed, streams stay right."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from planish.errors import PlanishError
from planish.fit import spans
from planish.fit.reconstruct import Outcome, Reconstruct
from planish.fit.seen import input_moments
from planish.fit.spans import Job, Stage, run_stage, trial
from planish.log import Event
from planish.qtensor import QTensor
from planish.quant import MinMax, Offset, QLinear, TunedMinMax
from planish.scheme import Scheme, SchemeMap
from planish.stream import BlockStream

CPU = torch.device("cpu")
IDS = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0))
RATES = {"rounding": 0.05, "range": 0.05}


def tiny(layers: int = 3) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


class Blocks:
    """The blocks of a model in memory, and which of them are loaded."""

    def __init__(self, model: Any) -> None:
        self.model, self.loaded, self.most = model, set(), 0

    @property
    def names(self) -> list[str]:
        return [f"model.layers.{i}" for i in range(len(self.model.model.layers))]

    def load(self, index: int) -> nn.Module:
        self.loaded.add(index)
        self.most = max(self.most, len(self.loaded))
        return self.model.model.layers[index]

    def unload(self, index: int) -> None:
        self.loaded.remove(index)


class Bench:
    """A job over a tiny model, and what came out of it."""

    def __init__(self, stage: Stage, schemes: Mapping[str, Scheme] | None = None, layers: int = 3) -> None:
        self.model = tiny(layers)
        self.blocks = Blocks(self.model)
        self.linears = [
            name for name, part in self.model.named_modules() if isinstance(part, nn.Linear) and "layers" in name
        ]
        self.sunk: list[tuple[str, QTensor]] = []
        self.events: list[Event] = []
        stream = None
        if stage.needs_data:
            stream = BlockStream(self.model.model, self.model.model.layers, IDS, device=CPU, micro_batch=4)
        self.job = Job(
            stage=stage,
            blocks=self.blocks,
            schemes=schemes or dict.fromkeys(self.linears, Scheme.parse("w2g32")),
            stream=stream,
            sink=lambda name, q: self.sunk.append((name, q)),
            device=CPU,
            micro_batch=4,
            seed=0,
        )

    @property
    def stream(self) -> BlockStream:
        assert self.job.stream is not None
        return self.job.stream

    def run(self) -> list[Outcome]:
        return run_stage(self.job, self.events.append)


def stage_of(importance: bool = False, **fit: Any) -> Stage:
    how = Reconstruct(**{"steps": 4, "batch_size": 4, "holdout": 2, "rates": RATES, **fit})
    return Stage(name="test", range=TunedMinMax, rounding=Offset, fit=how, importance=importance)


STAGES = {
    "plain": Stage(name="test"),
    "importance": Stage(name="test", importance=True),
    "span 1": stage_of(),
    "span 2": stage_of(span=2, importance=True),
    "span 9": stage_of(span=9),
}


def forward(model: Any) -> list[Tensor]:
    """Hidden states behind each block, without the final norm."""
    found: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: found.append(output)) for block in model.model.layers
    ]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", STAGES)
def test_every_linear_reaches_the_sink_once_and_in_order(name: str) -> None:
    bench = Bench(STAGES[name])
    originals = {name: bench.model.get_submodule(name) for name in bench.linears}
    weights = {name: part.weight.clone() for name, part in originals.items()}
    bench.run()
    assert [name for name, _ in bench.sunk] == bench.linears and len(bench.linears) == 21
    assert bench.blocks.loaded == set()
    fit = STAGES[name].fit
    assert bench.blocks.most == min(3, fit.span if fit else 1)
    for name, q in bench.sunk:
        # the linears are back in their places, with the weight that was stored
        part = bench.model.get_submodule(name)
        assert part is originals[name] and torch.equal(part.weight, q.dequantize())
        assert str(q.scheme) == "w2g32" and not torch.equal(part.weight, weights[name])
    assert not any(isinstance(part, QLinear) for part in bench.model.modules())


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if stage.needs_data])
def test_streams_end_where_the_float_and_the_quantized_model_do(name: str) -> None:
    bench = Bench(STAGES[name])
    expected = forward(tiny())[-1]
    bench.run()
    torch.testing.assert_close(bench.stream.fp, expected, rtol=1e-5, atol=1e-5)
    if STAGES[name].fit is None:
        return  # nobody asks for the quantized stream
    # where nothing is fitted, nobody asks for the quantized stream and it stays where it is
    wanted = forward(bench.model)[-1] if STAGES[name].fit else bench.model.model.embed_tokens(IDS)
    torch.testing.assert_close(bench.stream.quant, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(bench.stream.fp, bench.stream.quant, atol=1e-3)


@pytest.mark.parametrize(("span", "expected"), [(1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (9, [3])])
def test_spans_cover_all_blocks_and_events_say_how_far(span: int, expected: list[int]) -> None:
    bench = Bench(stage_of(span=span))
    outcomes = bench.run()
    assert [event.index for event in bench.events] == expected and {event.total for event in bench.events} == {3}
    assert [event.name for event in bench.events] == [f"model.layers.{i}" for i in range(0, 3, min(span, 3))]
    assert [(event.before, event.after) for event in bench.events] == [(o.before, o.after) for o in outcomes]
    assert bench.events[-1].eta == 0 and bench.events[-1].peak_bytes > 0


def test_without_a_fit_there_is_no_loss_to_tell() -> None:
    bench = Bench(STAGES["plain"])
    assert bench.run() == [] and [(event.before, event.after) for event in bench.events] == [(None, None)] * 3


def test_only_linears_with_a_scheme_are_touched_and_each_gets_its_own() -> None:
    names = Bench(STAGES["plain"]).linears
    shapes = {name: (64, 64) for name in names}
    schemes = SchemeMap.parse("w2g32", layers=["down_proj=w4g32asym"], ignore=["o_proj", "layers.1"]).resolve(shapes)
    bench = Bench(stage_of(span=2), schemes)
    untouched = {name: bench.model.get_submodule(name).weight.clone() for name in names if name not in schemes}
    bench.run()
    assert {name: q.scheme for name, q in bench.sunk} == schemes and len(schemes) == 12
    assert all(torch.equal(bench.model.get_submodule(name).weight, weight) for name, weight in untouched.items())


def test_a_span_without_any_linear_passes() -> None:
    names = Bench(STAGES["plain"]).linears
    schemes = {name: Scheme.parse("w2g32") for name in names if "layers.2" in name}
    bench = Bench(stage_of(importance=True), schemes)
    first, *_ = bench.run()
    assert first.before == first.after == 0 and len(bench.sunk) == 7


@pytest.mark.parametrize("target", ["float", "quantized", "both"])
def test_what_a_fit_gets(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    bench, calls = Bench(stage_of(target=target)), []

    def spy(run: Any, quantizers: Any, inputs: Tensor, targets: Tensor, *args: Any, seed: int, **how: Any) -> Outcome:
        calls.append((inputs.clone(), targets.clone(), seed, list(quantizers)))
        return Outcome(before=0, after=0)

    monkeypatch.setattr(spans, "reconstruct", spy)
    bench.run()
    floats, blocks = forward(tiny()), tiny().model.layers
    quantized = [bench.model.model.embed_tokens(IDS), *forward(bench.model)]
    for index, (inputs, targets, seed, names) in enumerate(calls):
        torch.testing.assert_close(inputs, quantized[index], rtol=1e-5, atol=1e-5)
        on_quantized = bench.stream.run(blocks[index], index, inputs)
        mean = (floats[index] + on_quantized) / 2
        wanted = {"float": floats[index], "quantized": on_quantized, "both": mean}[target]
        torch.testing.assert_close(targets, wanted, rtol=1e-5, atol=1e-5)
        assert seed == index and names == [name for name in bench.linears if f"layers.{index}." in name]
    assert len(calls) == 3


def test_ranges_are_told_how_large_each_input_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    class Told(MinMax):
        def __init__(self, groups: Tensor, scheme: Scheme, importance: Tensor | None = None) -> None:
            super().__init__(groups, scheme)
            assert importance is not None
            told.append(importance.flatten())

    bench = Bench(Stage(name="test", range=Told, importance=True))
    model, expected = tiny(), []
    for name in bench.linears:
        hook = model.get_submodule(name).register_forward_pre_hook
        hook(lambda module, args: expected.append(args[0].square().mean((0, 1))))
    with torch.no_grad():
        model(IDS, use_cache=False)
    bench.run()
    assert len(told) == len(expected) == 21
    for found, plain in zip(told, expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


def test_input_moments_leaves_no_hooks_behind() -> None:
    linear = nn.Linear(4, 4)
    with pytest.raises(RuntimeError):
        input_moments({"a": linear}, lambda: linear(torch.ones(1, 5)))
    assert not linear._forward_pre_hooks
    assert input_moments({"a": linear}, lambda: linear(torch.full((2, 3, 4), 2.0)))["a"].tolist() == [4] * 4
    assert input_moments({"a": linear}, lambda: None) == {}


def test_products_are_those_of_each_groups_inputs_and_padding_is_zero() -> None:
    linear, x = nn.Linear(20, 4), torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    found = input_moments({"a": linear, "b": linear}, lambda: linear(x), {"a": 8})
    assert found["a"].shape == (3, 8, 8) and found["b"].shape == (20,)
    flat = functional.pad(x.flatten(0, 1), (0, 4)).unflatten(1, (3, 8))
    torch.testing.assert_close(found["a"], torch.einsum("tgi,tgj->gij", flat, flat) / 6)
    torch.testing.assert_close(found["a"].diagonal(dim1=1, dim2=2).flatten()[:20], found["b"])
    assert bool((found["a"][2, 4:] == 0).all())


@pytest.mark.parametrize("products", [True, False])
def test_long_groups_are_told_squares_only(monkeypatch: pytest.MonkeyPatch, products: bool) -> None:
    told = []

    class Told(MinMax):
        def __init__(self, groups: Tensor, scheme: Scheme, importance: Tensor | None = None) -> None:
            super().__init__(groups, scheme)
            assert importance is not None
            told.append(tuple(importance.shape))

    monkeypatch.setattr(spans, "PRODUCTS_GROUP", 64)
    bench = Bench(Stage(name="test", range=Told, importance=True, products=products), layers=1)
    bench.job = dataclasses.replace(bench.job, schemes=dict.fromkeys(bench.linears, Scheme.parse("w4pc")))
    bench.run()
    # rows of 64 inputs but for down_proj's 96
    assert told == [(1, 64, 64) if products else (1, 64)] * 6 + [(1, 96)]


def test_what_went_wrong_is_in_the_event(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(stage_of())
    monkeypatch.setattr(spans, "reconstruct", lambda *args, **how: Outcome(before=2, after=1, notes=("a", "b")))
    bench.run()
    assert [event.note for event in bench.events] == ["a; b"] * 3


def out_of_memory_above(micro_batch: int, tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    original = spans.reconstruct

    def short(*args: Any, **how: Any) -> Outcome:
        tried.append(how["micro_batch"])
        if how["micro_batch"] > micro_batch:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **how)

    monkeypatch.setattr(spans, "reconstruct", short)


@pytest.mark.parametrize("importance", [False, True])
def test_trial_halves_the_micro_batch_until_a_step_fits(monkeypatch: pytest.MonkeyPatch, importance: bool) -> None:
    bench, tried = Bench(stage_of(span=2, importance=importance)), []
    bench.job = dataclasses.replace(bench.job, micro_batch=8)
    before = [p.clone() for p in bench.model.parameters()]
    streams = bench.stream.fp.clone(), bench.stream.quant.clone()
    out_of_memory_above(3, tried, monkeypatch)
    job = trial(bench.job)
    assert tried == [8, 4, 2] and job.micro_batch == 2 and job.stage is bench.job.stage
    # a rehearsal leaves no trace
    assert all(map(torch.equal, bench.model.parameters(), before)) and bench.sunk == []
    assert not any(isinstance(part, QLinear) for part in bench.model.modules()) and bench.blocks.loaded == set()
    assert torch.equal(bench.stream.fp, streams[0]) and torch.equal(bench.stream.quant, streams[1])


def test_trial_gives_up_below_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, tried = Bench(stage_of()), []
    out_of_memory_above(0, tried, monkeypatch)
    with pytest.raises(PlanishError, match="doesn't fit the GPU even one sample at a time; use shorter samples"):
        trial(bench.job)
    assert tried == [4, 2, 1] and bench.blocks.loaded == set()
    assert not any(isinstance(part, QLinear) for part in bench.model.modules())


def test_trial_takes_the_span_of_most_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Bench(STAGES["plain"], layers=5).linears
    schemes = {name: Scheme.parse("w2g32") for name in names if "layers.3" in name or "q_proj" in name}
    bench, loaded = Bench(stage_of(span=2), schemes, layers=5), []
    monkeypatch.setattr(bench.blocks, "load", lambda i: (loaded.append(i), Blocks.load(bench.blocks, i))[1])
    trial(bench.job)
    assert loaded == [2, 3]


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_micro_batch_changes_the_order_of_sums_only(micro_batch: int) -> None:
    found = []
    for size in (4, micro_batch):
        bench = Bench(stage_of(steps=1, checks=1))
        bench.job = dataclasses.replace(bench.job, micro_batch=size)
        found.append(bench.run())
    for a, b in zip(*found, strict=True):
        assert math.isclose(a.before, b.before, rel_tol=0.05) and math.isclose(a.after, b.after, rel_tol=0.05)
