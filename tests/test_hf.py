"""transformers' own from_pretrained and save_pretrained, once registered: the same model as planish.load's."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import planish
from planish import hf
from planish.bitstream import pack
from planish.errors import PlanishError, UnsupportedScheme
from planish.formats import FORMATS
from planish.kernels.embedding import PackedHead
from planish.kernels.linear import PackedLinear, packed_layers
from planish.qtensor import QTensor
from planish.scheme import Scheme

Tiny = Callable[..., Path]
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
WRITTEN = {
    "native": "w3g40",
    "auto_round": "w2g32asym",
    "gptq": "w4g32",
    "gptq_v2": "w3g64asym",
    "compressed_tensors": "w4g32asym",
    "compressed_tensors_int": "w8g32",
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    hf.register()
    yield
    hf.unregister()
    assert before == (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)


@pytest.fixture
def quantized(tiny_llama: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """quantized("gptq", "w4g32", **config) -> folder of a tiny Llama in that format."""

    def make(format: str, scheme: str, **config: Any) -> Path:
        out = tmp_path / f"{format}-{scheme}"
        planish.quantize_to(tiny_llama(**config), out, "rtn", scheme, format=format, device="cpu")
        return out

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def qtensors(model: Any) -> dict[str, QTensor]:
    return {name: layer.qtensor() for name, layer in packed_layers(model).items()}


def same(first: Any, second: Any) -> bool:
    one, other = qtensors(first), qtensors(second)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def words(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def alike(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def equal_files(first: Path, second: Path) -> bool:
    return alike(load_file(first / "model.safetensors"), load_file(second / "model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "scheme"), WRITTEN.items())
def test_loads_what_planish_loads_and_saves_it_again(
    quantized: Callable[..., Path], tmp_path: Path, format: str, scheme: str, dtype: torch.dtype
) -> None:
    folder = quantized(format, scheme, attention_bias=True, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ours = planish.load(folder, device="cpu", dtype=dtype)
    assert type(model) is transformers.LlamaForCausalLM and len(packed_layers(model)) == 14 and not model.training
    assert same(model, ours) and model.dtype == logits(model).dtype == dtype
    assert torch.equal(logits(model), logits(ours)) and bool(logits(model).isfinite().all())
    reply = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert reply.shape[1] > 24 and torch.equal(reply[:, :24], IDS[:1])
    model.save_pretrained(tmp_path / "copy")
    assert words(tmp_path / "copy") == words(folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=dtype)
    assert same(model, again) and torch.equal(logits(model), logits(again))
    assert same(model, planish.load(tmp_path / "copy", device="cpu"))
    assert dtype != torch.bfloat16 or equal_files(folder, tmp_path / "copy")


@pytest.mark.usefixtures("held_as_records")
@pytest.mark.parametrize(("format", "scheme"), WRITTEN.items())
def test_where_a_gpu_reads_records_there_is_nothing_else(
    quantized: Callable[..., Path], tmp_path: Path, format: str, scheme: str
) -> None:
    folder = quantized(format, scheme, attention_bias=True, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours = planish.load(folder, device="cpu")
    laid_out = scheme != "w3g40"
    for layer in (*packed_layers(model).values(), *packed_layers(ours).values()):
        assert (layer.records is not None, layer.codes is None) == (laid_out, laid_out)
    assert (model.model.layers[1].self_attn.k_proj.siblings is not None) == laid_out
    assert same(model, ours) and torch.equal(logits(model), logits(ours))
    model.save_pretrained(tmp_path / "copy")
    assert equal_files(folder, tmp_path / "copy")
    planish.save(ours, tmp_path / "saved", format="native")
    assert same(ours, planish.load(tmp_path / "saved", device="cpu"))


def test_every_format_that_writes_is_tried_above_and_has_its_method() -> None:
    assert FORMATS.keys() - {"awq"} == WRITTEN.keys()
    for format, scheme in WRITTEN.items():
        layers = {f"model.layers.{i}.mlp.up_proj": Scheme.parse(scheme) for i in range(2)}
        assert FORMATS[format].config(layers)["quant_method"] in hf.METHODS


def test_tied_embeddings_are_saved_once(quantized: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized("native", "w2g64", tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "copy")
    assert "lm_head.weight" not in load_file(tmp_path / "copy" / "model.safetensors")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_packed_embeddings(tiny_llama: Tiny, tmp_path: Path, tied: bool) -> None:
    folder = tiny_llama(tie_word_embeddings=tied)
    planish.quantize_to(folder, tmp_path / "out", "rtn", "w2g32", format="native", embeddings=8, device="cpu")
    model, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), planish.load(tmp_path / "out", device="cpu")
    assert same(model, ours) and len(packed_layers(model)) == 15 + (not tied)
    assert type(model.lm_head) is (PackedHead if tied else PackedLinear)
    assert torch.equal(logits(model), logits(ours))
    assert model.generate(IDS[:1], max_new_tokens=2, pad_token_id=0).shape[1] > 24
    model.save_pretrained(tmp_path / "copy")
    assert equal_files(tmp_path / "out", tmp_path / "copy")
    hf.attach(ours).save_pretrained(tmp_path / "attached")
    assert equal_files(tmp_path / "out", tmp_path / "attached")


def test_layers_of_several_schemes_and_one_left_in_16_bits(tiny_llama: Tiny, tmp_path: Path) -> None:
    planish.quantize_to(
        tiny_llama(),
        tmp_path / "out",
        "rtn",
        "w4g32",
        format="auto_round",
        device="cpu",
        layers=["down_proj=w2g64"],
        ignore=["k_proj"],
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {str(layer.scheme) for layer in packed_layers(model).values()} == {"w4g32", "w2g64"}
    assert type(model.model.layers[1].self_attn.k_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path / "copy")
    assert equal_files(tmp_path / "out", tmp_path / "copy")


def test_shards_and_a_device_map(quantized: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized("gptq", "w4g32"), device_map="cpu")
    model.save_pretrained(tmp_path / "copy", max_shard_size="60KB")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 2
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "copy"))


@pytest.mark.parametrize("places", [{"model": 0, "lm_head": "cpu"}, {"": "disk"}])
def test_offloading_is_refused(quantized: Callable[..., Path], places: dict[str, Any]) -> None:
    with pytest.raises(PlanishError, match="can't be offloaded"):
        AutoModelForCausalLM.from_pretrained(quantized("native", "w2g64"), device_map=places)


def test_multimodal_names_on_disk_and_in_memory(tmp_path: Path) -> None:
    text = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision)
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "llava")
    planish.quantize_to(tmp_path / "llava", tmp_path / "out", "rtn", "w4g32", format="auto_round", device="cpu")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    ours = planish.load(tmp_path / "out", device="cpu")
    assert same(model, ours) and torch.equal(logits(model), logits(ours))
    model.save_pretrained(tmp_path / "copy")
    assert equal_files(tmp_path / "out", tmp_path / "copy")


def test_push_to_hub_uploads_the_format(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sent = quantized("auto_round", "w4g32"), {}
    model = AutoModelForCausalLM.from_pretrained(folder)

    def upload(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> None:
        sent["words"] = words(Path(working_dir))
        sent["tensors"] = load_file(Path(working_dir) / "model.safetensors")

    class Api:
        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card",
        lambda *args, **kwargs: type("Card", (), {"save": lambda self, path: None})(),
    )
    model.push_to_hub("org/name")
    assert sent["words"] == words(folder) and alike(sent["tensors"], load_file(folder / "model.safetensors"))


def test_attached_to_models_of_planish_without_registration(quantized: Callable[..., Path], tmp_path: Path) -> None:
    hf.unregister()
    folder = quantized("gptq", "w4g32")
    hf.attach(planish.load(folder, device="cpu"), words(folder)).save_pretrained(tmp_path / "copy")
    assert equal_files(folder, tmp_path / "copy") and words(tmp_path / "copy") == words(folder)
    in_memory = planish.quantize(tmp_path / "copy" / ".." / "tiny", "rtn", "w3g32", device="cpu")
    hf.attach(in_memory).save_pretrained(tmp_path / "new")
    assert words(tmp_path / "new")["quant_method"] == "auto-round"
    assert same(in_memory, planish.load(tmp_path / "new", device="cpu"))


def test_a_float_model_has_nothing_to_attach(tiny_llama: Tiny) -> None:
    with pytest.raises(PlanishError, match="no layer is quantized"):
        hf.attach(planish.load(tiny_llama(), device="cpu"))


def test_trained_scales_are_saved_as_they_have_become(quantized: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized("native", "w4g32asym"))
    before = qtensors(model)
    for layer in packed_layers(model).values():
        with torch.no_grad():
            layer.make_trainable(["scale"])["scale"].mul_(1.5)
    model.save_pretrained(tmp_path / "copy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert same(model, again) and not any(before[name].equal(q) for name, q in qtensors(again).items())


def test_layers_that_the_configuration_does_not_describe_are_refused(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantized("native", "w4g32"))
    other = Scheme.parse("w2g32")
    q = QTensor(codes=torch.zeros(64, 64, dtype=torch.uint8), scale=torch.ones(64, 2).half(), zero=None,
                bits=other.bits, group_size=32)  # fmt: skip
    model.model.layers[0].self_attn.q_proj = PackedLinear.from_qtensor(q, None, torch.bfloat16)
    with pytest.raises(PlanishError, match=r"layers\.0\.self_attn\.q_proj isn't what it was.*planish\.save"):
        model.save_pretrained(tmp_path / "copy")
    assert not any((tmp_path / "copy").iterdir())


def test_a_format_that_only_reads_says_what_writes(quantized: Callable[..., Path], tmp_path: Path) -> None:
    def refuse(layer: str, q: QTensor) -> Any:
        raise UnsupportedScheme(f"{layer}: this format is read only")

    model = AutoModelForCausalLM.from_pretrained(quantized("native", "w4g32"))
    model.hf_quantizer.format = dataclasses.replace(model.hf_quantizer.format, write=refuse)
    with pytest.raises(PlanishError, match=r"this format is read only.*planish\.save"):
        model.save_pretrained(tmp_path / "copy")


def as_awq(folder: Path, out: Path, config: dict[str, Any]) -> Path:
    """A copy of a w4g32asym checkpoint with AWQ's tensors."""
    shutil.copytree(folder, out)
    layers = qtensors(planish.load(folder, device="cpu"))
    tensors = {key: value for key, value in load_file(folder / "model.safetensors").items()
               if key.rpartition(".")[0] not in layers}  # fmt: skip
    place = [0, 2, 4, 6, 1, 3, 5, 7]  # the output that nibble i of a word belongs to
    for name, q in layers.items():
        for leaf, part in (("qweight", q.codes), ("qzeros", q.zero)):
            nibbles = part.T.unflatten(1, (-1, 8))[..., place].flatten(1).contiguous()
            tensors[f"{name}.{leaf}"] = pack(nibbles, 4, 1)
        tensors[f"{name}.scales"] = q.scale.T.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))
    return out


