"""The verbs on tiny models: what is written is what was computed, and what can't be done is said before any work."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import planish
from planish import api
from planish.bitstream import Stream
from planish.errors import PlanishError, UnsupportedScheme
from planish.folder import QuantizedFolder
from planish.formats import FORMATS
from planish.kernels.linear import PackedLinear
from planish.qtensor import QTensor
from planish.scheme import Scheme

Tiny = Callable[..., Path]
IDS = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
# more rows than the kernel for decoding takes: the reference kernel, whose results are exact
LONG = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
QUICK: dict[str, Any] = {"data": IDS, "samples": 8, "seqlen": 16, "device": "cpu"}
SIGNROUND: dict[str, Any] = {"steps": 4, "batch_size": 4, "holdout": 2, "span": 2}
SMALL = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "pad_token_id": 0,
}


def logits(model: Any, ids: Tensor = LONG) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def qtensors(model: Any) -> dict[str, QTensor]:
    return {name: part.qtensor() for name, part in model.named_modules() if isinstance(part, PackedLinear)}


def same(first: Any, second: Any) -> bool:
    one, other = qtensors(first), qtensors(second)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def text_in(folder: Path) -> Path:
    """A text of 128 windows of 16 bytes."""
    path = folder / "text.txt"
    path.write_text(" ".join(str(number**3) for number in range(400))[:2048])
    return path


def random_model(config: Any) -> Any:
    """A model whose biases aren't 0 and whose norms aren't 1, which would hide mistakes."""
    torch.manual_seed(0)
    # not .to(bfloat16), which would round the buffers of the position embeddings too
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("native", "w3g40"),
        ("native", "w2pcasym"),
        ("auto_round", "w2g32"),
        ("auto_round", "w3g32asym"),
        ("gptq", "w4g32"),
        ("gptq_v2", "w8g64asym"),
        ("compressed_tensors", "w3g32asym"),
        ("compressed_tensors_int", "w8a8"),
    ],
)
@pytest.mark.parametrize(("recipe", "keys"), [("rtn", {}), ("rtn", {"search": True}), ("signround", SIGNROUND)])
def test_what_is_written_is_what_quantize_gives(
    tiny_llama: Tiny, tmp_path: Path, format: str, scheme: str, recipe: str, keys: dict
) -> None:
    folder, out = tiny_llama(), tmp_path / "out"
    how = {"format": format, **QUICK, **keys}
    in_memory = planish.quantize(folder, recipe, scheme, **how)
    manifest = planish.quantize_to(folder, out, recipe, scheme, **how)
    loaded = planish.load(out, device="cpu")
    assert type(loaded) is transformers.LlamaForCausalLM and loaded.dtype == in_memory.dtype == torch.bfloat16
    assert same(in_memory, loaded) and len(qtensors(loaded)) == 14
    assert torch.equal(logits(loaded), logits(in_memory)) and bool(logits(loaded).isfinite().all())
    assert manifest.format == format and manifest.layers.keys() == qtensors(loaded).keys()


def test_every_format_is_written_above() -> None:
    marks = test_what_is_written_is_what_quantize_gives.pytestmark  # type: ignore[attr-defined]
    written = {case[0] for mark in marks for case in mark.args[1] if mark.args[0][0] == "format"}
    assert written == FORMATS.keys() - {"awq"}  # which is read only


@pytest.mark.parametrize("scheme", ["w4g32", "w2g32asym"])
def test_the_result_multiplies_by_the_decoded_weights(tiny_llama: Tiny, scheme: str) -> None:
    folder = tiny_llama()
    quantized = planish.quantize(folder, "signround", scheme, **QUICK, **SIGNROUND)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    original = logits(plain)
    for name, q in qtensors(quantized).items():
        plain.get_submodule(name).weight.data = q.dequantize(torch.bfloat16)
    assert torch.equal(logits(quantized), logits(plain)) and not torch.equal(logits(plain), original)


def test_each_dtype_that_is_asked_for(tiny_llama: Tiny, tmp_path: Path) -> None:
    planish.quantize_to(tiny_llama(), tmp_path / "out", "rtn", "w4g32", **QUICK)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = planish.load(tmp_path / "out", device="cpu", dtype=dtype)
        assert loaded.dtype == logits(loaded).dtype == dtype


@pytest.mark.parametrize(("first", "second"), [("native", "auto_round"), ("auto_round", "gptq"), ("gptq_v2", "native")])
def test_save_in_another_format_and_back(tiny_llama: Tiny, tmp_path: Path, first: str, second: str) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    planish.quantize_to(tiny_llama(), folders[0], "rtn", "w3g32", format=first, **QUICK)
    loaded = planish.load(folders[0], device="cpu")
    assert planish.save(loaded, folders[1], format=second) == folders[1]
    between = planish.load(folders[1], device="cpu")
    planish.save(between, folders[2], format=first)
    back = planish.load(folders[2], device="cpu")
    assert same(loaded, between) and same(loaded, back) and torch.equal(logits(loaded), logits(back))
    tensors = [load_file(folder / "model.safetensors") for folder in folders]
    assert tensors[0].keys() == tensors[2].keys() != tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[2][key]) for key in tensors[0])
    assert (
        json.loads((folders[1] / "config.json").read_text())["quantization_config"]["quant_method"]
        == ({"native": "planish", "auto_round": "auto-round", "gptq": "gptq"}[second])
    )


def test_save_takes_along_what_lies_beside_the_tensors(tiny_llama: Tiny, tmp_path: Path) -> None:
    folder = tiny_llama()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "max_new_tokens": 3}))
    planish.save(planish.quantize(folder, "rtn", "w4g32", device="cpu"), tmp_path / "saved")
    planish.quantize_to(folder, tmp_path / "written", "rtn", "w4g32", device="cpu")
    for out in (tmp_path / "saved", tmp_path / "written"):
        loaded = planish.load(out, device="cpu")
        assert loaded.generation_config.eos_token_id == [1, 2] and loaded.generation_config.max_new_tokens == 3
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert (
            tokenizer("hammer")["input_ids"]
            == transformers.AutoTokenizer.from_pretrained(folder)("hammer")["input_ids"]
        )
        again = planish.quantize(folder, "rtn", "w4g32", device="cpu")
        assert loaded.config.to_diff_dict() == again.config.to_diff_dict() | {
            key: loaded.config.to_diff_dict()[key] for key in ("_name_or_path",) if key in loaded.config.to_diff_dict()
        }


def test_save_refuses_what_it_cannot_hold(tiny_llama: Tiny, tmp_path: Path) -> None:
    folder, out = tiny_llama(), tmp_path / "out"
    with pytest.raises(PlanishError, match=r"no quantized layer; use save_pretrained\(\)"):
        planish.save(planish.load(folder, device="cpu"), out)
    model = planish.quantize(folder, "rtn", "w2g32asym", **QUICK)
    with pytest.raises(UnsupportedScheme, match="model.layers.0.self_attn.q_proj: w2g32asym may have the zero point 0"):
        planish.save(model, out, format="gptq")
    with pytest.raises(PlanishError, match="no format 'gptq_v3': did you mean 'gptq_v2'?"):
        planish.save(model, out, format="gptq_v3")
    assert not out.exists()
    with pytest.raises(PlanishError, match="exists and isn't empty; choose another folder"):
        planish.save(model, folder)
    assert planish.save(model, out) == planish.save(model, out, overwrite=True)


@pytest.mark.parametrize("recipe", ["rtn", "signround"])
def test_the_same_seed_writes_the_same_bytes(tiny_llama: Tiny, tmp_path: Path, recipe: str) -> None:
    keys = SIGNROUND if recipe == "signround" else {"search": True}
    folder, written, manifests = tiny_llama(), [], []
    how = {**QUICK, "data": text_in(tmp_path)}
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        manifests.append(planish.quantize_to(folder, out, recipe, "w2g32", seed=seed, **how, **keys))
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]
    first, again, other = (dataclasses.replace(manifest, figures={}) for manifest in manifests)
    assert first == again and other == dataclasses.replace(first, seed=1, data_sha256=other.data_sha256)


def test_the_seed_is_also_that_of_the_fit(tiny_llama: Tiny) -> None:
    how = {**QUICK, **SIGNROUND, "steps": 20, "rate": 0.02}
    first, again, other = (planish.quantize(tiny_llama(), "signround", "w2g32", seed=s, **how) for s in (0, 0, 1))
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("how", [{"storage": "disk"}, {"storage": "host"}])
def test_where_activations_wait_changes_nothing(tiny_llama: Tiny, how: dict) -> None:
    folder = tiny_llama()
    assert same(*(planish.quantize(folder, "signround", "w2g32", **QUICK, **SIGNROUND, **more) for more in ({}, how)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_memory_is_left_as_it_is(tmp_path: Path, tied: bool) -> None:
    model = random_model(transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)).train()
    model.config.dtype = None  # as of a model that was cast
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, expected, parts = model.config.to_dict(), logits(model), [type(part) for part in model.modules()]
    quantized = planish.quantize(model, "signround", "w2g32", **QUICK, **SIGNROUND)
    planish.quantize_to(model, tmp_path / "out", "signround", "w2g32", **QUICK, **SIGNROUND)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.to_dict() == config and [type(part) for part in model.modules()] == parts
    assert torch.equal(logits(model), expected) and not quantized.training
    loaded = planish.load(tmp_path / "out", device="cpu")
    assert same(quantized, loaded) and torch.equal(logits(quantized), logits(loaded))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["architectures"], written["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert not {id(p) for p in quantized.parameters()} & {id(p) for p in model.parameters()}


def test_generate_works(tiny_llama: Tiny, tmp_path: Path) -> None:
    folder, out = tiny_llama(), tmp_path / "out"
    quantized = planish.quantize(folder, "rtn", "w4g32", device="cpu")
    planish.quantize_to(folder, out, "rtn", "w4g32", device="cpu")
    loaded, prompt = planish.load(out, device="cpu"), LONG[:1, :4]
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    said = quantized.generate(prompt, **how)
    assert said.shape == (1, 16) and torch.equal(loaded.generate(prompt, **how), said)
    # with the cache as without it
    slow = loaded.generate(prompt, use_cache=False, **how)
    assert torch.equal(slow[:, :6], said[:, :6])


FAMILIES: dict[str, Any] = {
    "qwen2": transformers.Qwen2Config(**SMALL),
    "gemma3": transformers.Gemma3TextConfig(
        **SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "opt": transformers.OPTConfig(
        vocab_size=272,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["rtn", "signround"])
def test_families_with_biases_own_masks_and_scaled_embeddings(tmp_path: Path, family: str, recipe: str) -> None:
    model = random_model(FAMILIES[family])
    model.save_pretrained(tmp_path / "m")
    keys = SIGNROUND if recipe == "signround" else {}
    planish.quantize_to(tmp_path / "m", tmp_path / "q", recipe, "w4g32", **QUICK, **keys)
    loaded = planish.load(tmp_path / "q", device="cpu")
    # as the model itself with the decoded weights, biases as they were
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="sdpa").eval()
    found = qtensors(loaded)
    assert len(found) == sum("layers." in n and isinstance(p, torch.nn.Linear) for n, p in plain.named_modules())
    for name, q in found.items():
        linear = plain.get_submodule(name)
        assert not torch.equal(linear.weight, q.dequantize(torch.bfloat16))
        linear.weight.data = q.dequantize(torch.bfloat16)
        bias = loaded.get_submodule(name).bias
        assert (linear.bias is None) == (bias is None) and (bias is None or torch.equal(bias, linear.bias))
    assert family == "gemma3" or any(loaded.get_submodule(name).bias is not None for name in found)
    torch.testing.assert_close(logits(loaded), logits(plain), rtol=0.02, atol=0.02)
    planish.save(loaded, tmp_path / "s")
    assert torch.equal(logits(planish.load(tmp_path / "s", device="cpu")), logits(loaded))


def test_tied_embeddings_are_saved_once_and_never_quantized(tiny_llama: Tiny, tmp_path: Path) -> None:
    folder = tiny_llama(tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    planish.quantize_to(folder, tmp_path / "q", "rtn", "w2g32", **QUICK)
    loaded = planish.load(tmp_path / "q", device="cpu")
    planish.save(loaded, tmp_path / "s")
    for out in (tmp_path / "q", tmp_path / "s"):
        tensors = load_file(out / "model.safetensors")
        assert "lm_head.weight" not in tensors and torch.equal(tensors["model.embed_tokens.weight"], embedding)
        again = planish.load(out, device="cpu")
        assert again.lm_head.weight is again.model.embed_tokens.weight and again.config.tie_word_embeddings
        assert torch.equal(logits(again), logits(loaded))


def test_layers_and_ignore(tiny_llama: Tiny, tmp_path: Path) -> None:
    folder, out = tiny_llama(), tmp_path / "out"
    rules = {"layers": ["down_proj=w4g64"], "ignore": ["layers.1.*(q|k)_proj", "layers.0.mlp.down"]}
    resolved = api.resolve(folder, "rtn", "w2g32", **rules)
    assert resolved.format.name == "auto_round"
    assert "11 of 14 linears" in resolved.summary()[1] and "layers.0.mlp.down=16-bit" in resolved.summary()[1]
    manifest = planish.quantize_to(folder, out, "rtn", "w2g32", **QUICK, **rules)
    loaded, dense = planish.load(out, device="cpu"), load_file(folder / "model.safetensors")
    found = {name: str(q.scheme) for name, q in qtensors(loaded).items()}
    assert found == manifest.layers and len(found) == 11
    assert [name for name, scheme in found.items() if scheme != "w2g32"] == ["model.layers.1.mlp.down_proj"]
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        assert torch.equal(loaded.get_submodule(name).weight, dense[f"{name}.weight"])


def test_a_short_last_group_is_said(tiny_llama: Tiny) -> None:
    lines = api.resolve(tiny_llama(), "rtn", "w2g48").summary()
    assert lines[2] == "the last group of a row is shorter in 14 linears, such as model.layers.0.self_attn.q_proj"
    assert "format native" in lines[1]


def test_info(tiny_llama: Tiny, tmp_path: Path) -> None:
    folder, out = tiny_llama(tie_word_embeddings=True), tmp_path / "out"
    dense = api.info(folder)
    assert (dense.format, dense.schemes, dense.manifest, len(dense.shapes)) == ("16-bit", {}, None, 14)
    assert "16.00 bits a weight with embeddings" in "\n".join(dense.summary())
    planish.quantize_to(folder, out, "signround", "w2g32", ignore=["o_proj"], seed=3, **QUICK, **SIGNROUND)
    found = api.info(out)
    assert found.format == "auto_round" and set(found.schemes.values()) == {Scheme.parse("w2g32")}
    text = "\n".join(found.summary())
    assert "12 of 14 linears quantized: 12 x w2g32" in text and "signround steps=4" in text
    assert "8 x 16 tokens, seed 3" in text
    parameters = 272 * 64 + 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) + 64
    quantized = 2 * (64 * (64 + 32 + 32) + 3 * 64 * 128)
    expected = (16 * (parameters - quantized) + 2.5 * quantized) / parameters
    assert f"{expected:.2f} bits a weight with embeddings" in text


def test_run_json_says_what_was_done(tiny_llama: Tiny, tmp_path: Path) -> None:
    how, text = {**QUICK, **SIGNROUND}, text_in(tmp_path)
    planish.quantize_to(tiny_llama(), tmp_path / "out", "signround", "w2g32", preset="fast", **{**how, "data": text})
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["recipe"], run["scheme"], run["data"]) == ("signround", "w2g32", str(text))
    assert (run["samples"], run["seqlen"], run["seed"]) == (8, 16, 0)
    assert run["keys"] == SIGNROUND and len(run["data_sha256"]) == 64
    assert run["versions"].keys() == {"planish", "torch", "transformers", "python"}
    ((before, after),) = run["figures"]["losses"]
    assert after <= before and run["figures"]["seconds"] > 0 and run["figures"]["notes"] == []


def test_a_preset_may_say_how_much_data(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    assert [api.resolve(folder, "signround", "w2g32", preset=preset).samples for preset in (None, "best")] == [128, 512]
    assert api.resolve(folder, "signround", "w2g32", preset="best", samples=3, seqlen=5).samples == 3


def test_progress_says_which_windows_were_missing(tiny_llama: Tiny, tmp_path: Path) -> None:
    text, events = tmp_path / "text.txt", []
    text.write_text("hammer " * 20)
    planish.quantize(
        tiny_llama(), "rtn", "w4g32", search=True, progress=events.append, **{**QUICK, "data": text, "samples": 50}
    )
    assert events[0].note.endswith("text.txt holds 8 windows of 16 tokens, not 50: using 8")
    assert events[1].note.startswith("activations: 1 x 0.0 MB in fp32, in host memory (available: ")
    assert [event.index for event in events] == [0, 0, 1, 2]


SHORT = torch.zeros(2, 8, dtype=torch.int64)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": ({"recipe": "signrond"}, "no recipe 'signrond': did you mean 'signround'?"),
    "option": ({"stepps": 3}, "recipe 'signround' has no key 'stepps': did you mean 'steps'?"),
    "value": ({"steps": "many"}, "steps='many' isn't a number"),
    "preset": ({"preset": "fats"}, "has no preset 'fats': did you mean 'fast'?"),
    "scheme": ({"scheme": "w5g7x"}, "no scheme 'w5g7x'; write it as w4g128"),
    "group": ({}, "model.layers.0.self_attn.q_proj: group size 128 is larger than its 64 inputs"),
    "format": ({"format": "gtpq"}, "no format 'gtpq': did you mean 'gptq'?"),
    "format that can't hold it": (
        {"scheme": "w2g32asym", "format": "gptq"},
        "model.layers.0.self_attn.q_proj: w2g32asym may have the zero point 0, which gptq lacks",
    ),
    "rule": ({"scheme": "w4g32", "ignore": ["experts"]}, "'experts' matches none of the 14 linears"),
    "short text": (
        {"scheme": "w4g32", "data": "{text}", "seqlen": 99},
        "text.txt has 28 tokens, less than one window of 99",
    ),
    "no text": ({"scheme": "w4g32", "data": "missing.txt"}, "no such file: missing.txt"),
    "windows": ({"scheme": "w4g32", "data": SHORT}, "ready windows are torch.int64 [2, 8], not int64 [n, 16]"),
    "samples": ({"scheme": "w4g32", "samples": 0}, "0 samples of 16 tokens; at least 1 sample of 2 tokens is needed"),
    "seqlen": ({"scheme": "w4g32", "seqlen": 0}, "at least 1 sample of 2 tokens is needed"),
    "batch size": ({"scheme": "w4g32", "batch_size": 0}, "batch size, holdout, checks and span must be 1 or more"),
    "batch size without steps": (
        {"recipe": "rtn", "search": True, "scheme": "w4g32", "batch_size": 0},
        "a batch size of 0; at least 1 sample at a time is needed",
    ),
    "storage": ({"scheme": "w4g32", "storage": "ram"}, "no storage 'ram'; use one of auto, device, host, disk"),
    "device": ({"scheme": "w4g32", "device": "gpu"}, "no device 'gpu'; use cpu, cuda or cuda:1"),
    "revision": ({"scheme": "w4g32", "revision": "main"}, "is on this machine; drop the revision"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tiny_llama: Tiny, tmp_path: Path, case: str) -> None:
    given, said = REFUSED[case]
    (tmp_path / "text.txt").write_text("A smith planishes the sheet.")
    request = {"recipe": "signround", "scheme": "w4g128", **QUICK, **given}
    if isinstance(request["data"], str):
        request["data"] = request["data"].format(text=tmp_path / "text.txt")
    folder = tiny_llama()
    for attempt in (
        lambda: planish.quantize(folder, **request),
        lambda: planish.quantize_to(folder, tmp_path / "out", **request),
    ):
        with pytest.raises(PlanishError) as error:
            attempt()
        assert said in str(error.value) and "\n" not in str(error.value)
    assert not any("out" in entry.name for entry in tmp_path.iterdir()), "nothing is left behind"


def test_a_folder_in_use_is_refused_before_the_model_is_read(tiny_llama: Tiny, tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match="exists and isn't empty; choose another folder, or --overwrite"):
        planish.quantize_to(tmp_path / "nowhere", tiny_llama(), "rtn", "w4g32")


def test_without_a_tokenizer(tiny_llama: Tiny, tmp_path: Path) -> None:
    folder = tiny_llama()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    how = {**QUICK, **SIGNROUND, "data": text_in(tmp_path)}
    with pytest.raises(PlanishError, match="comes without a tokenizer; pass tokenizer=, or token ids as data"):
        planish.quantize(folder, "signround", "w4g32", **how)
    assert qtensors(planish.quantize(folder, "signround", "w4g32", tokenizer=tokenizer, **how))


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("recipe", ["rtn", "signround"])
def test_nan_in_a_weight_names_it(tiny_llama: Tiny, tmp_path: Path, name: str, recipe: str) -> None:
    folder, out = tiny_llama(), tmp_path / "out"
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    keys = SIGNROUND if recipe == "signround" else {}
    for attempt in (
        lambda: planish.quantize(folder, recipe, "w4g32", **QUICK, **keys),
        lambda: planish.quantize_to(folder, out, recipe, "w4g32", **QUICK, **keys),
    ):
        with pytest.raises(PlanishError, match=f"{name} holds NaN or infinity"):
            attempt()
    assert not any("out" in entry.name for entry in tmp_path.iterdir())


def test_models_that_cannot_be_quantized(tiny_llama: Tiny, tmp_path: Path) -> None:
    experts = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SMALL, num_local_experts=2))
    with pytest.raises(PlanishError, match="model.layers.0.mlp.experts.* are fused experts that can't be taken apart"):
        planish.quantize(experts, "rtn", "w4g32")
    flat = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=272))
    with pytest.raises(PlanishError, match="GPT2LMHeadModel has no recognisable blocks"):
        planish.quantize(flat, "rtn", "w4g32")
    quantized = planish.quantize(tiny_llama(), "rtn", "w4g32", device="cpu")
    with pytest.raises(PlanishError, match="LlamaForCausalLM is quantized already .* give the 16-bit original"):
        planish.quantize(quantized, "rtn", "w4g32")
    planish.save(quantized, tmp_path / "q")
    with pytest.raises(PlanishError, match=r"q is quantized already \(auto-round\); give the 16-bit original"):
        planish.quantize(tmp_path / "q", "rtn", "w4g32")


def test_what_is_read_back_different_gets_no_name(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = QuantizedFolder.each

    def faulty(self: QuantizedFolder, work: Callable[[str, Stream], Any]) -> Iterator[tuple[str, Any]]:
        def spoiled(name: str, stream: Stream) -> Any:
            if name == "model.layers.1.mlp.up_proj":
                stream.codes[0, 0] ^= 1
            return work(name, stream)

        return original(self, spoiled)

    monkeypatch.setattr(QuantizedFolder, "each", faulty)
    with pytest.raises(PlanishError, match="^model.layers.1.mlp.up_proj was read back different from what was written"):
        planish.quantize_to(tiny_llama(), tmp_path / "out", "rtn", "w4g32", device="cpu")
    assert not any("out" in entry.name for entry in tmp_path.iterdir())


def test_smollm2_keeps_its_perplexity(smollm2: Path, tmp_path: Path) -> None:
    planish.quantize_to(smollm2, tmp_path / "q4", "rtn", "w4g64", device="cpu")
    measured = {"text": "embedded-eval", "seqlen": 256, "limit": 2}
    dense = planish.perplexity(planish.load(smollm2, device="cpu", dtype=torch.float32), **measured)
    four = planish.perplexity(planish.load(tmp_path / "q4", device="cpu", dtype=torch.float32), **measured)
    assert 2 < dense < four < 1.5 * dense, (dense, four)
    # 28 M embeddings in 16 bits, 106 M weights in 4.25
    assert (tmp_path / "q4" / "model.safetensors").stat().st_size == pytest.approx(113.2e6, rel=0.02)
