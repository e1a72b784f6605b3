"""A whole-model stage: what is trained, what is kept, and that a killed run goes on to the same scales."""

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

import planish
from planish.errors import PlanishError
from planish.fit import finetune as finetune_module
from planish.fit import lean_loop
from planish.fit.finetune import Guard
from planish.fit.lean import LeanTrainer
from planish.fit.lean_loop import rate_share
from planish.fit.loss import NO_LABEL, in_chunks, next_token
from planish.fit.objective import Objective, logits_of, shifted
from planish.fit.watch import Setting, Watch, begun
from planish.fit.whole import EndToEnd
from planish.kernels.linear import packed_layers
from planish.scheme import Scheme
from planish.source import open_source
from planish.teacher import Teacher, teacher_of
from planish.trainable import free_slots
from planish.tune import tune

CPU = torch.device("cpu")
IDS = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))
STAGE = EndToEnd(name="e2e", rates={"scale": 5e-3}, epochs=4.0, batch_size=4, distill=1.0)


@functools.cache
def float_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@functools.cache
def _quantized(scheme: str) -> Any:
    return planish.quantize(float_model(), "rtn", scheme, device="cpu")


def quantized(scheme: str = "w2g32asym") -> Any:
    return copy.deepcopy(_quantized(scheme))


@functools.cache
def teacher() -> Teacher:
    source = open_source(float_model())
    return teacher_of(source, IDS, device=CPU, dtype=torch.float32, micro_batch=5, directory=Path("."))


def setting(folder: Path, **changed: Any) -> Setting:
    return dataclasses.replace(Setting(folder=folder, device=CPU, seed=0, micro_batch=2), **changed)


def scales(model: nn.Module) -> list[Tensor]:
    return [layer.scale for layer in packed_layers(model).values()]


def held_out(model: Any, stage: EndToEnd = STAGE, count: int = 6) -> float:
    """The stage's loss by ordinary means, on the samples that it holds out."""
    with torch.no_grad():
        ours, theirs = (part(IDS[:count]).logits[:, :-1].flatten(0, 1) for part in (model, float_model()))
    labels = IDS[:count, 1:].flatten()
    return (next_token(ours, labels, theirs, stage.distill, stage.temperature) / len(labels)).item()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
def test_the_loss_falls_and_codes_stay(tmp_path: Path, distill: float, lean: bool) -> None:
    model, stage = quantized(), dataclasses.replace(STAGE, distill=distill, rates={"scale": 5e-3, "zero": 2e-2})
    start = {name: layer.qtensor() for name, layer in packed_layers(model).items()}
    before = held_out(model, stage)
    outcome = tune(model, stage, IDS, IDS, teacher(), setting(tmp_path, lean=lean))
    assert outcome.before == pytest.approx(before, rel=1e-5)
    assert outcome.after == pytest.approx(held_out(model, stage), rel=1e-5)
    assert outcome.after < 0.995 * before
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.qtensor().codes, start[name].codes)
        assert layer.scale.dtype == torch.float16 and not layer.trainable
        assert not torch.equal(layer.scale, start[name].scale)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("scheme", ["w2g32", "w2g32asym"])
