"""Experts: apart they compute what they computed fused, and are read, written and rounded under their names on disk.

Laws 1, 2, 4 and 5 are kept for Mixtral and Qwen-MoE in test_families.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import planish
from planish.arch import discover, linears
from planish.decode import decodes, generate
from planish.errors import PlanishError
from planish.experts import Experts, gates, unfuse
from planish.folder import QuantizedFolder
from planish.forecast import forecast
from planish.kernels.linear import packed_layers
from planish.log import Event, RunManifest
from planish.quant import Quantizer, Searched
from planish.request import resolve
from planish.scheme import Scheme
from planish.source import open_source

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 64, "norm_topk_prob": False},
    "qwen3_moe": {**QWEN, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
# what an expert's matrices are called on disk
DISK = {family: "mlp.experts.{}.gate_proj" for family in FAMILIES} | {"mixtral": "block_sparse_moe.experts.{}.w1"}
IDS = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(0))
CUDA = torch.cuda.is_available()
ASKED: dict[str, Any] = {"data": IDS, "samples": 8, "seqlen": 16, "device": "cpu"}


def tiny(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **settings})
    how = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(False)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids, use_cache=False).logits


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_law_4_apart_they_compute_what_they_computed_fused(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    weights, wanted = sum(p.numel() for p in model.parameters()), logits(model)
    assert any(p.ndim == 3 for p in model.parameters())
    apart = unfuse(model)
    assert sum(p.numel() for p in apart.parameters()) == weights and not any(p.ndim == 3 for p in apart.parameters())
    # one product in place of two may add in another order; routing is the same code
    torch.testing.assert_close(logits(apart), wanted, rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=1e-12)
    assert unfuse(apart) is apart, "and a second time there is nothing to do"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_decides_where_tokens_go_is_no_linear_to_quantize(family: str) -> None:
    apart = unfuse(tiny(family))
    shapes = linears(discover(apart), apart)
    shared = ["model.layers.0.mlp.shared_expert_gate"] if family == "qwen2_moe" else []
    assert gates(apart)[: 1 + len(shared)] == ["model.layers.0.mlp.gate", *shared]
    assert not set(gates(apart)) & shapes.keys()
    experts = [name for name in shapes if ".experts." in name]
    assert len(experts) == 2 * 4 * 3 and shapes[experts[0]][1] == 64
    assert len([name for name in shapes if "shared_expert." in name]) == 2 * 3 * len(shared)


def test_a_source_gives_experts_apart_from_disk_and_from_memory(tmp_path: Path) -> None:
    model = tiny("mixtral")
    model.save_pretrained(tmp_path / "model")
    sources = open_source(model), open_source(tmp_path / "model")
    assert sorted(sources[0].names()) == sorted(sources[1].names())
    name = "model.layers.1.mlp.experts.3.w3.weight"
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    assert all(torch.equal(source.get(name), fused[3, 96:]) for source in sources)
    assert isinstance(fused, torch.nn.Parameter) and not isinstance(model.model.layers[1].mlp.experts, Experts)
    torch.testing.assert_close(logits(planish.load(tmp_path / "model", device="cpu")), logits(model), rtol=0, atol=1e-5)


def says_16_bits(words: dict[str, Any], router: str) -> bool:
    """Does a `quantization_config` say that a router isn't quantized, to who takes it for a linear?"""
    if words["quant_method"] == "gptq":
        return any(re.match(pattern.removeprefix("-:"), router) for pattern in words["dynamic"])
    return router in (words["extra_config"] if words["quant_method"] == "auto-round" else words["ignore"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["auto_round", "gptq", "compressed_tensors", "native"])
def test_files_name_experts_as_others_do(tmp_path: Path, family: str, format: str) -> None:
    model, out = tiny(family), tmp_path / "out"
    model.save_pretrained(tmp_path / "model")
    # GPTQ holds one scheme
    mixed = {} if format == "gptq" else {"layers": [r"experts\.2\.=w8g32"], "ignore": [r"experts\.1\."]}
    planish.quantize_to(tmp_path / "model", out, "rtn", "w4g32", format=format, **ASKED, **mixed)
    before, after = keys(tmp_path / "model"), keys(out)
    name, router = f"model.layers.1.{DISK[family]}", f"model.layers.1.{DISK[family].partition('experts')[0]}gate"
    assert f"{name.format(3)}.weight" in before - after and any(key.startswith(f"{name.format(3)}.") for key in after)
    assert (f"{name.format(1)}.weight" in after) == bool(mixed) and f"{router}.weight" in after
    words = json.loads((out / "config.json").read_text())["quantization_config"]
    assert format == "native" or says_16_bits(words, router)
    opened = QuantizedFolder.open(out)
    assert opened is not None
    bits = {name: scheme.bits for name, scheme in opened.schemes.items() if ".experts." in name}
    assert len(bits) == 2 * 3 * (3 if mixed else 4)
    assert all(found == (8 if mixed and ".experts.2." in name else 4) for name, found in bits.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["auto_round", "compressed_tensors", "native"])
def test_transformers_loads_and_saves_them(tmp_path: Path, family: str, format: str) -> None:
    mixed = {"layers": [r"experts\.2\.=w8g32"], "ignore": [r"experts\.1\."]}
    planish.quantize_to(tiny(family), tmp_path / "out", "rtn", "w4g32", format=format, **ASKED, **mixed)
    loaded = planish.load(tmp_path / "out", device="cpu")
    planish.register()
    try:
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    finally:
        planish.unregister()
    assert len(packed_layers(loaded)) == len(packed_layers(other)) > 18
    assert torch.equal(logits(loaded), logits(other))
    other.save_pretrained(tmp_path / "copy")
    assert keys(tmp_path / "copy") == keys(tmp_path / "out")
    assert torch.equal(logits(planish.load(tmp_path / "copy", device="cpu")), logits(loaded))


@pytest.mark.parametrize("recipe", ["signround", "omniquant", "block_ap", "rtn"])
def test_an_expert_without_tokens_is_rounded_by_search_and_counted(tmp_path: Path, recipe: str) -> None:
    model, scheme, events = tiny("qwen3_moe", num_experts=16, num_experts_per_tok=1), "w3g32asym", list[Event]()
    keys = {"search": True} if recipe == "rtn" else {"steps": 6, "batch_size": 1, "holdout": 1, "span": 1}
    asked = {**ASKED, "data": IDS[:3, :4], "samples": 3, "seqlen": 4, **keys}
    figures = planish.quantize_to(model, tmp_path / "out", recipe, scheme, progress=events.append, **asked).figures
    counts = figures["routed"]["model.layers.0.mlp.experts"]
    assert len(counts) == 16 and sum(counts) == 12 and 0 in counts
    assert RunManifest.read(tmp_path / "out").figures["routed"] == figures["routed"]  # type: ignore[union-attr]
    lonely = counts.index(0)
    said = f"model.layers.0: no token reaches {counts.count(0)} of its experts, which are rounded by search, such as"
    assert any(f"{said} model.layers.0.mlp.experts.{lonely}" in event.note for event in events)
    made = packed_layers(planish.load(tmp_path / "out", device="cpu"))
    weights = open_source(model)
    for index, count in enumerate(counts):
        name = f"model.layers.0.mlp.experts.{index}.down_proj"
        weight = weights.get(f"{name}.weight")
        plain = Quantizer(weight, Scheme.parse(scheme), range_slot=Searched).quantize(weight)
        assert made[name].qtensor().equal(plain) == (not count), (index, count)


def test_a_stopped_run_goes_on_with_what_was_counted(tmp_path: Path) -> None:
    tiny("mixtral").save_pretrained(tmp_path / "model")
    asked = {**ASKED, "steps": 4, "holdout": 2, "span": 1}

    class Stop(BaseException):
        pass

    def stop(event: Event) -> None:
        if event.index == 1:
            raise Stop

    planish.quantize_to(tmp_path / "model", tmp_path / "plain", "signround", "w3g32", **asked)
    with pytest.raises(Stop):
        planish.quantize_to(
            tmp_path / "model", tmp_path / "out", "signround", "w3g32", resume=True, progress=stop, **asked
        )
    planish.quantize_to(tmp_path / "model", tmp_path / "out", "signround", "w3g32", resume=True, **asked)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("plain", "out")]
    assert files[0] == files[1]
    plain, out = (RunManifest.read(tmp_path / folder) for folder in ("plain", "out"))
    assert plain is not None and out is not None and plain.figures["routed"] == out.figures["routed"]
    assert len(out.figures["routed"]) == 2


