"""Factors inside the quantizer, from a float model to a folder: what was trained is what is written, and what it may
start from."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import planish
from planish import tune as tune_module
from planish.arch import discover
from planish.errors import PlanishError
from planish.fit import finetune as finetune_module
from planish.fit import lean_loop
from planish.fit.objective import Objective
from planish.folder import QuantizedFolder
from planish.forecast import forecast
from planish.inside import moved_into_cells
from planish.kernels.linear import packed_layers
from planish.log import Event
from planish.quant import QLinear, Quantizer, Searched
from planish.recipes import build
from planish.scheme import Scheme
from planish.trainable import free_slots
from planish.ways import wants_checkpointing, whole_size

Tiny = Callable[..., Path]
GB = 10**9
IDS = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
CONFIG = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
          "initializer_range": 0.1}  # fmt: skip
FEW: dict[str, Any] = {"rank": 4, "steps": 2, "batch_size": 4, "search": False}
DATA: dict[str, Any] = {"data": IDS, "samples": 8, "seqlen": 16, "device": "cpu"}


@functools.cache
def _float_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def float_model() -> Any:
    return copy.deepcopy(_float_model())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def train(model: Any, recipe: str, steps: int = 3, **keys: Any) -> tuple[float, float]:
    """A loop of one's own, by the recipe's rates; the loss before and after."""
    optimizer, losses = torch.optim.AdamW(planish.parameter_groups(model, recipe, **keys)), []
    for _ in range(steps + 1):
        loss = model.train()(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("l4q", "w4g32", {}),
    ("l4q", "w2g32asym", {"search": False}),
    ("l4q", "w3g64", {"base": "int8"}),
    ("l4q", "w4g32asym", {"offset": "float"}),
    ("lrqat", "w2g32", {}),
    ("lrqat", "w3g32asym", {}),
]


@pytest.mark.parametrize(("recipe", "scheme", "keys"), KINDS)
def test_a_loop_trains_it_and_it_is_saved_as_trained(
    tmp_path: Path, recipe: str, scheme: str, keys: dict[str, Any]
) -> None:
    model, keys = float_model(), {"rank": 4, "rate": 0.05, **keys}
    assert planish.prepare(model, recipe, scheme, **keys) is model
    slots = {name.rpartition(".")[2] for name, value in model.named_parameters() if value.requires_grad}
    grid = {"offset"} if "offset" in keys else {"zero"} if recipe == "l4q" and "asym" in scheme else set()
    assert slots == {"a", "b", "scale"} | grid
    before, after = train(model, recipe, **keys)
    assert after < before
    trained = logits(model)
    assert torch.equal(logits(planish.convert(model)), trained)
    assert not any(value.requires_grad for value in model.parameters()) and len(packed_layers(model)) == 14
    planish.save(model, tmp_path / "out", format="native" if "offset" in keys else "auto")
    assert torch.equal(logits(planish.load(tmp_path / "out", device="cpu", dtype=torch.float32)), trained)


def test_rates_are_in_steps_of_the_grid() -> None:
    # one step of Adam moves every element by its rate: B that of W' by `rate` grid steps, in the root mean square
    model = planish.prepare(float_model(), "l4q", "w4g32", rank=8, rate=0.01)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    step = layer.quantizer.range.scale.abs().mean().item()
    before = layer.quantizer.weight(layer.weight).detach().clone()
    for group in planish.parameter_groups(model, "l4q", rank=8, rate=0.01):
        for parameter in group["params"]:
            if parameter is layer.quantizer.weight.b:
                parameter.data += group["lr"]
    moved = layer.quantizer.weight(layer.weight).detach() - before
    # A is random
    assert moved.square().mean().sqrt().item() == pytest.approx(0.01 * step, rel=0.3)


@pytest.mark.parametrize("way", ["trainer", "lean", "own loop"])
def test_factors_alone_decay(way: str) -> None:
    keys: dict[str, Any] = {"rank": 4, "rate": 0.5, "scale_rate": 0.5, "zero_rate": 0.5, "relative": False}
    model, stage = planish.prepare(float_model(), "l4q", "w4g32asym", **keys), build("l4q", None, keys).whole
    assert stage is not None and stage.weight_decay == 0.01, "the publication's"
    stage, slots = dataclasses.replace(stage, weight_decay=0.2), free_slots(model, stage)
    if way == "trainer":
        optimizer = finetune_module._optimizer(slots, stage)
    elif way == "lean":
        optimizer = lean_loop._optimizer(Objective(model, discover(model, QLinear)), slots, stage, 0)
    else:
        optimizer = torch.optim.AdamW(planish.parameter_groups(model, "l4q", weight_decay=0.2, **keys))
    before = {slot: [value.detach().clone() for value, _ in members] for slot, members in slots.items()}
    for value, _ in (pair for members in slots.values() for pair in members):
        value.grad = torch.zeros_like(value)  # so that decay is all that moves it
    optimizer.step()
    assert before.keys() == {"factors", "scale", "zero"} and any(value.any() for value in before["factors"])
    for slot, members in slots.items():
        for (value, _), was in zip(members, before[slot], strict=True):
            torch.testing.assert_close(value.detach(), was * (0.9 if slot == "factors" else 1.0))


@pytest.mark.parametrize("recipe", ["l4q", "lrqat"])
def test_from_float_folder_to_folder(tiny_llama: Tiny, tmp_path: Path, recipe: str) -> None:
    base, events = tiny_llama(initializer_range=0.1), list[Event]()
    manifest = planish.finetune(base, tmp_path / "out", recipe, "w4g32", progress=events.append, **DATA, **FEW)
    before, after = manifest.figures["end_to_end"]
    assert after <= before and manifest.recipe == recipe and manifest.format == "auto_round"
    found = QuantizedFolder.open(tmp_path / "out")
    assert found is not None and len(found.schemes) == 14 and manifest.scheme == "w4g32"
    tensors = {name.rpartition(".")[2] for name in found.source.names()}
    assert tensors == {"weight", "qweight", "qzeros", "scales"}, "codes and scales, no factor is left"
    assert events[-1].after == after
    again = planish.finetune(base, tmp_path / "again", recipe, "w4g32", **DATA, **FEW)
    assert again.figures["end_to_end"] == [before, after], "the factors start by the seed"


def test_stopped_it_goes_on_to_the_same_codes(tiny_llama: Tiny, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if event.index == 5:
            raise Stopped

    base, keys = tiny_llama(initializer_range=0.1), {**FEW, "steps": 6, "rate": 0.05}
    whole = planish.finetune(base, tmp_path / "whole", "l4q", "w4g32", **DATA, keys=keys)
    how = {**DATA, "keys": keys, "save_every": 2}
    with pytest.raises(Stopped):
        planish.finetune(base, tmp_path / "out", "l4q", "w4g32", progress=stop, **how)
    again = planish.finetune(base, tmp_path / "out", "l4q", "w4g32", resume=True, **how)
    assert again.figures["end_to_end"] == whole.figures["end_to_end"]
    one, other = (QuantizedFolder.open(tmp_path / name) for name in ("whole", "out"))
    assert one is not None and other is not None
    pairs = zip(one.layers(), other.layers(), strict=True)
    assert all(first.equal(second) for (_, first), (_, second) in pairs)


def test_quantize_takes_it_too() -> None:
    model = planish.quantize(float_model(), "l4q", "w4g32", **DATA, **FEW)
    assert len(packed_layers(model)) == 14


@pytest.fixture
def started(tiny_llama: Tiny, tmp_path: Path) -> tuple[Path, Path]:
    """A float model, and the same by another recipe at 2 bits."""
    base = tiny_llama(initializer_range=0.1)
    planish.quantize_to(base, tmp_path / "q2", "block_ap", "w2g32asym", **DATA, steps=8, rate=0.2)
    return base, tmp_path / "q2"


@pytest.mark.parametrize(("recipe", "keys"), [("l4q", {}), ("l4q", {"base": "int8"}), ("lrqat", {})])
def test_it_starts_where_another_recipe_ended(
    started: tuple[Path, Path], tmp_path: Path, recipe: str, keys: dict[str, Any]
) -> None:
    base, q2 = started
    model = planish.load(base, device="cpu", dtype=torch.float32)
    planish.prepare(model, recipe, start=str(q2), rank=4, **keys)
    # factors start at zero, so that the start is the checkpoint, code by code
    assert torch.equal(logits(model), logits(planish.load(q2, device="cpu", dtype=torch.float32)))
    said: list[Event] = []
    keys = {**FEW, **keys, "start": str(q2), "distill": 1}
    manifest = planish.finetune(base, tmp_path / "out", recipe, progress=said.append, **DATA, keys=keys)
    assert manifest.scheme == "w2g32asym" and any(event.stage == "teacher" for event in said)
    before, after = manifest.figures["end_to_end"]
    assert 0 < after <= before


def test_weights_move_into_cells_only_where_they_must() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, moved = (torch.randn(16, 64, generator=generator) for _ in range(2))
    other = weight + 0.2 * moved
    held = Quantizer(other, Scheme.parse("w2g32asym"), range_slot=Searched).quantize(other)
    near = moved_into_cells(weight, held)
    kept = near == weight
    assert 0.5 < kept.float().mean() < 0.99

    def codes(values: Tensor) -> Tensor:
        steps = (values.view(16, 2, 32) / held.scale.float()[..., None]).round() + held.zero[..., None]  # type: ignore[index]
        return steps.clamp(0, 3).view(16, 64)

    assert torch.equal(codes(near), held.codes.float())
    assert not (codes(weight) == held.codes)[~kept].any()
    # never further than to the cell, and nearer to the code than the weight was
    assert ((near - held.dequantize()).abs() <= (weight - held.dequantize()).abs())[~kept].all()


@pytest.mark.parametrize("base", ["16", "int8"])
def test_the_teacher_is_the_model_without_its_quantizers(base: str) -> None:
    ids = IDS[:2]
    model = planish.prepare(float_model(), "l4q", "w2g32", rank=4, base=base)
    tensors = {name: id(value) for name, value in model.named_parameters()}
    kept = sum(part.numel() for part in float_model().parameters())
    objective = Objective(model, discover(model, QLinear), distill=1.0)
    with torch.no_grad():
        wanted = float_model().model(ids)[0]
    # 8 bits of a weight are a thousandth part of its group's largest away
    torch.testing.assert_close(objective.own_hidden(ids), wanted, rtol=0, atol=0 if base == "16" else 0.1)
    assert not torch.allclose(model.model(ids)[0], wanted, atol=0.1), "and after that its quantizers round again"
    loss = objective(ids, ids)["loss"]
    loss.backward()
    assert loss > 0 and {name: id(value) for name, value in model.named_parameters()} == tensors
    frozen = sum(part.numel() for part in model.parameters() if not part.requires_grad)
    assert frozen == (kept if base == "16" else kept - sum(a * b for a, b in _shapes()))


def _shapes() -> list[tuple[int, int]]:
    return [part.weight.shape for part in float_model().model.layers.modules() if isinstance(part, nn.Linear)]


def test_offsets_in_weight_units_are_native_and_said(tiny_llama: Tiny, tmp_path: Path) -> None:
    base, said = tiny_llama(), list[Event]()
    keys = {**FEW, "offset": "float"}
    manifest = planish.finetune(base, tmp_path / "out", "l4q", "w4g32", progress=said.append, **DATA, keys=keys)
    assert manifest.format == "native" and any("servers don't load" in event.note for event in said)
    with pytest.raises(PlanishError, match="gptq can't hold offsets in weight units; give offset=integer"):
        planish.finetune(base, tmp_path / "other", "l4q", "w4g32", format="gptq", **DATA, keys=keys)


def test_the_size_counts_frozen_weights_and_factors() -> None:
    schemes = {name: Scheme.parse("w4g32asym") for name, part in float_model().named_modules() if _in_block(name, part)}
    for keys in ({}, {"base": "int8"}):
        stage = build("l4q", None, {"rank": 4, **keys}).whole
        assert stage is not None
        size = whole_size(float_model(), schemes, stage, torch.float32)
        model = planish.prepare(float_model(), "l4q", "w4g32asym", rank=4, **keys)
        slots = free_slots(model, stage)
        assert size.trained == sum(part.numel() for members in slots.values() for part, _ in members)
        held = sum(value.nbytes for value in model.state_dict(keep_vars=True).values() if not value.requires_grad)
        assert size.fixed == held - (0 if model.lm_head.weight is not model.model.embed_tokens.weight else 4 * 256 * 64)


def _in_block(name: str, part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and name != "lm_head"


def test_8_bits_are_taken_where_16_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse_16(setting: Any, size: Any, stage: Any, seqlen: int) -> Any:
        tried.append(stage.inside.base)
        if stage.inside.base != "int8":
            raise PlanishError("no room")
        return setting

    monkeypatch.setattr(tune_module, "planned", refuse_16)
    said: list[Event] = []
    planish.quantize(float_model(), "l4q", "w4g32", progress=said.append, **DATA, **FEW)
    assert tried == ["auto", "int8"] and "held in 8 bits: of 16 there is no room" in said[0].note
    with pytest.raises(PlanishError, match="no room"):
        planish.quantize(float_model(), "l4q", "w4g32", **DATA, **FEW, base="16")


def test_7b_fits_24_gb_in_8_bits() -> None:
    llama = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "tie_word_embeddings": False}  # fmt: skip
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(**llama))
    schemes = {name: Scheme.parse("w4g128") for name, part in skeleton.named_modules() if _in_block(name, part)}
    peaks = {}
    for base in ("16", "int8"):
        stage = build("l4q", None, {"base": base}).whole
        assert stage is not None
        size = whole_size(skeleton, schemes, stage, torch.bfloat16)
        checkpointing = wants_checkpointing(size, torch.device("cuda"))
        assert checkpointing
        peaks[base] = size.peak(2048, lean=False, checkpointing=True) / GB
    # predicted, not measured: 1.6 GB of scales with their state, and factors
    assert peaks["int8"] < 0.9 * 24 and peaks["int8"] < 0.75 * peaks["16"]


def test_refusals(started: tuple[Path, Path], tmp_path: Path) -> None:
    base, q2 = started

    def refused(said: str, model: Any = base, scheme: str | None = None, **keys: Any) -> None:
        scheme = scheme if "start" in keys or model is q2 else "w4g32"
        with pytest.raises(PlanishError, match=said):
            planish.finetune(model, tmp_path / "out", "l4q", scheme, **DATA, keys={**FEW, **keys})
        assert not (tmp_path / "out").exists()

    refused(r"rank=33 is above 32, the smaller side of model\.layers\.0\.self_attn\.k_proj; give less", rank=33)
    refused("rank=0 and alpha=1.0; the rank must be 1 or more", rank=0)
    refused("weight_decay=-1.0; it must be 0 or more", weight_decay=-1.0)
    refused("base='int4': did you mean 'int8'", base="int4")
    refused("offset='flaot': did you mean 'float'", offset="flaot")
    refused(f"q2 is quantized already, and l4q keeps the float model; give that one, with start={q2}", q2)
    refused("in w2g32asym, not w4g32; give its own scheme, or drop scheme", scheme="w4g32", start=str(q2))
    refused("isn't quantized; give a folder that Planish wrote, or drop start", start=str(base))
    masked = tmp_path / "masked.jsonl"
    masked.write_text('{"messages": [{"role": "user", "content": "' + "How much is a rivet? " * 40 + '"}]}\n')
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    (base / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    with pytest.raises(PlanishError, match="masked.jsonl holds no answer to a question: this would be a loss over not"):
        planish.finetune(base, tmp_path / "out", "l4q", "w4g32", **{**DATA, "data": masked}, keys=FEW)
    other = tmp_path / "other"
    LlamaForCausalLM(LlamaConfig(**{**CONFIG, "intermediate_size": 160})).save_pretrained(other)
    refused("is of another model: model.layers.0.mlp.down_proj has another shape", other, start=str(q2))
    with pytest.raises(PlanishError, match="rank=33 is above 32, the smaller side of"):
        forecast(planish.resolve(base, "l4q", "w4g32", rank=33), data=IDS, device="cpu")
    with pytest.raises(PlanishError, match="l4q needs a scheme for a float model, such as w4g128"):
        planish.prepare(float_model(), "l4q")
    with pytest.raises(PlanishError, match="quantized already, and l4q keeps the float one; give that"):
        planish.prepare(planish.load(q2, device="cpu"), "l4q", "w2g32")
    with pytest.raises(PlanishError, match="block_ap' trains no whole model, and its rates are of blocks"):
        planish.parameter_groups(float_model(), "block_ap")
    with pytest.raises(PlanishError, match="l4q trains what planish.prepare made of a float model; prepare it first"):
        planish.parameter_groups(float_model(), "l4q")