def test_norms_and_codes_learn_where_they_may(tmp_path: Path, scheme: str, lean: bool) -> None:
    model, float_norm = quantized(scheme), float_model().model.layers[0].input_layernorm.weight
    rates = {"scale": 5e-3, "norm": 5e-3, "weight": 5e-2, **({"zero": 2e-2} if scheme.endswith("asym") else {})}
    stage = dataclasses.replace(STAGE, rates=rates)
    start = {name: layer.qtensor().codes for name, layer in packed_layers(model).items()}
    before, source = held_out(model, stage), float_model()
    floats = lambda name: source.get_parameter(f"{name}.weight").detach()  # noqa: E731
    outcome = tune(model, stage, IDS, IDS, teacher(), setting(tmp_path, lean=lean), floats)
    assert outcome.before == pytest.approx(before, rel=1e-5), "it starts from what was given"
    assert outcome.after == pytest.approx(held_out(model, stage), rel=1e-5), "what was trained is what is packed"
    alone = quantized(scheme)
    scales_alone = dataclasses.replace(STAGE, rates={"scale": 5e-3})
    assert outcome.after < tune(alone, scales_alone, IDS, IDS, teacher(), setting(tmp_path, lean=lean)).after
    layers = packed_layers(model)
    assert layers.keys() == start.keys() and all(layer.scheme == Scheme.parse(scheme) for layer in layers.values())
    assert any(not torch.equal(layer.qtensor().codes, start[name]) for name, layer in layers.items())
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, float_norm)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_start_from_the_float_ones_within_their_cells() -> None:
    model, source, stage = quantized("w2g32"), float_model(), dataclasses.replace(STAGE, rates={"weight": 1e-3})
    held = {name: layer.qtensor() for name, layer in packed_layers(model).items()}
    strange = next(iter(held))
    made = {name: source.get_parameter(f"{name}.weight").detach() for name in held} | {strange: held[strange].codes}
    free_slots(model, stage, made.__getitem__)
    for name, before in held.items():
        quantizer = model.get_submodule(name).quantizer
        step, middle = before.scale.float().repeat_interleave(32, dim=1), before.dequantize(torch.float32)
        latent = quantizer.get_parameter("weight.value").detach() * step
        if name == strange:
            assert torch.allclose(latent, middle), "another model's weight counts for nothing"
            continue
        assert (((latent - middle) / step).abs() <= 0.4001).all()
        near = ((made[name] - middle) / step).abs() < 0.39
        assert near.any() and torch.allclose(latent[near], made[name][near])
        assert torch.equal(quantizer.quantize(made[name]).codes, before.codes)


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    model = quantized("w2g32")
    for block in model.model.layers:
        block.input_layernorm, block.post_attention_layernorm = nn.Identity(), nn.Identity()
    with pytest.raises(PlanishError, match="the blocks have no norm with a weight to train; drop norm_rate"):
        free_slots(model, dataclasses.replace(STAGE, rates={"norm": 1e-3}))
    layer = next(iter(packed_layers(other := quantized("w2g32")).values()))
    layer.order = torch.arange(layer.in_features, dtype=torch.int32)
    with pytest.raises(PlanishError, match="q_proj has columns in another order, or offsets, and its codes can't be"):
        free_slots(other, dataclasses.replace(STAGE, rates={"weight": 1e-3}))


@pytest.mark.parametrize("lean", [False, True])
def test_an_absurd_rate_keeps_the_start(tmp_path: Path, lean: bool) -> None:
    model = quantized()
    start = scales(model)
    stage = dataclasses.replace(STAGE, rates={"scale": 1e6})
    outcome = tune(model, stage, IDS, IDS, teacher(), setting(tmp_path, lean=lean))
    assert outcome.after == outcome.before
    assert all(map(torch.equal, scales(model), start))


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The first parameter's rate at each step, either way."""
    seen: list[float] = []

    class Watching(Guard):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(kwargs["optimizer"].param_groups[0]["lr"])

    class Noting(LeanTrainer):
        def step(self, batch: Any) -> Any:
            seen.append(self.optimizer.param_groups[0]["lr"])  # type: ignore[attr-defined]
            return super().step(batch)

    monkeypatch.setattr(finetune_module, "Guard", Watching)
    monkeypatch.setattr(lean_loop, "LeanTrainer", Noting)
    return seen


