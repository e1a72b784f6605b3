"""The laws that hold over whole registries, so that a new slot or recipe is tested without a new line.

Law 1: conversion is exact. Law 5: a fit is never worse than where it started. Law 2 is kept in
formats/test_formats.py, law 3 in kernels/test_kernels.py.
"""

import copy
import dataclasses
import functools
import itertools
import math
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import planish
from planish import quant
from planish.fit.watch import Setting
from planish.kernels.linear import packed_layers
from planish.log import Event
from planish.quant import (
    Clip,
    Fixed,
    Free,
    Given,
    Learned,
    LowRank,
    LowRankSteps,
    MinMax,
    Nearest,
    Offset,
    QLinear,
    Quantizer,
    Searched,
    Steps,
    TunedMinMax,
    Unclipped,
)
from planish.recipes import RECIPES, build, describe
from planish.scheme import Scheme
from planish.source import open_source
from planish.teacher import Teacher, teacher_of
from planish.tune import tune

CPU = torch.device("cpu")
IDS = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(0))
WEIGHTS = {"fixed": Fixed, "free": Free, "low rank": LowRank}
RANGES: dict[str, Callable[..., nn.Module]] = {
    "minmax": MinMax,
    "searched": Searched,
    "tuned": TunedMinMax,
    "learned": Learned,
    "clip": Clip,
    "clip-from-search": functools.partial(Clip, search=True),
    "tuned-from-minmax": functools.partial(TunedMinMax, search=False),
}
ROUNDINGS = {"nearest": Nearest, "offset": Offset}
SCHEMES = [
    Scheme(bits=bits, group_size=group, symmetric=symmetric)
    for bits, group, symmetric in itertools.product([2, 3, 4, 6, 8], [32, 64, 128, None], [True, False])
]
SCHEMES.append(Scheme.parse("w3g16k"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# one that all groups divide, and a ragged one
SHAPES = [(6, 256), (5, 200)]


def test_every_slot_is_here() -> None:
    exported = {getattr(quant, name) for name in quant.__all__}
    elsewhere = {LowRankSteps, Given, Unclipped, Steps}  # quant/test_low_rank.py, quant/test_quantizer.py
    slots = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, nn.Module)}
    slots -= {Quantizer, QLinear} | elsewhere
    listed = {kind for kind in [*WEIGHTS.values(), *ROUNDINGS.values(), *RANGES.values()] if isinstance(kind, type)}
    assert slots == listed


def quantizer_of(weight: Tensor, scheme: Scheme, weight_slot: str, range_slot: str, rounding_slot: str) -> Quantizer:
    """A quantizer whose parameters are nowhere near their start."""
    generator = torch.Generator().manual_seed(1)
    quantizer = Quantizer(
        weight,
        scheme,
        weight_slot=WEIGHTS[weight_slot],
        range_slot=RANGES[range_slot],
        rounding_slot=ROUNDINGS[rounding_slot],
        importance=torch.rand(weight.shape[1], generator=generator).to(weight.device),
    )
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator).to(weight.device)
    return quantizer.to(weight.device)


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Weights with a group of zeros, one of tiny values and one with an outlier."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 10
    weight[0, :128], weight[1, :32], weight[2, 3] = 0, weight[1, :32] * 1e-6, 7
    return weight.to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("weight_slot", WEIGHTS)
@pytest.mark.parametrize("range_slot", RANGES)
@pytest.mark.parametrize("rounding_slot", ROUNDINGS)
def test_law_1_conversion_is_exact(scheme: Scheme, weight_slot: str, range_slot: str, rounding_slot: str) -> None:
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        weight = weight_of(shape, dtype)
        quantizer = quantizer_of(weight, scheme, weight_slot, range_slot, rounding_slot)
        trained = quantizer.train()(weight)
        quantized = quantizer.eval().quantize(weight)
        assert torch.equal(quantized.dequantize(dtype), trained)
        assert torch.equal(quantizer(weight), trained)
        assert not scheme.symmetric or bool((quantized.scale < 0).any())
        assert len(trained.unique()) > 2


COMPILER = any(map(shutil.which, ("g++", "clang++"))) and Path(sysconfig.get_path("include"), "Python.h").is_file()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler and Python's headers")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("text", "dtype"),
    [("w2g64", torch.bfloat16), ("w3g64asym", torch.float32), ("w3g16k", torch.bfloat16)],
    ids=["sym", "asym", "shared"],
)
@pytest.mark.parametrize("range_slot", ["tuned", "clip"])
def test_law_1_holds_under_compile(text: str, dtype: torch.dtype, device: str, range_slot: str) -> None:
    # many groups: one that differs in a last bit of its scale is enough
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    quantizer = quantizer_of(weight, Scheme.parse(text), "fixed", range_slot, "offset")
    trained = torch.compile(quantizer, fullgraph=True)(weight)
    assert torch.equal(quantizer.quantize(weight).dequantize(dtype), trained)