@pytest.mark.parametrize("lean", [False, True], ids=["trainer", "lean"])
def test_scales_are_trained_end_to_end(tmp_path: Path, lean: bool) -> None:
    model = tiny("qwen2_moe")
    start = planish.quantize(model, "rtn", "w3g32", device="cpu")
    planish.save(start, tmp_path / "start")
    how: dict[str, Any] = {"samples": 8, "seqlen": 16, "device": "cpu", "epochs": 2, "holdout": 2, "batch_size": 2}
    planish.finetune(tmp_path / "start", tmp_path / "out", "e2e_qp", data=IDS, lean=lean, **how)
    before, after = (packed_layers(planish.load(tmp_path / folder, device="cpu")) for folder in ("start", "out"))
    moved = [not torch.equal(before[name].qtensor().scale, after[name].qtensor().scale) for name in before]
    assert any(moved)
    assert all(torch.equal(before[name].qtensor().codes, after[name].qtensor().codes) for name in before)


def test_steps_differ_so_that_none_is_captured_and_text_is_generated() -> None:
    made = planish.quantize(tiny("qwen3_moe"), "rtn", "w4g32", device="cpu")
    assert not decodes(made)
    answer = generate(made, IDS[:1], new_tokens=4)
    plain = made.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert torch.equal(answer, plain) and answer.shape[1] > 16


