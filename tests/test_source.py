"""Source: what is loaded by parts computes what transformers computes; what is damaged is refused by name."""

import gc
import json
import types
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from planish.arch import discover
from planish.errors import PlanishError
from planish.guard import Stored
from planish.skeleton import build
from planish.source import FolderSource, QuantizedOnceWarning, Source, open_source

Tiny = Callable[..., Path]
TEXT = torch.tensor([[5, 17, 3, 60, 2, 9, 33, 8]])
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama3-rope": transformers.LlamaConfig(**SMALL, rope_parameters={
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "gemma3": transformers.Gemma3TextConfig(**SMALL, sliding_window=4),
    "opt": transformers.OPTConfig(vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
                                  num_hidden_layers=2, num_attention_heads=2, pad_token_id=1),
}


def _load_by_parts(source: Source, dtype: torch.dtype | None = None) -> transformers.PreTrainedModel:
    model = source.skeleton()
    arch = discover(model)
    for name in [*arch.outside, *(arch.block(index) for index in range(arch.num_blocks))]:
        source.load(model.get_submodule(name), name, "cpu", dtype)
    return model


def _logits(model: nn.Module, tokens: Tensor = TEXT) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture(params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[request.param])
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0 and norms at 1, which hides mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_logits_are_those_of_transformers(saved: Path) -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(saved)
    model = _load_by_parts(open_source(saved))
    assert not any(p.is_meta or p.requires_grad for p in model.parameters()) and not model.training
    assert torch.equal(_logits(model), _logits(expected))
    buffers = dict(expected.named_buffers())
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name


def test_smollm2_logits_are_those_of_transformers(smollm2: Path) -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    assert torch.equal(_logits(_load_by_parts(open_source(smollm2))), _logits(expected))


