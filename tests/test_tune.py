"""The stage behind the blocks: what it will need is known from the skeleton, and decides how it trains."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import planish
from planish import tune as tune_module
from planish import ways as ways_module
from planish.errors import PlanishError
from planish.fit.watch import Setting
from planish.fit.whole import EndToEnd
from planish.kernels.linear import packed_layers
from planish.log import Event
from planish.plan import plan_whole
from planish.scheme import Scheme
from planish.trainable import free_slots
from planish.tune import tune
from planish.ways import planned, wants_checkpointing, whole_size

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CPU_DTYPE, GB = torch.float32, 10**9
IDS = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))
TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
LLAMA_70B = {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def stage(*slots: str, distill: float = 0.0) -> EndToEnd:
    return EndToEnd(name="e2e", rates=dict.fromkeys(slots or ("scale",), 5e-3), batch_size=4, distill=distill)


def model_of(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.2, **config})).eval()


@pytest.mark.parametrize(
    ("scheme", "slots"),
    [
        ("w2g32", ["scale"]),
        ("w3g32asym", ["scale", "zero"]),
        ("w3g32asym", ["scale"]),
        ("w4pcasym", ["zero"]),
        ("w2g32", ["scale", "norm"]),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_size_is_that_of_the_packed_model(scheme: str, slots: list[str], tied: bool) -> None:
    model = model_of(tie_word_embeddings=tied)
    packed = planish.quantize(copy.deepcopy(model), "rtn", scheme, device="cpu", ignore=["o_proj"])
    schemes = {name: Scheme.parse(scheme) for name in packed_layers(packed)}
    size = whole_size(model, schemes, stage(*slots), torch.float32)
    parameters = free_slots(packed, stage(*slots))
    trained = [value for members in parameters.values() for value, _ in members]
    assert size.trained == sum(value.numel() for value in trained) == 3 * size.largest
    held = sum(value.nbytes for value in packed.state_dict(keep_vars=True).values())
    if tied:
        held -= packed.lm_head.weight.nbytes
    assert size.fixed == held - sum(value.nbytes for value in trained)
    shapes = [(layer.out_features, layer.in_features) for layer in packed_layers(packed).values()]
    assert size.weights == sum(a * b for a, b in shapes) and size.dense == 4 * max(a * b for a, b in shapes)
    assert (size.boundary, size.blocks) == (4 * 64, 3)
    other = whole_size(model, schemes, stage(*slots, distill=0.5), torch.float32)
    assert other.fixed - size.fixed == 4 * 64 * 64 and other.logits > size.logits, "the other model's head"


def test_weights_that_are_trained_are_counted() -> None:
    model = model_of()
    packed = planish.quantize(copy.deepcopy(model), "rtn", "w2g32", device="cpu")
    schemes = {name: Scheme.parse("w2g32") for name in packed_layers(packed)}
    before, size = (whole_size(model, schemes, stage(*slots), CPU_DTYPE) for slots in (["scale"], ["scale", "weight"]))
    parameters = free_slots(packed, stage("scale", "weight"))
    assert size.trained == sum(value.numel() for members in parameters.values() for value, _ in members)
    assert size.trained - before.trained == size.weights and size.fixed > before.fixed


@pytest.mark.parametrize(("scheme", "unit"), [("w3g32", 1.0), ("w4g32", 10 / 3)])
def test_weights_of_a_finer_grid_move_faster_in_its_steps(scheme: str, unit: float) -> None:
    slots = free_slots(planish.quantize(model_of(), "rtn", scheme, device="cpu"), stage("scale", "weight"))
    assert {found for _, found in slots["weight"]} == {unit} and unit not in {found for _, found in slots["scale"]}


# measured on an H100 by benchmarks/e2e70b.py: the peak of what torch held
@pytest.mark.parametrize(("scheme", "measured"), [("w2g64", 27.30), ("w4g128", 41.19)])
def test_70b_is_lean_where_it_must_be(scheme: str, measured: float) -> None:
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(**LLAMA_70B))
    names = [name for name, _ in skeleton.named_modules() if name.endswith("_proj")]
    size = whole_size(skeleton, dict.fromkeys(names, Scheme.parse(scheme)), stage(), torch.bfloat16)
    assert size.trained == size.weights // Scheme.parse(scheme).group_in(8192)
    asked = {"seqlen": 4096, "batch_size": 1, "micro_batch": 1, "checkpointing": wants_checkpointing(size, GPU)}
    assert asked["checkpointing"] and not wants_checkpointing(size, CPU)

    def lean(free: float) -> bool:
        return plan_whole(size, **asked, lean=None, free=int(free * GB), host=500 * GB).lean  # type: ignore[arg-type]

    assert not lean(80) and lean(1.03 * measured)
    assert measured * GB < size.peak(4096, lean=True, checkpointing=True) < 1.03 * measured * GB


def setting(folder: Path, **changed: Any) -> Setting:
    return dataclasses.replace(Setting(folder=folder, device=CPU, seed=0, micro_batch=8), **changed)


def test_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    schemes = {name: Scheme.parse("w2g32") for name, _ in model.named_modules() if name.endswith("_proj")}
    size = whole_size(model, schemes, stage(), torch.bfloat16)
    said: list[Event] = []
    on_gpu = setting(tmp_path, device=GPU, progress=said.append)

    def choose(free: float, **changed: Any) -> tuple[bool | None, int]:
        monkeypatch.setattr(ways_module, "gpu_memory", lambda device: int(free))
        found = planned(dataclasses.replace(on_gpu, **changed), size, stage(), 16)
        return found.lean, found.micro_batch

    trainer, least = (size.peak(16, lean=lean, checkpointing=False) for lean in (False, True))
    assert choose(80 * GB) == (False, 4), "no more samples in a pass than in a step"
    assert not said
    assert choose(1.1 * trainer + 1) == (False, 1)
    assert choose(1.1 * trainer - 1)[0] is True
    assert choose(least) == (True, 1)
    assert "trained lean, one block at a time" in said[-1].note and said[-1].stage == "e2e"
    with pytest.raises(PlanishError, match="quantize to fewer bits"):
        choose(1000)
    # the user's word stands
    assert choose(80 * GB, lean=True)[0] is True and choose(1000, lean=False)[0] is False
    with pytest.raises(PlanishError, match="writes nothing for wandb"):
        choose(least, track="wandb")
    # without a GPU it is lean only if it shall be, and takes no more samples in a pass than a step has
    assert planned(setting(tmp_path), size, stage(), 16) == setting(tmp_path, lean=False, micro_batch=4)
    assert planned(setting(tmp_path, lean=True), size, stage(), 16).lean is True


def test_the_trainer_takes_the_first_gpu(
    tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = whole_size(model_of(), {}, stage(), torch.bfloat16)
    monkeypatch.setattr(ways_module, "gpu_memory", lambda device: 80 * GB)
    for device, lean, taken in (("cuda:0", None, False), ("cuda:0", True, True), ("cuda:1", True, True)):
        found = planned(setting(tmp_path, device=torch.device(device), lean=lean), size, stage(), 16)
        assert found.lean is taken
    second = setting(tmp_path, device=torch.device("cuda:1"))
    said = "Trainer takes the first GPU that it sees, not cuda:1; set CUDA_VISIBLE_DEVICES=1 and give the device"
    with pytest.raises(PlanishError, match=said):
        planned(second, size, stage(), 16)

    # of a stage that may be left out where memory is short: it isn't, for this, and nothing was done before
    def refuse(*_: Any) -> Setting:
        return planned(second, size, stage(), 16)

    monkeypatch.setattr(tune_module, "planned", refuse)
    monkeypatch.setattr(tune_module, "trains_on", lambda device: False)
    monkeypatch.setattr(tune_module, "_blocks", lambda run: pytest.fail("blocks were worked on"))
    with pytest.raises(PlanishError, match=said):
        planish.quantize(tiny_llama(), "planish", "w2g32", data=IDS, samples=len(IDS), seqlen=16, device="cpu")


def roomy(**changed: Any) -> EndToEnd:
    return dataclasses.replace(stage("scale", "weight"), if_room=("weight",), **changed)


def test_slots_that_have_no_room_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    schemes = {name: Scheme.parse("w2g32") for name, _ in model.named_modules() if name.endswith("_proj")}
    with_weights, without = roomy().ways()
    assert with_weights == roomy() and (set(without.rates), without.if_room) == ({"scale"}, ())
    size = whole_size(model, schemes, with_weights, torch.bfloat16)
    least = size.peak(16, lean=False, checkpointing=False)
    for device, ask, more in ((GPU, "gpu_memory", 0), (CPU, "host_memory", size.waiting)):
        how = setting(tmp_path, device=device, micro_batch=4)
        monkeypatch.setattr(ways_module, ask, lambda *_, more=more: int(1.1 * least + 1) + more)
        found = planned(how, size, with_weights, 16)
        assert (found.lean, found.micro_batch) == (False, 1), "by halves, until it has room"
        with pytest.raises(PlanishError, match="e2e leaves weights as they are: to train them takes"):
            planned(dataclasses.replace(how, lean=True), size, with_weights, 16)
        monkeypatch.setattr(ways_module, ask, lambda *_, more=more: int(1.1 * least - 1) + more)
        with pytest.raises(PlanishError, match="e2e leaves weights as they are: to train them takes"):
            planned(how, size, with_weights, 16)


def test_a_run_goes_on_with_the_slots_it_began_with(tmp_path: Path) -> None:
    model = model_of()
    size = whole_size(model, {}, roomy(), torch.float32)
    on = setting(tmp_path, resume=True)
    assert planned(on, size, roomy(), 16).lean is False, "nothing was done before"
    packed = planish.quantize(copy.deepcopy(model), "rtn", "w2g32", device="cpu")
    tune(packed, roomy(steps=2).ways()[1], IDS, IDS, None, setting(tmp_path, save_every=1))
    with pytest.raises(PlanishError, match="the run began without weights, and goes on so"):
        planned(on, size, roomy(), 16)
    assert planned(on, size, roomy().ways()[1], 16).lean is False


def test_a_run_goes_on_with_as_many_samples_in_a_pass_as_it_had(tmp_path: Path) -> None:
    packed = planish.quantize(model_of(), "rtn", "w2g32", device="cpu")
    size = whole_size(model_of(), {}, stage(), torch.float32)
    tune(packed, stage("scale"), IDS, IDS, None, setting(tmp_path, save_every=1, micro_batch=2))
    assert planned(setting(tmp_path), size, stage(), 16).micro_batch == 4
    assert planned(setting(tmp_path, resume=True), size, stage(), 16).micro_batch == 2


def test_the_default_recipe_says_what_stays(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"data": IDS, "samples": len(IDS), "seqlen": 16, "device": "cpu", "steps": 2, "e2e_epochs": 1}
    trained: list[EndToEnd] = []
    tuned = tune_module.tune
    monkeypatch.setattr(tune_module, "tune", lambda model, stage, *rest: (trained.append(stage),
                                                                         tuned(model, stage, *rest))[1])  # fmt: skip
    sizes: list[Any] = []
    monkeypatch.setattr(tune_module, "whole_size", lambda *given: (sizes.append(whole_size(*given)), sizes[-1])[1])
    planish.quantize(tiny_llama(), "planish", "w2g32", **how)
    least = int(1.1 * sizes[0].peak(16, lean=False, checkpointing=False)) + sizes[0].waiting
    monkeypatch.setattr(ways_module, "host_memory", lambda: least - 1)
    said: list[Event] = []
    planish.quantize(tiny_llama(), "planish", "w2g32", progress=said.append, **how)
    assert [set(stage.rates) for stage in trained] == [{"scale", "norm", "weight"}, {"scale", "norm"}]
    assert sum("end_to_end leaves weights as they are" in event.note for event in said) == 1
    monkeypatch.setattr(ways_module, "host_memory", lambda: 0)
    planish.quantize(tiny_llama(), "planish", "w2g32", progress=said.append, **how)
    wanted = "end_to_end is left out: not even one sample of 16 tokens has room in"
    assert len(trained) == 2 and any(event.note.startswith(wanted) for event in said)


def test_a_run_goes_on_the_way_it_began(tmp_path: Path) -> None:
    model = model_of()
    packed = planish.quantize(copy.deepcopy(model), "rtn", "w2g32", device="cpu")
    tune(packed, dataclasses.replace(stage(), steps=2), IDS, IDS, None, setting(tmp_path, lean=True, save_every=1))
    size = whole_size(model, {}, stage(), torch.float32)
    assert planned(setting(tmp_path, resume=True), size, stage(), 16).lean is True
    assert planned(setting(tmp_path, resume=True, lean=False), size, stage(), 16).lean is False
    assert planned(setting(tmp_path), size, stage(), 16).lean is False


@pytest.mark.parametrize("lean", [False, True])
def test_memory_that_runs_out(tmp_path: Path, lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # the Trainer is tried with half as many samples in a pass, each time from the start; lean training isn't
    packed = planish.quantize(model_of(), "rtn", "w2g32", device="cpu")
    start = {name: layer.scale for name, layer in packed_layers(packed).items()}
    tried = []

    def full(objective: Any, parameters: Any, windows: Any, stage: Any, setting: Setting) -> None:
        scales = [layer.scale for layer in packed_layers(packed).values()]
        assert all(torch.equal(scale.half(), then) for scale, then in zip(scales, start.values(), strict=True))
        scales[0].data += 1
        tried.append(setting.micro_batch)
        raise torch.OutOfMemoryError

    monkeypatch.setattr("planish.tune.finetune_lean" if lean else "planish.fit.finetune.finetune", full)
    said = "even one block at a time; use shorter" if lean else r"even one sample at a time; train lean \(--lean\)"
    with pytest.raises(PlanishError, match=said):
        tune(packed, stage(), IDS, IDS, None, setting(tmp_path, lean=lean))
    assert tried == ([8] if lean else [8, 4, 2, 1])
    assert not any(layer.trainable for layer in packed_layers(packed).values())


def test_finetune_lean_from_folder_to_folder(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    ids = torch.randint(0, 256, (12, 16), generator=torch.Generator().manual_seed(0))
    planish.quantize_to(tiny_llama(), tmp_path / "q2", "rtn", "w2g32asym", device="cpu")
    keys: dict[str, Any] = {"data": ids, "samples": 12, "seqlen": 16, "device": "cpu", "batch_size": 2}
    said: list[Event] = []
    manifest = planish.finetune(
        tmp_path / "q2", tmp_path / "tuned", "e2e_qp", lean=True, progress=said.append, **keys, keys={"epochs": 3.0}
    )
    before, after = manifest.figures["end_to_end"]
    assert after < before and said[-1].after == after
    both = [planish.load(tmp_path / name, device="cpu") for name in ("q2", "tuned")]
    pairs = zip(*(packed_layers(model).values() for model in both), strict=True)
    assert all(torch.equal(a.codes, b.codes) and not torch.equal(a.scale, b.scale) for a, b in pairs)


def test_a_stage_for_which_memory_is_too_short_is_left_out(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Setting:
        raise PlanishError("of 1 GB there is nothing left")

    monkeypatch.setattr(tune_module, "planned", refuse)
    ids = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"data": ids, "samples": 8, "seqlen": 16, "device": "cpu", "steps": 1}
    figures = planish.quantize_to(tiny_llama(), tmp_path / "q2", "planish", "w2g32", **asked).figures
    assert figures["notes"][-1] == "end_to_end is left out: of 1 GB there is nothing left"
    assert "end_to_end" not in figures and len(packed_layers(planish.load(tmp_path / "q2", device="cpu"))) == 14
    with monkeypatch.context() as short:
        short.setattr(tune_module, "host_memory", lambda: 1000)
        figures = planish.quantize_to(tiny_llama(), tmp_path / "q2b", "planish", "w2g32", **asked).figures
    assert figures["notes"][-1].startswith("end_to_end is left out: packed layers and the best state take")
    del asked["steps"]
    with pytest.raises(PlanishError, match="of 1 GB"):
        planish.quantize_to(tiny_llama(), tmp_path / "other", "efficientqat", "w2g32", epochs=1.0, **asked)


def test_a_recipe_of_two_stages_may_end_lean(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    ids = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    manifest = planish.finetune(
        tiny_llama(), tmp_path / "q2", "efficientqat", "w2g32asym", data=ids, samples=8, seqlen=16, device="cpu",
        lean=True, keys={"epochs": 1.0, "e2e_epochs": 1.0, "batch_size": 4},
    )  # fmt: skip
    before, after = manifest.figures["end_to_end"]
    assert after <= before
