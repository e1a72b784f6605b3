"""prepare and convert: only a recipe's tensors learn, any trainer trains them, what was trained is what is packed."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import planish
from planish.errors import PlanishError
from planish.kernels.linear import packed_layers
from planish.quant import QLinear
from planish.tune import cast_parameters

Tiny = Callable[..., Path]
IDS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
LINEARS = 14
CONFIG = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
          "initializer_range": 0.1}  # fmt: skip


@functools.cache
def _float_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


@functools.cache
def _quantized(scheme: str) -> Any:
    return planish.quantize(_float_model(), "rtn", scheme, device="cpu")


def float_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return cast_parameters(copy.deepcopy(_float_model()), dtype)


def quantized(scheme: str = "w2g32asym") -> Any:
    return copy.deepcopy(_quantized(scheme))


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.qtensor().codes for name, layer in packed_layers(model).items()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def train(model: Any, rate: float, steps: int = 4) -> tuple[float, float]:
    """A loop of one's own; the loss before and after."""
    optimizer, losses = torch.optim.AdamW(learning(model).values(), lr=rate, weight_decay=0), []
    for _ in range(steps + 1):
        loss = model.train()(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize(("keys", "slots"), [({}, {"scale"}), ({"zero_rate": 1e-2}, {"scale", "zero"})])
def test_of_a_quantized_model_the_grid_alone_learns(keys: dict[str, Any], slots: set[str]) -> None:
    model = quantized()
    prepared = planish.prepare(model, "e2e_qp", **keys)
    assert prepared is model
    wanted = {f"{name}.{slot}" for name in packed_layers(model) for slot in slots}
    assert learning(model).keys() == wanted and len(wanted) == LINEARS * len(slots)
    assert all(parameter.dtype == torch.float32 for parameter in learning(model).values())


def test_preparing_changes_no_result() -> None:
    model = quantized()
    before = logits(model)
    assert torch.equal(logits(planish.prepare(model, "e2e_qp", zero_rate=1e-2)), before)
    assert torch.equal(logits(planish.convert(model)), before) and not learning(model)


@pytest.mark.parametrize("keys", [{}, {"zero_rate": 1e-2}])
def test_a_loop_trains_it_and_it_is_saved_as_trained(tiny_llama: Tiny, tmp_path: Path, keys: dict[str, Any]) -> None:
    planish.quantize_to(tiny_llama(), tmp_path / "q", "rtn", "w2g32asym", device="cpu")
    model = planish.load(tmp_path / "q", device="cpu", dtype=torch.float32)
    start, frozen = codes(model), model.lm_head.weight.clone()
    before, after = train(planish.prepare(model, "e2e_qp", **keys), 1e-3)
    assert after < before
    trained = logits(model)
    planish.convert(model)
    assert torch.equal(logits(model), trained) and not learning(model)
    planish.save(model, tmp_path / "out")
    loaded = planish.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert torch.equal(logits(loaded), trained)
    assert torch.equal(model.lm_head.weight, frozen)
    assert all(torch.equal(found, start[name]) for name, found in codes(loaded).items())


@pytest.mark.usefixtures("held_as_records")
def test_what_is_held_as_records_is_codes_while_it_trains(tiny_llama: Tiny, tmp_path: Path) -> None:
    planish.quantize_to(tiny_llama(), tmp_path / "q", "rtn", "w2g32asym", device="cpu")
    model = planish.load(tmp_path / "q", device="cpu", dtype=torch.float32)
    layers = packed_layers(model).values()
    assert all(layer.records is not None for layer in layers)
    before, after = train(planish.prepare(model, "e2e_qp", zero_rate=1e-2), 1e-3)
    assert after < before and all(layer.records is None and layer.siblings is None for layer in layers)
    trained = logits(model)
    planish.convert(model)
    assert all(layer.records is not None for layer in layers) and torch.equal(logits(model), trained)
    planish.save(model, tmp_path / "out")
    assert torch.equal(logits(planish.load(tmp_path / "out", device="cpu", dtype=torch.float32)), trained)


FLOAT: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "block_ap": ("w2g32asym", {}, {"weight.value", "range.scale", "range.zero"}),
    "block_ap, symmetric": ("w3g32", {}, {"weight.value", "range.scale"}),
    "signround": ("w2g32", {}, {"rounding.v", "range.low_factor"}),
    "efficientqat": ("w2g32asym", {}, {"weight.value", "range.scale", "range.zero"}),
}