@functools.cache
def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


FITTED = [name for name in RECIPES if any(stage.fit for stage in build(name).blocks)]
WHOLE = [name for name in RECIPES if build(name).whole]


def test_every_recipe_is_here() -> None:
    assert {*FITTED, *WHOLE, "rtn", "smoothquant", "rotate"} == RECIPES.keys()


@pytest.mark.parametrize("recipe", FITTED)
@pytest.mark.parametrize("scheme", ["w2g32", "w2g32asym", "w4pc"])
@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize("absurd", [False, True], ids=["usual rate", "absurd rate"])
def test_law_5_a_fit_is_never_worse(recipe: str, scheme: str, span: int, absurd: bool) -> None:
    known = describe(recipe)["keys"]
    wanted = {"steps": 40, "epochs": 9, "e2e_epochs": 1, "span": span, "holdout": 3}
    keys = {key: value for key, value in wanted.items() if key in known and (key != "epochs" or "steps" not in known)}
    rates = {key: 1e6 for key in known if absurd and key.endswith("rate")}
    if Scheme.parse(scheme).symmetric:
        rates.pop("e2e_zero_rate", None)  # asking for it on a symmetric grid is an error, not a rate
    assert rates or not absurd, "a recipe that fits has a rate to choose"
    events: list[Event] = []
    planish.quantize(
        tiny_model(),
        recipe,
        scheme,
        data=IDS,
        samples=12,
        seqlen=16,
        progress=events.append,
        device="cpu",
        **keys,
        **rates,
    )
    names = {stage.name for stage in build(recipe).blocks}
    losses = [(event.before, event.after) for event in events if event.index and event.stage in names]
    assert len(losses) == math.ceil(3 / keys.get("span", 1))
    for before, after in losses:
        assert before is not None and after is not None and math.isfinite(after)
        assert after == before if absurd else after <= before
    assert absurd or sum(after for _, after in losses) < 0.98 * sum(before for before, _ in losses)


@functools.cache
def packed_model(scheme: str) -> PreTrainedModel:
    return planish.quantize(tiny_model(), "rtn", scheme, device="cpu")


@functools.cache
def teacher() -> Teacher:
    source = open_source(tiny_model())
    return teacher_of(source, IDS, device=CPU, dtype=torch.float32, micro_batch=4, directory=Path("."))


@pytest.mark.parametrize("recipe", WHOLE)
@pytest.mark.parametrize("scheme", ["w2g32asym", "w4pc"])
@pytest.mark.parametrize("lean", [False, True], ids=["trainer", "lean"])
@pytest.mark.parametrize("absurd", [False, True], ids=["usual rate", "absurd rate"])
def test_law_5_a_whole_model_stage_is_never_worse(
    tmp_path: Path, recipe: str, scheme: str, lean: bool, absurd: bool
) -> None:
    stage = build(recipe, None, {"rank": 4} if "rank" in describe(recipe)["keys"] else {}).whole
    assert stage is not None
    inside = stage.inside is not None
    # 8 steps need more than the usual rate of factors to be seen
    rates = {"scale": stage.rates["scale"]} | ({"factors": 5e-2} if inside else {})
    rates |= {"zero": 1e-2} if "asym" in scheme else {}
    stage = dataclasses.replace(
        stage, rates=dict.fromkeys(rates, 1e6) if absurd else rates, distill=1, steps=8, holdout=3, batch_size=4
    )
    model, events = copy.deepcopy(tiny_model() if inside else packed_model(scheme)), list[Event]()
    if inside:
        torch.manual_seed(0)
        planish.prepare(model, recipe, scheme, rank=4)
    start = [part.quantizer.quantize(part.weight) for part in model.modules() if isinstance(part, QLinear)]  # type: ignore[union-attr]
    start += [layer.qtensor() for layer in packed_layers(model).values()]
    setting = Setting(folder=tmp_path, device=CPU, seed=0, micro_batch=2, lean=lean, progress=events.append)
    outcome = tune(model, stage, IDS, IDS, teacher(), setting)
    losses = [(event.before, event.after) for event in events if event.index]
    assert len(losses) == stage.checks and losses[-1] == (outcome.before, outcome.after)
    best = outcome.before
    for before, after in losses:
        assert before == outcome.before and after is not None and math.isfinite(after) and after <= best
        best = after
    same = [layer.qtensor().equal(was) for layer, was in zip(packed_layers(model).values(), start, strict=True)]
    assert (outcome.after == outcome.before and all(same)) if absurd else outcome.after < 0.995 * outcome.before
