"""A LoRA folder in float weights: the arithmetic of peft's files, a checkpoint made of it, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import planish
from planish.adapter import AdaptedSource, adapted
from planish.errors import PlanishError
from planish.recipes import RECIPES, build
from planish.source import open_source

Tiny = Callable[..., Path]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q: (64, 64), DOWN: (64, 128), "lm_head": (272, 64)}


def lora(folder: Path, ranks: dict[str, int] | None = None, **config: Any) -> Path:
    """An adapter as peft 0.21 saves it."""
    drawn = torch.Generator().manual_seed(3)
    tensors = {}
    for layer, rank in (ranks or {Q: 8, DOWN: 8}).items():
        rows, columns = SHAPES.get(layer, (64, 64))
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, columns, generator=drawn)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, rank, generator=drawn)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "use_dora": False, **config}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    return folder


def product(folder: Path, layer: str) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{layer}.lora_{side}.weight"].double() for side in "AB")
    return b @ a


@pytest.mark.parametrize(
    ("config", "ranks", "factors"),
    [
        ({}, {Q: 8, DOWN: 8}, {Q: 2.0, DOWN: 2.0}),
        ({"use_rslora": True}, {Q: 8, DOWN: 8}, {Q: 16 / 8**0.5, DOWN: 16 / 8**0.5}),
        (
            {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 6}},
            {Q: 4, DOWN: 8},
            {Q: 4.0, DOWN: 0.75},
        ),
        ({"init_lora_weights": "gaussian"}, {Q: 8}, {Q: 2.0}),
    ],
    ids=["plain", "rank-stabilised", "patterns", "one layer"],
)
def test_weights_are_those_of_the_formula(
    tiny_llama: Tiny, tmp_path: Path, config: dict[str, Any], ranks: dict[str, int], factors: dict[str, float]
) -> None:
    base, folder = tiny_llama(), lora(tmp_path / "lora", ranks, **config)
    plain, merged = open_source(base), adapted(open_source(base), folder)
    for name in plain.names():
        weight, layer = plain.get(name), name.removesuffix(".weight")
        if layer in factors:
            wanted = (weight.double() + factors[layer] * product(folder, layer)).to(weight.dtype)
            # summed in fp32, rounded once to bf16: half a step apart at most, where fp64 rounds otherwise
            assert torch.allclose(merged.get(name).double(), wanted.double(), rtol=2**-8, atol=1e-6), name
            assert (merged.get(name) == wanted).double().mean() > 0.99
        else:
            assert torch.equal(merged.get(name), weight), name
    assert merged.label == f"{base} with adapter lora" and adapted(plain, None) is plain
    assert merged.tokenizer() is not None and len(merged.files()) == 3


def test_finetune_merges_before_it_rounds(tiny_llama: Tiny, tmp_path: Path) -> None:
    base, folder = tiny_llama(), lora(tmp_path / "lora", lora_alpha=0.1)
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"data": ids, "samples": 8, "seqlen": 32, "device": "cpu", "epochs": 1, "e2e_epochs": 1}
    manifest = planish.finetune(base, tmp_path / "out", "efficientqat", "w4g32", adapter=folder, **how)
    assert manifest.model == f"{base} with adapter lora"
    # the same as of a model that was merged before, and not that of the base alone
    source = AdaptedSource(open_source(base), folder)
    twin = tiny_llama("twin")
    save_file({name: source.get(name) for name in source.names()}, twin / "model.safetensors", {"format": "pt"})
    planish.finetune(twin, tmp_path / "of-twin", "efficientqat", "w4g32", **how)
    planish.finetune(base, tmp_path / "of-base", "efficientqat", "w4g32", **how)
    out, of_twin, of_base = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "of-twin", "of-base"))
    assert all(torch.equal(out[key], of_twin[key]) for key in out)
    assert not all(torch.equal(out[key], of_base[key]) for key in out)


def test_recipes_that_turn_the_model_turn_the_merged_one(tiny_llama: Tiny, tmp_path: Path) -> None:
    assert "rtn" in RECIPES and build("rotate+rtn", None, {}).rotation is not None
    base, folder = tiny_llama(), lora(tmp_path / "lora")
    found = planish.resolve(base, "rotate+rtn", "w4g32", adapter=folder)
    assert "with adapter" in found.source.label and len(found.source.files()) == 3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "IA3"}, "is an adapter of kind IA3; only LoRA can be merged here"),
    "dora": ({"use_dora": True}, "LoRA with use_dora isn't a sum on linears' weights; merge it by peft"),
    "biases": ({"bias": "all"}, "LoRA with bias isn't a sum"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "LoRA with modules_to_save isn't a sum"),
    "another start": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base first"),
    "rank unlike the file's": ({"r": 4}, f"{Q} has rank 8, and adapter_config.json says r=4, lora_alpha=16"),
    "no alpha": ({"lora_alpha": None}, "says r=8, lora_alpha=None"),
    "a pattern that is none": ({"rank_pattern": {"(": 4}}, "rank_pattern can't be read"),
    "another base's names": ({"ranks": {"transformer.h.0.attn": 8}}, "is of another base: "),
    "no linear": ({"ranks": {"model.embed_tokens": 8}}, "has no linear model.embed_tokens"),
    "another base's shapes": (
        {"ranks": {"model.layers.0.mlp.up_proj": 8}},
        "is of another base: its model.layers.0.mlp.up_proj is [64, 64], that of ",
    ),
    "rank": ({"r": 72, "ranks": {Q: 72}}, f"rank 72 is above the width of {Q}, which is [64, 64]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(tiny_llama: Tiny, tmp_path: Path, case: str) -> None:
    config, said = dict(REFUSED[case][0]), REFUSED[case][1]
    base, folder = tiny_llama(), lora(tmp_path / "lora", config.pop("ranks", None), **config)
    with pytest.raises(PlanishError) as error:
        planish.finetune(base, tmp_path / "out", "efficientqat", "w4g32", adapter=folder, device="cpu")
    assert said in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_files_that_are_no_adapter(tiny_llama: Tiny, tmp_path: Path) -> None:
    base, folder = open_source(tiny_llama()), lora(tmp_path / "lora")
    weights = folder / "adapter_model.safetensors"
    good = {key: value.clone() for key, value in load_file(weights).items()}  # not views of the file
    with pytest.raises(PlanishError, match="is no adapter: it needs adapter_config.json and adapter_model.safetensors"):
        adapted(base, tmp_path / "nowhere")
    weights.write_bytes(b"not one")
    with pytest.raises(PlanishError, match="can't be read"):
        adapted(base, folder)
    key = f"base_model.model.{Q}.lora_B.weight"
    for changed, said in (
        ({key: good[key][:, :4].clone()}, "don't fit each other"),
        ({key: good[key] * torch.nan}, "holds NaN or infinity"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(64)}, "is no factor of a linear's weight"),
    ):
        save_file({**good, **changed}, weights)
        with pytest.raises(PlanishError, match=said):
            adapted(base, folder)
    save_file({key: good[key]}, weights)
    with pytest.raises(PlanishError, match="don't fit each other"):
        adapted(base, folder)


def test_a_tied_head_is_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(PlanishError, match="changes lm_head, which .* has tied to another tensor; untie it first"):
        adapted(open_source(base), lora(tmp_path / "lora", {"lm_head": 8}))


def test_a_quantized_model_is_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    planish.quantize_to(tiny_llama(), tmp_path / "q4", "rtn", "w4g32", device="cpu")
    with pytest.raises(PlanishError, match="q4 is quantized already; drop the adapter, or give the 16-bit original"):
        planish.finetune(tmp_path / "q4", tmp_path / "out", adapter=lora(tmp_path / "lora"), device="cpu")