@pytest.mark.parametrize("recipe", ["rtn", "signround", "omniquant"])
def test_memory_is_foretold(recipe: str) -> None:
    resolved = resolve(tiny("qwen2_moe"), recipe, "w4g32", samples=8, seqlen=16)
    found = forecast(resolved, data=IDS, device="cpu", probe=False)
    assert found.fits and found.needs.host > 0


def test_experts_laid_out_otherwise_are_refused_by_name() -> None:
    settings = {"num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 2, "sliding_window": 8}
    config = AutoConfig.for_model("gpt_oss", **{**SIZES, **settings})
    with torch.device("meta"):
        model = unfuse(AutoModelForCausalLM.from_config(config))
    name = r"model\.layers\.0\.mlp\.experts\.gate_up_proj \[4, 64, 192\]"
    with pytest.raises(PlanishError, match=f"{name} are fused experts that can't be taken apart"):
        discover(model)


def test_gate_and_up_of_an_expert_are_siblings(tmp_path: Path, held_as_records: None) -> None:
    planish.quantize_to(tiny("mixtral", intermediate_size=128), tmp_path / "out", "rtn", "w4g32asym", device="cpu")
    made = packed_layers(planish.load(tmp_path / "out", device="cpu", dtype=torch.bfloat16))
    one, other = (f"model.layers.1.mlp.experts.{number}." for number in (2, 3))
    assert made[f"{one}w1"].siblings is made[f"{one}w3"].siblings is not None
    assert made[f"{one}w1"].siblings is not made[f"{other}w1"].siblings and made[f"{one}w2"].siblings is None


@pytest.mark.parametrize("recipe", ["signround", "omniquant"])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")])],
)
def test_a_fit_with_learned_transforms_is_what_is_loaded(tmp_path: Path, recipe: str, device: str) -> None:
    model = tiny("qwen3_moe")
    keys: dict[str, Any] = {"let": True, "alpha": 0.5} if recipe == "omniquant" else {}
    asked = {**ASKED, "device": device, "steps": 8, "holdout": 2, "span": 2, **keys}
    made = planish.quantize(model, recipe, "w4g32asym", **asked)
    planish.save(made, tmp_path / "out")
    loaded = planish.load(tmp_path / "out", device=device)
    ids = IDS.to(device)
    assert torch.equal(logits(loaded, ids), logits(made, ids))
    answer = generate(loaded, ids[:1], new_tokens=8)
    assert answer.shape[1] > 16
