"""Bits by layer, from the request to the checkpoint: the budget is kept, siblings are alike, and it pays."""

import json
import math

import pytest
import torch

import planish
from planish.errors import PlanishError
from planish.folder import schemes_of
from planish.quant import Quantizer, Searched
from planish.request import make_run
from planish.targets import joined
from planish.widths import measured, settle_bits

IDS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
QUICK = {"data": IDS, "samples": 8, "seqlen": 32, "device": "cpu"}
RECIPES = {"rtn": {}, "signround": {"steps": 2, "batch_size": 4, "holdout": 2}, "rotate+rtn": {}}


def average(schemes, model):
    parts = dict(model.named_modules())
    sizes = {name: parts[name].in_features * parts[name].out_features for name in schemes}
    return sum(sizes[name] * scheme.bits for name, scheme in schemes.items()) / sum(sizes.values())


def run_of(folder, scheme, **about):
    resolved = planish.resolve(folder, "rtn", scheme, samples=8, seqlen=32, **about)
    return resolved, make_run(resolved, IDS, "cpu", None, 0, "auto", None, None, stream_dir=None)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scheme", ["w2.5g32", "w3.0g32asym"])
def test_every_recipe_keeps_the_budget_and_siblings_alike(tiny_llama, recipe, scheme):
    model = planish.quantize(tiny_llama(), recipe, scheme, **QUICK, **RECIPES[recipe])
    schemes = {name: found for name, found in schemes_of(model).items() if found}
    assert len(schemes) == 14 and len(set(schemes.values())) > 1
    asked = float(scheme[1:4])
    assert asked - 0.5 < average(schemes, model) <= asked
    for name, found in schemes.items():
        assert schemes[joined(name)] == found  # of q, k, v it is q's name, of gate, up gate's


def test_a_folder_says_what_was_chosen_and_a_second_run_writes_the_same(tiny_llama, tmp_path):
    model = tiny_llama()
    for out, more in (("a", {}), ("b", {"resume": True})):
        planish.quantize_to(model, tmp_path / out, "rtn", "w2.5g32", **QUICK, **more)
    first, second = (json.loads((tmp_path / out / "run.json").read_text()) for out in "ab")
    assert first["scheme"] == "w2.5g32" and first["layers"] == second["layers"]
    assert first["figures"]["widths"].startswith("2.5") and "with scales" in first["figures"]["widths"]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_measured_losses_are_near_the_divergence_of_predictions(tiny_llama):
    # one linear at a time at 4 bits: the sum over outputs as if independent is right within a factor
    folder = tiny_llama()
    resolved, run = run_of(folder, "w3.0g32")
    losses = measured(run, IDS, {name: resolved.widths.candidates for name in resolved.shapes})
    assert all(a > b > c > d > 0 for a, b, c, d in losses.values())  # more bits lose less
    model = planish.load(folder, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        before = model(IDS).logits.log_softmax(-1)
        for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"):
            weight = model.get_submodule(name).weight
            kept, scheme = weight.clone(), resolved.widths.candidates[2]
            weight.copy_(Quantizer(weight, scheme, range_slot=Searched)(weight))
            after = model(IDS).logits.log_softmax(-1)
            weight.copy_(kept)
            divergence = (before.exp() * (before - after)).sum(-1).mean().item()
            assert 0.2 < losses[name][2] / divergence < 5, (name, losses[name][2], divergence)


def test_linears_that_a_rule_names_keep_their_scheme(tiny_llama):
    resolved, run = run_of(tiny_llama(), "w2.5g32", layers=("down_proj=w8g32",), ignore=("o_proj",))
    assert resolved.scheme_text == "w2.5g32, o_proj=16-bit, down_proj=w8g32"
    settled = settle_bits(resolved, run)
    assert {str(s) for n, s in settled.schemes.items() if "down_proj" in n} == {"w8g32"}
    assert not any("o_proj" in name for name in settled.schemes) and run.schemes == settled.schemes
    assert all(math.isfinite(scheme.bits) for scheme in settled.schemes.values())


@pytest.mark.parametrize(
    ("scheme", "about", "message"),
    [
        ("w9.0g32", {}, "no average of 9 bits; ask for 2 to 8"),
        ("w2.5x", {}, "no scheme 'w2x'"),
        ("w2.5g32", {"format": "gptq"}, "gptq"),
        ("w2.5g64", {"target": "sglang"}, "no average of 2.5 bits of w4g64, w8g64; ask for 4 to 8"),
        ("w2.5g32", {"layers": ("proj=w4g32",)}, "--layers names every linear"),
    ],
)
def test_refusals(tiny_llama, scheme, about, message):
    with pytest.raises(PlanishError) as refused:
        planish.resolve(tiny_llama(), "rtn", scheme, **about)
    assert message in str(refused.value)