@pytest.mark.parametrize("config", [
    {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True},
    {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32, "sym": False,
     "data_type": "int"},
], ids=["awq", "auto-round"])  # fmt: skip
def test_what_is_only_read_loads_and_is_never_saved_as_something_else(
    quantized: Callable[..., Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = quantized("native", "w4g32asym")
    model = AutoModelForCausalLM.from_pretrained(as_awq(folder, tmp_path / "awq", config))
    ours = planish.load(folder, device="cpu")
    assert same(model, ours) and torch.equal(logits(model), logits(ours))
    with pytest.raises(PlanishError, match=r"can't hold this.*planish\.save"):
        model.save_pretrained(tmp_path / "copy")
    planish.save(model, tmp_path / "saved", format="auto_round")
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


def test_columns_in_another_order(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = quantized("gptq", "w4g32")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.g_idx"
    tensors[name] = tensors[name][torch.randperm(64, generator=torch.Generator().manual_seed(0))].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, ours = AutoModelForCausalLM.from_pretrained(folder), planish.load(folder, device="cpu")
    assert model.model.layers[0].mlp.up_proj.order is not None
    assert same(model, ours) and torch.equal(logits(model), logits(ours))
    model.save_pretrained(tmp_path / "copy")
    assert equal_files(folder, tmp_path / "copy")


def test_a_quantized_head_is_not_left_to_chance(quantized: Callable[..., Path]) -> None:
    folder = quantized("auto_round", "w4g32")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["lm_head.qweight"] = torch.zeros(8, 272, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanishError, match="lm_head has qweight and no weight"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("missing", ["scales", "qweight"])
def test_a_missing_tensor_is_named(quantized: Callable[..., Path], missing: str) -> None:
    folder = quantized("gptq", "w4g32")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{missing}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanishError, match=rf"model\.layers\.1\.mlp\.up_proj\.{missing} is missing"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_named(quantized: Callable[..., Path]) -> None:
    folder = quantized("gptq", "w4g32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(8, 64, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanishError, match=r"up_proj\.qweight is torch\.int32 \[8, 64\], not"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_planish_does_not_read_is_left_to_transformers() -> None:
    read = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "checkpoint_format": "gptq"}
    other = {**read, "checkpoint_format": "marlin"}
    assert type(_from_dict(read)) is hf.PlanishConfig
    assert type(_from_dict(other)) is transformers.GPTQConfig
    floats = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "mx_fp"}
    assert type(_from_dict(floats)) is transformers.AutoRoundConfig
    hf.unregister()
    assert type(_from_dict(read)) is transformers.GPTQConfig


def _from_dict(config: dict[str, Any]) -> Any:
    return transformers.quantizers.auto.AutoQuantizationConfig.from_dict(config)


def test_registering_twice_is_registering_once(quantized: Callable[..., Path]) -> None:
    entries = dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    hf.register()
    assert entries == AUTO_QUANTIZATION_CONFIG_MAPPING
    hf.unregister()
    hf.unregister()
    assert "planish" not in AUTO_QUANTIZATION_CONFIG_MAPPING and "planish" not in AUTO_QUANTIZER_MAPPING
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is transformers.GPTQConfig


def test_a_float_model_is_not_quantized_by_it(tiny_llama: Tiny) -> None:
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny_llama(), quantization_config=hf.PlanishConfig({
            "quant_method": "planish", "format_version": 1, "scheme": "w4g32"}))  # fmt: skip


def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    planish.quantize_to(smollm2, tmp_path / "out", "rtn", "w4g64", format="auto_round", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = planish.load(tmp_path / "out", device="cpu")
    assert torch.equal(logits(model), logits(ours))
    model.save_pretrained(tmp_path / "copy")
    assert equal_files(tmp_path / "out", tmp_path / "copy")