def test_memory_model_gives_the_same_and_stays_as_it_is(saved: Path) -> None:
    original = transformers.AutoModelForCausalLM.from_pretrained(saved)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    expected = _logits(original)
    source = open_source(original)
    model = _load_by_parts(source)
    assert torch.equal(_logits(model), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    source.unload(model)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert original.config.use_cache and all(p.requires_grad for p in original.parameters())


def test_skeleton_has_meta_parameters_real_buffers_and_no_cache(tiny_llama: Tiny) -> None:
    source = open_source(tiny_llama())
    model = source.skeleton()
    assert model is source.skeleton() and not model.training
    assert all(p.is_meta and not p.requires_grad for p in model.parameters())
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert (model.config.use_cache, model.config._attn_implementation) == (False, "sdpa")
    assert source.config.use_cache  # what is saved later is the author's configuration


def test_dtype_casts_parameters_and_never_buffers(tiny_llama: Tiny) -> None:
    model = _load_by_parts(open_source(tiny_llama()), dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


def test_tied_head_is_one_tensor_through_load_and_unload(tiny_llama: Tiny) -> None:
    source = open_source(tiny_llama(tie_word_embeddings=True))
    model = source.skeleton()
    for first, name in ((model.model.embed_tokens, "model.embed_tokens"), (model.lm_head, "lm_head")):
        source.load(first, name, "cpu")
        assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta
        source.unload(first)
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_meta
    assert "model.embed_tokens.weight" in source.names() and "lm_head.weight" not in source.names()


def test_tied_in_config_but_different_on_disk_is_untied(tiny_llama: Tiny) -> None:
    folder = tiny_llama(tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    source = open_source(folder)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(_logits(_load_by_parts(source)), _logits(expected))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(source.names())
    assert source.config.tie_word_embeddings is False


def test_tied_and_twice_on_disk_is_named_once(tiny_llama: Tiny) -> None:
    folder = tiny_llama(tie_word_embeddings=True)
    _edit(folder, lambda all: all.update({"lm_head.weight": all["model.embed_tokens.weight"].clone()}))
    source = open_source(folder)
    assert "lm_head.weight" not in source.names() and "model.embed_tokens.weight" in source.names()


def test_only_the_head_on_disk_goes_by_the_embeddings_name(tiny_llama: Tiny) -> None:
    folder = tiny_llama(tie_word_embeddings=True)
    _edit(folder, lambda all: all.update({"lm_head.weight": all.pop("model.embed_tokens.weight")}))
    source = open_source(folder)
    assert source.get("model.embed_tokens.weight").shape == (272, 64)
    assert "lm_head.weight" not in source.names()


def test_unload_frees_and_load_fills_again(tiny_llama: Tiny) -> None:
    source = open_source(tiny_llama())
    block = source.skeleton().model.layers[1]
    source.load(block, "model.layers.1", "cpu")
    first = {name: p.clone() for name, p in block.named_parameters()}
    source.unload(block)
    assert all(p.is_meta for p in block.parameters())
    source.load(block, "model.layers.1", "cpu")
    assert all(torch.equal(p, first[name]) for name, p in block.named_parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_what_is_loaded_is_private_memory(tiny_llama: Tiny) -> None:
    source = open_source(tiny_llama())
    model, raw = _load_by_parts(source), source.get("model.norm.weight")
    gc.collect()
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    assert raw.numel() == model.config.hidden_size


def test_names_and_get_are_the_checkpoint(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    on_disk = load_file(folder / "model.safetensors")
    in_memory = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for source in (open_source(folder), open_source(in_memory)):
        assert set(source.names()) == set(on_disk)
        assert all(torch.equal(source.get(name), tensor) for name, tensor in on_disk.items())


def test_shards(tmp_path: Path, tiny_llama: Tiny) -> None:
    whole = tiny_llama()
    model = transformers.AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "s", max_shard_size="50KB")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    assert torch.equal(_logits(_load_by_parts(open_source(tmp_path / "s"))),
                       _logits(_load_by_parts(open_source(whole))))


@pytest.mark.parametrize("rename", [lambda name: name.removeprefix("model."), lambda name: f"model.{name}"])
def test_base_prefix_on_disk_is_mapped(tiny_llama: Tiny, rename: Callable[[str], str]) -> None:
    folder = tiny_llama(tie_word_embeddings=True)
    expected, names = _logits(_load_by_parts(open_source(folder))), open_source(folder).names()
    _edit(folder, lambda all: [all.update({rename(name): all.pop(name)}) for name in list(all)])
    source = open_source(folder)
    assert set(source.names()) == set(names)
    assert torch.equal(_logits(_load_by_parts(source)), expected)


@pytest.mark.parametrize("kind", ["Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"])
def test_the_class_is_the_one_that_was_saved(kind: str) -> None:
    # one configuration serves the multimodal model and the language model alone
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, architectures=[kind])
    assert type(build(config, torch.float32, "it", False)).__name__ == kind


def test_tensors_of_no_module_are_kept(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    _edit(folder, lambda tensors: tensors.update({"extra.table": torch.arange(3)}))
    assert torch.equal(open_source(folder).get("extra.table"), torch.arange(3))


def test_dtype_comes_from_disk_where_config_names_none(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert open_source(folder).skeleton().dtype == torch.bfloat16


def test_tokenizer(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    tokenizer = open_source(folder).tokenizer()
    assert tokenizer is not None and tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert open_source(folder).tokenizer() is None


# ---- refusals


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match="no such folder: .*nowhere; give a Hugging Face folder, a hub id"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(PlanishError, match=r"no such folder: .*nowhere\.gguf"):
        open_source(tmp_path / "nowhere.gguf")


def test_hub_that_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("404 Client Error\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(PlanishError, match=r"no such folder: org/nothing, nor does .* \(404 Client Error\)"):
        open_source("org/nothing")


def test_hub_id_gets_the_needed_files(monkeypatch: pytest.MonkeyPatch, tiny_llama: Tiny) -> None:
    asked = types.SimpleNamespace()
    folder = tiny_llama()

    def download(name: str, **kwargs: object) -> str:
        asked.name, asked.kwargs = name, kwargs
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = open_source("org/tiny", revision="v2")
    assert (asked.name, asked.kwargs["revision"]) == ("org/tiny", "v2")
    assert not {"*.bin", "*.py"} & set(asked.kwargs["allow_patterns"])
    assert (source.label, source.folder) == ("org/tiny", folder)


def test_revision_of_a_folder(tiny_llama: Tiny) -> None:
    with pytest.raises(PlanishError, match="drop the revision"):
        open_source(tiny_llama(), revision="main")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match=r"has no config\.json; give the folder of a Hugging Face model"):
        open_source(tmp_path)


def test_unreadable_config(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(PlanishError, match=r"transformers can't read config\.json"):
        open_source(folder)


def test_not_a_language_model(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(PlanishError, match="transformers makes no language model of it"):
        open_source(folder)


def test_pickled_weights(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PlanishError, match=r"only pickled weights \(pytorch_model\.bin\); .*save_pretrained"):
        open_source(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(PlanishError, match=r"holds no model\.safetensors"):
        open_source(folder)


def test_truncated_file_is_named(tiny_llama: Tiny) -> None:
    file = tiny_llama() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PlanishError, match=r"model\.safetensors is truncated or damaged"):
        open_source(file.parent)


def test_missing_shard_and_damaged_index(tmp_path: Path, tiny_llama: Tiny) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama())
    model.save_pretrained(tmp_path / "s", max_shard_size="50KB")
    next((tmp_path / "s").glob("model-00002*")).unlink()
    with pytest.raises(PlanishError, match=r"model-00002-of-.*\.safetensors is missing"):
        open_source(tmp_path / "s")
    (tmp_path / "s" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(PlanishError, match=r"index\.json is damaged"):
        open_source(tmp_path / "s")


def test_missing_tensor_is_named(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    _edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(PlanishError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        open_source(folder)


def test_wrong_shape_is_named(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    _edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(PlanishError, match=r"norm\.weight is \[3\] on disk but by config\.json \[64\]"):
        open_source(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_named(tiny_llama: Tiny, bad: float) -> None:
    folder = tiny_llama()
    name = "model.layers.0.self_attn.k_proj.weight"
    _edit(folder, lambda tensors: tensors[name].view(-1)[7].fill_(bad))
    source = open_source(folder)
    for read in (lambda: source.get(name), lambda: _load_by_parts(source)):
        with pytest.raises(PlanishError, match=r"model\.layers\.0\.self_attn\.k_proj\.weight holds NaN"):
            read()


def _configure(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 10**9}, r"config\.json says num_hidden_layers is 1000000000, but there are 21 tensors"),
        ({"num_labels": 10**9}, "says num_labels is"),
        ({"num_hidden_layers": -1}, "says num_hidden_layers is -1, but there are 21 tensors"),
        ({"num_hidden_layers": "x"}, r"transformers can't read config\.json"),
        ({"num_hidden_layers": 200}, r"layers\.2\..* is missing"),
        ({"hidden_size": 10**12}, r"on disk but by config\.json \[\d+, 1000000000000\]"),
        ({"hidden_size": -64}, "makes no language model of it"),
        ({"num_attention_heads": 0}, "can't read|makes no language model"),
        ({"vocab_size": 10**30}, "makes no language model of it"),
        ({"pad_token_id": 10**6}, "Padding_idx must be within num_embeddings"),
        ({"hidden_act": "nonesuch"}, "makes no language model of it"),
        ({"dtype": "int8"}, "makes no language model of it"),
        ({"dtype": "nonesuch"}, "can't read|makes no language model"),
        ({"rope_parameters": {"rope_type": "nonesuch", "rope_theta": 0}}, "transformers|computed"),
        ({"head_dim": 250}, r"on disk but by config\.json"),
        ({"head_dim": 10**12}, "says head_dim is 1000000000000"),
        ({"model_type": "roformer"}, "roformer, an encoder; give a decoder-only language model"),
        ({"model_type": "gptj", "n_positions": 10**9}, r"tensor .* is missing|fused|megabytes|MB of tables"),
        ({"attn_implementation": "org/kernel"}, "asks for code of the hub"),
        ({"configuration_files": ["config.4.0.0.json"]}, "refers to other files"),
        ({"quantization_config": "gptq"}, "quantization_config is 'gptq', not an object"),
    ],
)
def test_crafted_configuration(tiny_llama: Tiny, changes: dict[str, object], match: str) -> None:
    folder = _configure(tiny_llama(), **changes)
    with pytest.raises(PlanishError, match=match) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


def test_tables_out_of_proportion_are_not_computed(tmp_path: Path) -> None:
    config = transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=16, n_positions=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert open_source(tmp_path).skeleton().transformer.h[0].attn.embed_positions.shape[0] == 64
    _configure(tmp_path, n_positions=10**9)
    with pytest.raises(PlanishError, match=r"computes \d+ MB of tables for itself, far more than the 0 MB"):
        open_source(tmp_path)


def test_parts_out_of_proportion_are_not_made(tiny_llama: Tiny) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_llama())
    config.num_hidden_layers = 10**6
    with pytest.raises(PlanishError, match="far more parts than there are tensors"):
        build(config, torch.float32, "it", False, Stored(tensors=21, largest=272, bytes=10**6))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.bool])
def test_wrong_dtype_is_named(tiny_llama: Tiny, dtype: torch.dtype) -> None:
    folder, name = tiny_llama(), "model.layers.1.mlp.up_proj.weight"
    _edit(folder, lambda all: all.update({name: all[name].to(dtype)}))
    with pytest.raises(PlanishError, match=rf"{name} is stored as [A-Z0-9_]+, not as one of F64, F32, F16, BF16"):
        open_source(folder)


@pytest.fixture
def shards(tmp_path: Path, tiny_llama: Tiny) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama())
    model.save_pretrained(tmp_path / "s", max_shard_size="50KB")
    return tmp_path / "s"


def _reindex(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_index_outside_of_the_folder(shards: Path, tiny_llama: Tiny) -> None:
    outside = tiny_llama() / "model.safetensors"
    for file in (f"../{outside.parent.name}/model.safetensors", str(outside)):
        _reindex(shards, lambda names, file=file: names.update({"model.norm.weight": file}))
        with pytest.raises(PlanishError, match="shards are .safetensors files beside the index"):
            open_source(shards)


def test_index_that_names_what_a_shard_lacks(shards: Path) -> None:
    _reindex(shards, lambda names: names.update({"model.norm.weight": names["model.embed_tokens.weight"]}))
    with pytest.raises(PlanishError, match=r"puts model\.norm\.weight in model-.*, which hasn't got it"):
        open_source(shards)


def test_tensor_in_two_shards(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("model-*.safetensors"))
    save_file(load_file(first) | {"model.extra": torch.ones(2)}, first)
    save_file(load_file(second) | {"model.extra": torch.ones(2)}, second)
    with pytest.raises(PlanishError, match=r"model\.extra is in model-00001.* and in model-00002"):
        open_source(shards)


def test_linked_files_are_read(shards: Path, tmp_path: Path) -> None:
    # the hub's cache keeps files elsewhere, under other names
    (tmp_path / "linked").mkdir()
    for file in shards.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    assert torch.equal(_logits(_load_by_parts(open_source(tmp_path / "linked"))),
                       _logits(_load_by_parts(open_source(shards))))


def test_overlapping_tensors(tiny_llama: Tiny) -> None:
    file = tiny_llama() / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = [0, 128]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(PlanishError, match=r"model\.safetensors is truncated or damaged"):
        open_source(file.parent)


def test_damaged_tokenizer(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    (folder / "tokenizer.json").write_text('{"version": 5, "model": []}')
    with pytest.raises(PlanishError, match="can't read the tokenizer"):
        open_source(folder).tokenizer()


def test_no_such_tensor(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    in_memory = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for source in (open_source(folder), open_source(in_memory)):
        with pytest.raises(PlanishError, match="has no tensor nonesuch"):
            source.get("nonesuch")


def test_quantized_already(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanishError, match=r"is quantized already \(gptq\); give the 16-bit original"):
        open_source(folder)


def test_quantized_checkpoint_is_opened_when_asked(tiny_llama: Tiny) -> None:
    folder = tiny_llama()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0.mlp.up_proj"
    _edit(folder, lambda all: (all.pop(f"{layer}.weight"), all.update({f"{layer}.qweight": torch.ones(2)})))
    source = FolderSource(folder, quantized=True)
    assert f"{layer}.qweight" in source.names()
    source.load(source.skeleton().model.norm, "model.norm", "cpu")
    with pytest.raises(PlanishError, match=f"has no tensor {layer}.weight"):
        source.load(source.skeleton().get_submodule(layer), layer, "cpu")


def test_model_on_meta() -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"])
    with pytest.raises(PlanishError, match=r"LlamaForCausalLM: model\.embed_tokens\.weight is on"):
        open_source(model)


# ---- GGUF


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A random Llama with 32 tokens and one block, in fp32."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    shapes = {"token_embd": (32, 32), "output": (32, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
              "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32),
              "blk.0.ffn_down": (32, 48)}
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    random = numpy.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_gguf_is_read_and_warned_of(gguf_file: Path) -> None:
    with pytest.warns(QuantizedOnceWarning, match="were quantized once") as caught:
        source = open_source(gguf_file)
    assert caught[0].filename == __file__
    model = _load_by_parts(source)
    assert model.dtype == torch.bfloat16 and source.config.architectures == ["LlamaForCausalLM"]
    assert _logits(model, TEXT % 32).isfinite().all()


@pytest.mark.filterwarnings("ignore::planish.source.QuantizedOnceWarning")
def test_gguf_without_its_package(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImportError("gguf")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(PlanishError, match="pip install gguf"):
        open_source(gguf_file)


@pytest.mark.filterwarnings("ignore::planish.source.QuantizedOnceWarning")
def test_damaged_gguf(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(10))
    with pytest.raises(PlanishError, match=r"bad\.gguf is truncated or damaged"):
        open_source(tmp_path / "bad.gguf")


@pytest.mark.filterwarnings("ignore::planish.source.QuantizedOnceWarning")
def test_gguf_of_the_same_name_in_the_working_directory(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "tiny.gguf").write_bytes(b"another")
    monkeypatch.chdir(tmp_path / "here")
    assert open_source(Path("..") / "tiny.gguf").get("model.norm.weight").shape == (32,)


@pytest.mark.filterwarnings("ignore::planish.source.QuantizedOnceWarning")
def test_gguf_that_lacks_a_tensor(gguf_file: Path) -> None:
    data = gguf_file.read_bytes()
    gguf_file.write_bytes(data.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    with pytest.raises(PlanishError, match=r"the tensor of model\.layers\.0\.mlp\.up_proj\.weight is missing"):
        open_source(gguf_file)


@pytest.mark.filterwarnings("ignore::planish.source.QuantizedOnceWarning")
def test_gguf_that_promises_a_larger_model(gguf_file: Path) -> None:
    data = gguf_file.read_bytes()
    at = data.index(b"llama.feed_forward_length") + len(b"llama.feed_forward_length") + 4
    gguf_file.write_bytes(data[:at] + (10**9).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(PlanishError, match="make a larger model than its tensors are"):
        open_source(gguf_file)