@pytest.mark.parametrize("lean", [False, True])
def test_a_loss_that_is_not_finite_rolls_back(
    tmp_path: Path, lean: bool, rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(Watch):
        def due(self, done: int) -> bool:
            if done in (7, 11):
                for parameter in self.objective.state_dict().values():
                    parameter.fill_(float("nan"))
            return super().due(done)

    for module in (finetune_module, lean_loop):
        monkeypatch.setattr(module, "Watch", Breaks)
    model = quantized()
    before = held_out(model)
    outcome = tune(model, STAGE, IDS, IDS, teacher(), setting(tmp_path, lean=lean))
    # from steps 8 and 12 on it is trained again, with moments of its own; that is said once
    said = [note for note in outcome.notes if "rolled back" in note]
    assert said == ["loss not finite at step 8: rolled back, rate halved"]
    assert outcome.after == pytest.approx(held_out(model), rel=1e-5) and outcome.after < 0.999 * before
    planned = [rate_share(step, len(rates), round(STAGE.warmup * len(rates))) for step in range(len(rates))]
    peaks = [rate / share if share else rates[1] for rate, share in zip(rates, planned, strict=True)]
    peak = peaks[1]
    assert peaks[1:] == pytest.approx([peak] * 7 + [peak / 2] * 4 + [peak / 4] * (len(peaks) - 12))


def test_one_gpu_is_used_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # otherwise the Trainer would copy the objective to both
    assert transformers.TrainingArguments(output_dir=str(tmp_path)).n_gpu == 2
    arguments = finetune_module._arguments(STAGE, setting(tmp_path, device=torch.device("cuda")), 4, 2, 2)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 2


def test_lean_steps_are_the_trainers(tmp_path: Path) -> None:
    # the same windows, rates and units; clipping doesn't bite, and the first steps follow from unrounded moments
    found = []
    for lean in (False, True):
        model, stage = quantized(), dataclasses.replace(STAGE, steps=3, warmup=0.4, checks=1, clip=1e9)
        outcome = tune(model, stage, IDS, IDS, teacher(), setting(tmp_path, lean=lean))
        found.append((outcome, torch.cat([scale.flatten() for scale in scales(model)]).float()))
    start = torch.cat([scale.flatten() for scale in scales(quantized())]).float()
    (trainer, theirs), (lean_one, ours) = found
    assert (lean_one.before, lean_one.after) == pytest.approx((trainer.before, trainer.after), rel=1e-3)
    # one rounding to fp16 hides small differences, the moments' 8 bits make some
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()


@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_both_ways_come_equally_far(tmp_path: Path, distill: float) -> None:
    stage, after = dataclasses.replace(STAGE, distill=distill, rates={"scale": 1e-2}), []
    for lean in (False, True):
        outcome = tune(quantized(), stage, IDS, IDS, teacher(), setting(tmp_path, lean=lean))
        after.append(outcome.after)
        assert outcome.after < outcome.before
    assert after[1] == pytest.approx(after[0], rel=0.02)


@pytest.mark.parametrize(("steps", "warmup"), [(20, 0), (20, 3), (5, 1), (1, 0)])
def test_the_rate_of_a_lean_step(steps: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        assert rate_share(step, steps, warmup) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_recomputing_changes_nothing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = quantized()
        tune(model, STAGE, IDS, IDS, teacher(), setting(tmp_path, checkpointing=checkpointing))
        found.append(scales(model))
    assert all(map(torch.equal, *found))


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All gradients of each step, as the optimizer sees them."""
    seen: list[Tensor] = []

    class Watching(Guard):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            grads = [p.grad for group in kwargs["optimizer"].param_groups for p in group["params"]]
            seen.append(torch.cat([grad.flatten() for grad in grads]).clone())

    monkeypatch.setattr(finetune_module, "Guard", Watching)
    return seen


def test_micro_batches_sum_to_the_batch(tmp_path: Path, gradients: list[Tensor]) -> None:
    # some answers are shorter: parts of a step have different numbers of labels
    labels = IDS.clone()
    labels[::3, 4:] = NO_LABEL
    stage = dataclasses.replace(STAGE, steps=1, clip=1e9)
    for micro in (1, 4):
        tune(quantized(), stage, IDS, labels, teacher(), setting(tmp_path, micro_batch=micro))
    first, second = gradients
    assert torch.allclose(first, second, rtol=1e-3, atol=1e-3 * second.abs().mean().item())


def test_clipping_is_really_applied(tmp_path: Path, gradients: list[Tensor]) -> None:
    for clip in (1e9, 1e-3):
        tune(quantized(), dataclasses.replace(STAGE, clip=clip, steps=2), IDS, IDS, teacher(), setting(tmp_path))
    norms = [gradient.norm().item() for gradient in gradients]
    assert min(norms[:2]) > 2e-3 and norms[2:] == pytest.approx([1e-3, 1e-3], rel=1e-2)


class Killed(Exception):
    """Stands for a kill: nothing behind it runs."""


@pytest.mark.parametrize("lean", [False, True])
def test_a_killed_run_goes_on_to_the_same_scales(tmp_path: Path, lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    how = functools.partial(setting, save_every=5, lean=lean)
    whole = quantized()
    expected = tune(whole, STAGE, IDS, IDS, teacher(), how(tmp_path / "whole"))
    assert {folder.name for folder in (tmp_path / "whole").iterdir()} == {"checkpoint-15", "checkpoint-18"}
    kinds = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert kinds == {".safetensors", ".json"}

    class Dies(Watch):
        def due(self, done: int) -> bool:
            if done == 13:
                raise Killed
            return super().due(done)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        for module in (finetune_module, lean_loop):
            patch.setattr(module, "Watch", Dies)
        tune(quantized(), STAGE, IDS, IDS, teacher(), how(tmp_path / "cut"))
    assert begun(tmp_path / "cut")["lean"] is lean and begun(tmp_path) == {}
    # a checkpoint that was cut short isn't taken
    (tmp_path / "cut" / "checkpoint-12").mkdir()
    again = quantized()
    found = tune(again, STAGE, IDS, IDS, teacher(), how(tmp_path / "cut", resume=True))
    assert found == expected
    assert all(map(torch.equal, scales(again), scales(whole)))

    other = dataclasses.replace(STAGE, name="another")
    with pytest.raises(PlanishError, match="of another run: stage was 'e2e' and is 'another'"):
        tune(quantized(), other, IDS, IDS, teacher(), how(tmp_path / "cut", resume=True))
    with pytest.raises(PlanishError, match=f"of another run: lean was {lean} and is {not lean}"):
        tune(quantized(), STAGE, IDS, IDS, teacher(), how(tmp_path / "cut", resume=True, lean=not lean))


def test_lean_training_is_not_tracked(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match="writes nothing for wandb; drop --track"):
        setting(tmp_path, lean=True, track="wandb")


def test_chunks_add_up() -> None:
    objective = Objective(float_model(), planish.arch.discover(float_model()), distill=0.3,
                          teacher_logits=lambda hidden: hidden @ torch.ones(64, 64))  # fmt: skip
    hidden, theirs = (torch.randn(2, 50, 64, requires_grad=grad) for grad in (True, False))
    labels = torch.randint(0, 64, (2, 50))
    labels[0, :20] = NO_LABEL
    found = objective.of_hidden(hidden, labels, theirs)
    whole = next_token(logits_of(float_model())(hidden.flatten(0, 1)), labels.flatten(),
                       theirs.flatten(0, 1) @ torch.ones(64, 64), 0.3)  # fmt: skip
    assert torch.allclose(found, whole, rtol=1e-5)
    for size in (7, 100):
        again = in_chunks(hidden.flatten(0, 1), lambda piece, part: (piece * piece).sum(), size)
        (grad,) = torch.autograd.grad(again, hidden)
        assert torch.allclose(grad, 2 * hidden.detach())


def test_labels_move_to_what_predicts_them() -> None:
    assert shifted(torch.tensor([[1, 2, NO_LABEL, 4]])).tolist() == [[2, NO_LABEL, 4, NO_LABEL]]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rates": {"scale": 0.0}}, "the learning rate of scale is 0.0; it must be above 0"),
        ({"distill": 1.5}, "isn't a share"),
        ({"temperature": 0.0}, "temperature and clip must be above 0"),
        ({"epochs": 0.0}, "epochs=0.0; give more than 0"),
    ],
)
def test_refused_stages(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanishError, match=said):
        dataclasses.replace(STAGE, **keys)