@pytest.mark.parametrize("case", FLOAT)
def test_of_a_float_model_the_quantizers_alone_learn(case: str) -> None:
    scheme, keys, slots = FLOAT[case]
    model = planish.prepare(float_model(), case.partition(",")[0], scheme, **keys)
    layers = {name for name, module in model.named_modules() if isinstance(module, QLinear)}
    found = learning(model)
    assert len(layers) == LINEARS
    assert {name.partition(".quantizer.")[0] for name in found} == layers
    assert {name.partition(".quantizer.")[2] for name in found} == slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FLOAT)
def test_what_was_trained_is_what_is_packed(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    scheme, keys, _ = FLOAT[case]
    model = planish.prepare(float_model(dtype), case.partition(",")[0], scheme, **keys)
    before, after = train(model, 1e-3)
    assert after < before
    trained = logits(model)
    planish.convert(model)
    assert len(packed_layers(model)) == LINEARS and not learning(model)
    assert {str(layer.qtensor().scheme) for layer in packed_layers(model).values()} == {scheme}
    assert torch.equal(logits(model), trained), "bit for bit"
    planish.save(model, tmp_path / "out")
    assert torch.equal(logits(planish.load(tmp_path / "out", device="cpu", dtype=dtype)), trained)


def test_layers_and_ignore_are_those_of_quantize() -> None:
    rules = {"layers": ["down_proj=w4g32"], "ignore": ["layers.0.*o_proj"]}
    model = planish.convert(planish.prepare(float_model(), "block_ap", "w2g32asym", **rules))
    found = {name: str(layer.qtensor().scheme) for name, layer in packed_layers(model).items()}
    assert len(found) == LINEARS - 1 and "model.layers.0.self_attn.o_proj" not in found
    assert {name.rpartition(".")[2] for name, scheme in found.items() if scheme == "w4g32"} == {"down_proj"}


def test_norms_learn_by_a_switch(tmp_path: Path) -> None:
    model = planish.prepare(float_model(torch.bfloat16), "block_ap", "w2g32asym", norm_rate=1e-4)
    norms = {name for name in learning(model) if "layernorm" in name}
    assert len(norms) == 4 and not any(name.startswith("model.norm.") for name in learning(model))
    assert all(learning(model)[name].dtype == torch.float32 for name in norms)
    train(model, 1e-2)
    trained = logits(model)
    planish.convert(model)
    weight = model.get_parameter("model.layers.0.input_layernorm.weight")
    assert weight.dtype == torch.bfloat16 and not torch.equal(weight, torch.ones_like(weight))
    assert torch.equal(logits(model), trained) and not learning(model)
    planish.save(model, tmp_path / "out")
    assert torch.equal(logits(planish.load(tmp_path / "out", device="cpu")), trained)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index], "labels": IDS[index]}


@pytest.mark.parametrize("kind", ["packed", "float"])
def test_transformers_trainer_trains_it(tmp_path: Path, kind: str) -> None:
    if kind == "packed":
        model = planish.prepare(quantized(), "e2e_qp")
    else:
        model = planish.prepare(float_model(), "block_ap", "w2g32asym")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=Rows()).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved <= learning(model).keys() and len(moved) >= LINEARS
    trained = logits(model)
    assert torch.equal(logits(planish.convert(model)), trained)


@pytest.mark.parametrize(
    ("make", "recipe", "scheme", "keys", "said"),
    [
        (float_model, "block_ap", None, {}, "recipe 'block_ap' needs a scheme for a float model, such as w2g64"),
        (float_model, "rtn", "w2g32", {}, "recipe 'rtn' trains nothing; use quantize"),
        (float_model, "e2e_qp", None, {}, "e2e_qp trains a quantized model, and this one isn't; quantize it first"),
        (quantized, "block_ap", "w2g32", {}, "is quantized already, and block_ap quantizes; give the 16-bit original"),
        (quantized, "e2e_qp", None, {"rate": 0}, "the learning rate of scale is 0; it must be above 0"),
        (quantized, "e2e_qp", None, {"rates": 1}, "recipe 'e2e_qp' has no key 'rates': did you mean 'rate'?"),
        (float_model, "block_ap", "w2g33x", {}, "no scheme 'w2g33x'"),
        (float_model, "block_ap", "w2g32", {"ignore": ["experts"]}, "'experts' matches none of the 14 linears"),
    ],
)
def test_refusals(make: Callable[[], Any], recipe: str, scheme: str | None, keys: dict[str, Any], said: str) -> None:
    model = make()
    with pytest.raises(PlanishError) as error:
        planish.prepare(model, recipe, scheme, **keys)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not any(isinstance(module, QLinear) for module in model.modules()), "the model is as it was"


def test_a_symmetric_grid_has_no_zero_points() -> None:
    with pytest.raises(PlanishError, match="a symmetric grid has no zero to train; drop zero_rate, or quantize with"):
        planish.prepare(quantized("w2g32"), "e2e_qp", zero_rate=1e-2)
