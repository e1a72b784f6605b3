"""Multimodal models: the language model is quantized, the rest stays byte for byte, names on disk are the family's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import planish
from planish.api import quantize_to
from planish.kernels.linear import PackedLinear
from planish.naming import disk_speller, module_names
from planish.source import FolderSource

TEXT = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
        "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 0}
# more parameters than the language model has
VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
IMAGE = 280  # the id of the image token
# where the blocks are on disk, and how the rest of the model starts there
ON_DISK = {"llava": ("language_model.model.layers", ("vision_tower.", "multi_modal_projector.")),
           "qwen2_vl": ("model.layers", ("visual.",)),
           "gemma3": ("language_model.model.layers", ("vision_tower.", "multi_modal_projector."))}
BLOCKS = "model.language_model.layers"


def _config(family: str) -> transformers.PreTrainedConfig:
    if family == "llava":
        return transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TEXT),
                                        vision_config=transformers.CLIPVisionConfig(**VISION), image_token_index=IMAGE)
    if family == "gemma3":
        return transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, image_token_index=IMAGE,
                                         mm_tokens_per_image=4)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {"depth": 4, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 4, "patch_size": 14}
    return transformers.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision,
                                      image_token_id=IMAGE, video_token_id=281, vision_start_token_id=282)


def _picture(family: str) -> dict[str, Tensor]:
    """Inputs with one picture."""
    generator = torch.Generator().manual_seed(1)
    if family == "qwen2_vl":
        ids = torch.tensor([[1, 2, 282, IMAGE, 3, 4]])
        pixels = torch.randn(4, 3 * 2 * 14 * 14, generator=generator)
        return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]]),
                "mm_token_type_ids": (ids == IMAGE).int()}
    ids = torch.tensor([[1, 2, IMAGE, IMAGE, IMAGE, IMAGE, 3, 4]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}


@pytest.fixture(params=ON_DISK)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    """A random model of the family, with a tokenizer and a processor's files."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(_config(family)).to(torch.bfloat16)
    for parameter in model.parameters():  # a projector of zeros would be blind
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / family)
    transformers.AutoTokenizer.from_pretrained(tiny_llama()).save_pretrained(tmp_path / family)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (tmp_path / family / name).write_text(json.dumps({"size": 28, "file": name}))
    (tmp_path / family / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / family


@pytest.fixture
def out(folder: Path, tmp_path: Path) -> Path:
    quantize_to(folder, tmp_path / "out", "rtn", "w4g32")
    return tmp_path / "out"


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def _packed(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def _linears(blocks: str) -> set[str]:
    return {f"{blocks}.{index}.{name}" for index in range(TEXT["num_hidden_layers"]) for name in LINEARS}


def test_only_the_language_model_changes(family: str, folder: Path, out: Path) -> None:
    before, after = _tensors(folder), _tensors(out)
    blocks, others = ON_DISK[family]
    quantized = {f"{name}.weight" for name in _linears(blocks)}
    assert quantized <= before.keys() and not quantized & after.keys()
    kept = {name: value for name, value in after.items() if not name.endswith((".qweight", ".qzeros", ".scales"))}
    assert _same(kept, {name: value for name, value in before.items() if name not in quantized})
    assert {name.rpartition(".")[0] for name in after.keys() - kept.keys()} == _linears(blocks)
    assert all(any(name.startswith(start) for name in kept) for start in others)
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["layers"].keys() == _linears(BLOCKS)


def test_transformers_finds_all_but_the_codes(folder: Path, out: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(out, plain)
    config = json.loads((plain / "config.json").read_text())
    assert config.pop("quantization_config")["block_name_to_quantize"] == BLOCKS
    assert config["architectures"] == json.loads((folder / "config.json").read_text())["architectures"]
    (plain / "config.json").write_text(json.dumps(config))
    auto = transformers.AutoModelForImageTextToText
    model, report = auto.from_pretrained(plain, output_loading_info=True)
    missing = {f"{name}.weight" for name in _linears(BLOCKS)}
    assert set(report["missing_keys"]) == missing
    assert {name.rpartition(".")[0] for name in report["unexpected_keys"]} <= _linears(BLOCKS)
    expected, found = auto.from_pretrained(folder).state_dict(), model.state_dict()
    assert _same({n: v for n, v in found.items() if n not in missing},
                 {n: v for n, v in expected.items() if n not in missing})


@torch.no_grad()
def test_load_sees_and_speaks(family: str, folder: Path, out: Path) -> None:
    loaded = planish.load(out)
    assert type(loaded) is type(transformers.AutoModelForImageTextToText.from_pretrained(folder))
    assert _packed(loaded) == _linears(BLOCKS)
    in_memory = planish.quantize(folder, "rtn", "w4g32")
    picture = _picture(family)
    logits = loaded(**picture).logits
    assert torch.equal(logits, in_memory(**picture).logits)
    blind = loaded(**picture | {"pixel_values": picture["pixel_values"] + 1}).logits
    assert logits.isfinite().all() and not torch.equal(logits, blind)
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    for inputs in (text, picture):
        answer = loaded.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert answer.shape[1] == inputs["input_ids"].shape[1] + 3


def test_saved_again_it_is_the_same(out: Path, tmp_path: Path) -> None:
    again = planish.save(planish.load(out), tmp_path / "again")
    assert _same(_tensors(again), _tensors(out))
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    assert (again / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "16-bit" not in planish.info(again).summary()[0]
    assert planish.info(again).summary()[1].startswith("14 of 14 linears quantized")


@pytest.mark.parametrize("format", ["native", "gptq"])
def test_other_formats(folder: Path, tmp_path: Path, format: str) -> None:
    quantize_to(folder, tmp_path / "out", "rtn", "w4g32", format=format)
    model = planish.load(tmp_path / "out")
    assert _packed(model) == _linears(BLOCKS)
    planish.save(model, tmp_path / "again", format=format)
    assert _same(_tensors(tmp_path / "again"), _tensors(tmp_path / "out"))


def test_a_model_in_memory_is_written_alike(folder: Path, out: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    quantize_to(model, tmp_path / "memory", "rtn", "w4g32")
    assert _same(_tensors(tmp_path / "memory"), _tensors(out))
    del model._weight_conversions  # as one that was made and not loaded
    quantize_to(model, tmp_path / "made", "rtn", "w4g32")
    assert _same(_tensors(tmp_path / "made"), _tensors(out))


def test_calibration_reads_text_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[str] = []
    load = FolderSource.load

    def noted(source: FolderSource, part: nn.Module, name: str, *rest: object) -> None:
        parts.append(name)
        load(source, part, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FolderSource, "load", noted)
    data = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(0))
    manifest = quantize_to(folder, tmp_path / "out", "signround", "w2g32", data=data, seqlen=32, batch_size=4, steps=5)
    assert f"{BLOCKS}.1" in parts and all(name.startswith("model.language_model.") for name in parts)
    assert all(after <= before for before, after in manifest.figures["losses"])


@torch.no_grad()
def test_perplexity_is_that_of_the_whole_model(out: Path) -> None:
    model = planish.load(out, dtype=torch.float32)
    ids = torch.randint(0, 256, (3, 32), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    assert planish.perplexity(model, ids.flatten(), seqlen=32, batch_size=2) == pytest.approx(expected, rel=1e-4)
    by_text = planish.perplexity(model, "embedded-eval", seqlen=64, limit=2)  # the folder's own tokenizer
    assert 1 < by_text < 1e4


def test_the_forward_of_training_needs_text_alone(out: Path) -> None:
    model = planish.load(out, dtype=torch.float32).train()
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    norm = model.get_submodule(BLOCKS)[0].input_layernorm.weight.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    assert norm.grad is not None and norm.grad.isfinite().all() and norm.grad.any()


def test_layers_named_as_on_disk_are_found(family: str, out: Path) -> None:
    # as other writers name them
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["block_name_to_quantize"] = ON_DISK[family][0]
    (out / "config.json").write_text(json.dumps(config))
    assert _packed(planish.load(out)) == _linears(BLOCKS)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_an_older_spelling_is_kept(folder: Path, tmp_path: Path) -> None:
    # as checkpoints of the hub have it: CLIP's tower has one level more
    file = folder / "model.safetensors"
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): value
             for name, value in load_file(file).items()}
    save_file(older, file, metadata={"format": "pt"})
    quantize_to(folder, tmp_path / "out", "rtn", "w4g32")
    tower = {name: value for name, value in older.items() if name.startswith("vision_tower.")}
    assert len(tower) > 60
    written = _tensors(tmp_path / "out")
    assert _same({name: value for name, value in written.items() if name.startswith("vision_tower.")}, tower)
    planish.save(planish.load(tmp_path / "out"), tmp_path / "again")
    assert _same(_tensors(tmp_path / "again"), written)


def test_names_go_both_ways(family: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(_config(family))
    blocks, _ = ON_DISK[family]
    layer = "0.mlp.up_proj"
    keys = [f"{blocks}.{layer}.weight", f"{blocks}.{layer}.qweight", "of.no.module"]
    expected = [f"{BLOCKS}.{layer}.weight", f"{BLOCKS}.{layer}.qweight", "of.no.module"]
    names = module_names(model, keys)
    assert names == dict(zip(keys, expected, strict=True))
    spell = disk_speller(model)
    assert [spell(name) for name in expected] == keys and spell(BLOCKS) == blocks
