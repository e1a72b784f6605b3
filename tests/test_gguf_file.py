"""A .gguf file read by others: transformers' own reader gives the model we wrote, gguf's the metadata."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import planish
from planish.errors import PlanishError, UnsupportedScheme
from planish.folder import QuantizedFolder
from planish.formats.gguf import KINDS, encode
from planish.gguf_file import tensor_places, types_of, write_gguf

gguf = pytest.importorskip("gguf")
# warnings of other people's code: swig's types, and numpy's copy of a read-only map
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 128, "head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # this and the next are transformers' defaults, which its reader doesn't set
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 6, "sliding_window": 16},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
Quantized = Callable[..., QuantizedFolder]


@pytest.fixture
def quantized(tiny_llama: Callable[..., Path], tmp_path: Path) -> Quantized:
    """quantized(scheme, family, layers=..., ignore=..., **config) -> a tiny model rounded to nearest, as a folder."""

    def make(
        scheme: str = "w4g32", family: str = "llama", *, layers=(), ignore=(), embeddings=16, **overrides
    ) -> QuantizedFolder:
        plain = tiny_llama("plain")
        settings = json.loads((plain / "config.json").read_text()) | FAMILIES[family] | overrides
        for key in ("model_type", "architectures", "rope_parameters", "head_dim", "hidden_act"):
            if key not in FAMILIES[family] and key not in overrides:
                settings.pop(key, None)
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(family, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():  # no norm that does nothing, no bias of zero
            if parameter.ndim == 1:
                parameter.data += torch.randn_like(parameter) / 10
        model.save_pretrained(plain)
        planish.quantize_to(str(plain), tmp_path / "quantized", "rtn", scheme, format="native", layers=layers,
                            ignore=ignore, embeddings=embeddings, samples=2, seqlen=16, device="cpu")  # fmt: skip
        folder = QuantizedFolder.open(tmp_path / "quantized")
        assert folder is not None
        return folder

    return make


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(40).unsqueeze(0) * 5 % 272).logits


def by_transformers(file: Path) -> Tensor:
    """Logits of the model that transformers reads from the file."""
    how = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=how
    )
    return logits(model.eval())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w4g32", "w3g32asym"])
def test_transformers_reads_the_model_we_wrote(quantized: Quantized, tmp_path: Path, family: str, scheme: str) -> None:
    folder = quantized(scheme, family)
    out = write_gguf(folder, tmp_path / "new" / "model.gguf", embeddings="bf16")
    assert [file.name for file in out.parent.iterdir()] == ["model.gguf"]
    ours = logits(planish.load(tmp_path / "quantized", device="cpu", dtype=torch.float32).eval())
    assert torch.allclose(by_transformers(out), ours, atol=1e-4 * float(ours.abs().max()))


def test_metadata_tokens_and_types_are_there(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized("w2g64", layers=("down_proj=w8g32",), ignore=("v_proj",), tie_word_embeddings=True)
    out = write_gguf(folder, tmp_path / "m.gguf")
    written = tensor_places(out)
    assert written["blk.1.attn_output.weight"][:2] == (KINDS["Q2_0"].id, (64, 64))
    assert {name: place[0] for name, place in written.items() if ".0." not in name and ".1." not in name} == {
        "token_embd.weight": KINDS["Q8_0"].id, "output_norm.weight": KINDS["F32"].id}  # fmt: skip
    write_gguf(folder, out, types="compatible", overwrite=True)
    read = gguf.GGUFReader(out)
    types = {tensor.name: tensor.tensor_type.name for tensor in read.tensors}
    assert {name: types[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_down", "attn_v", "attn_norm")} == {
        "attn_q": "Q4_0", "ffn_down": "Q8_0", "attn_v": "BF16", "attn_norm": "F32"}  # fmt: skip
    assert {tensor.name: (tensor.tensor_type.value, tensor.data_offset) for tensor in read.tensors} == {
        name: (kind, offset) for name, (kind, _, offset) in tensor_places(out).items()}  # fmt: skip
    found = {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF")}
    assert found["general.architecture"] == "llama" and found["general.file_type"] == 2
    assert found["llama.context_length"] == 256 and found["llama.attention.head_count_kv"] == 2
    assert found["llama.attention.key_length"] == found["llama.rope.dimension_count"] == 16
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.eos_token_id"] == 256 and found["tokenizer.ggml.add_bos_token"] is False
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == 272 and tokens[256] == "<eos>" and tokens[271] == "[PAD271]"
    assert [kinds[index] for index in (0, 256, 271)] == [1, 3, 5]


@pytest.mark.parametrize(("embeddings", "error"), [("q8_0", 1 / 128), ("q4_0", 1 / 8), ("f16", 1e-6), ("bf16", 0)])
def test_embedding_and_output_in_each_type(quantized: Quantized, tmp_path: Path, embeddings: str, error: float) -> None:
    folder = quantized()
    out = write_gguf(folder, tmp_path / "m.gguf", embeddings=embeddings)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    for name, key in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        tensor = read[f"{name}.weight"]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(272, 64)
        exact = folder.source.get(f"{key}.weight").float().numpy()
        assert tensor.tensor_type.name == embeddings.upper()
        assert np.abs(values - exact).max() <= error * np.abs(exact).max()


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_quantized_keeps_its_codes(quantized: Quantized, tmp_path: Path, tied: bool) -> None:
    folder = quantized(embeddings=8, tie_word_embeddings=tied)
    assert "model.embed_tokens" in folder.schemes
    out = write_gguf(folder, tmp_path / "m.gguf", embeddings="bf16")
    written = tensor_places(out)
    assert written["token_embd.weight"][0] == KINDS["Q8_0"].id and ("output.weight" in written) is not tied
    tensor = next(tensor for tensor in gguf.GGUFReader(out).tensors if tensor.name == "token_embd.weight")
    q = dict(folder.layers())["model.embed_tokens"]
    assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), q.dequantize().numpy())


def test_a_quantized_layer_that_data_lets_be_q3_k(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized("w3pc", hidden_size=256, intermediate_size=512, layers=("up_proj=w3g64",))
    kinds = types_of(folder)
    assert kinds["model.layers.0.mlp.down_proj"] == "Q3_K" and kinds["model.layers.0.mlp.up_proj"] == "Q4_0"
    out = write_gguf(folder, tmp_path / "m.gguf", embeddings="bf16")
    ours = logits(planish.load(tmp_path / "quantized", device="cpu", dtype=torch.float32).eval())
    assert torch.allclose(by_transformers(out), ours, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.parametrize("recipe", ["rtn", "signround", "planish"])
def test_scales_that_share_one_are_q3_k_whatever_trained_them(
    tiny_llama: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    model, out = tiny_llama(hidden_size=256, intermediate_size=512), tmp_path / "out"
    few = {"rtn": {}, "signround": {"steps": 3}, "planish": {"steps": 3, "e2e_epochs": 1}}[recipe]
    planish.quantize_to(str(model), out, recipe, "w3g16k", target="llama.cpp", samples=16, seqlen=16,
                        device="cpu", **few)  # fmt: skip
    folder = QuantizedFolder.open(out)
    assert folder is not None and {str(scheme) for scheme in folder.schemes.values()} == {"w3g16k", "w8g32"}
    kinds = types_of(folder)
    assert {kinds[name] for name, scheme in folder.schemes.items() if scheme.bits == 3} == {"Q3_K"}
    ours = logits(planish.load(out, device="cpu", dtype=torch.float32).eval())
    theirs = by_transformers(out / "model.gguf")
    assert torch.allclose(theirs, ours, atol=1e-4 * float(ours.abs().max()))


def test_rope_scaling_goes_along(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized(rope_parameters=LLAMA3)
    out = write_gguf(folder, tmp_path / "m.gguf")
    factors = next(tensor.data for tensor in gguf.GGUFReader(out).tensors if tensor.name == "rope_freqs.weight")
    assert factors.shape == (8,) and factors[0] == pytest.approx(1) and factors[-1] == pytest.approx(8)
    assert (np.diff(factors) > -1e-5).all()
    folder.source.config.rope_parameters = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    write_gguf(folder, out, overwrite=True)
    fields = gguf.GGUFReader(out).fields
    assert fields["llama.rope.scaling.type"].contents() == "linear"
    assert fields["llama.rope.scaling.factor"].contents() == 4 and fields["llama.rope.freq_base"].contents() == 5e5
    folder.source.config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(PlanishError, match="no rope scaling .*longrope"):
        write_gguf(folder, tmp_path / "other.gguf")


def test_llama3s_rope_is_refused_where_llama_cpp_has_none(quantized: Quantized, tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match="no rope scaling .*llama3"):
        write_gguf(quantized(family="qwen2", rope_parameters=LLAMA3), tmp_path / "m.gguf")


def test_context_ends_where_llama_cpp_would_have_to_slide(quantized: Quantized, tmp_path: Path) -> None:
    fields = gguf.GGUFReader(write_gguf(quantized(family="mistral"), tmp_path / "m.gguf")).fields
    assert fields["llama.context_length"].contents() == 128


def test_gemma_keeps_its_windows(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized(family="gemma3_text")
    fields = gguf.GGUFReader(write_gguf(folder, tmp_path / "m.gguf")).fields
    assert fields["gemma3.attention.sliding_window"].contents() == 16
    assert fields["gemma3.context_length"].contents() == 256
    assert "gemma3.attention.sliding_window_pattern" not in fields  # every sixth is whole, as llama.cpp takes it
    folder.source.config.layer_types = ["sliding_attention", "full_attention"] * 3
    fields = gguf.GGUFReader(write_gguf(folder, tmp_path / "o.gguf")).fields
    assert fields["gemma3.attention.sliding_window_pattern"].contents() == [True, False] * 3


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"model_type": "falcon"}, "knows no falcon, only llama, mistral"),
        ("llama", {"hidden_act": "gelu"}, "llama has hidden_act silu, not gelu"),
        ("gemma3_text", {"query_pre_attn_scalar": 48}, "gemma3 has query_pre_attn_scalar 256, not 48"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping None, not 50"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    quantized: Quantized, tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    folder = quantized(family=family)
    for key, value in changes.items():
        setattr(folder.source.config, key, value)
    with pytest.raises(PlanishError, match=said):
        write_gguf(folder, tmp_path / "m.gguf")


def test_a_layer_that_no_block_holds_is_refused_before_anything_is_written(
    quantized: Quantized, tmp_path: Path
) -> None:
    folder = quantized("w4g16")
    with pytest.raises(UnsupportedScheme, match=r"^model\.layers\.0\.\S+: groups of 16"):
        write_gguf(folder, tmp_path / "new" / "m.gguf")
    assert not (tmp_path / "new").exists()


def test_offsets_are_refused_before_anything_is_written(quantized: Quantized, tmp_path: Path) -> None:
    quantized()
    file, layer = tmp_path / "quantized" / "model.safetensors", "model.layers.1.mlp.up_proj"
    tensors = load_file(file)
    save_file(tensors | {f"{layer}.offset": torch.zeros(tensors[f"{layer}.scale"].shape)}, file)
    folder = QuantizedFolder.open(tmp_path / "quantized")
    assert folder is not None
    with pytest.raises(UnsupportedScheme, match=f"^{layer}: GGUF can't hold offsets"):
        write_gguf(folder, tmp_path / "m.gguf")


def test_an_unwritten_file_leaves_nothing_and_an_old_one_stays(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = quantized(), tmp_path / "new" / "m.gguf"
    out.parent.mkdir()
    out.write_text("old")
    with pytest.raises(PlanishError, match="m.gguf exists; .*--overwrite"):
        write_gguf(folder, out)
    for name in ("m.bin", "."):
        with pytest.raises(PlanishError, match=r"ends in \.gguf"):
            write_gguf(folder, out.parent / name)
    with pytest.raises(PlanishError, match="no type 'q6' for embeddings; .*q8_0"):
        write_gguf(folder, out, embeddings="q6", overwrite=True)
    monkeypatch.setattr("planish.gguf_file.encode", lambda q, kind: damaged(encode(q, kind)))
    with pytest.raises(PlanishError, match=r"^model\.layers\.0\.self_attn\.q_proj.*read back different"):
        write_gguf(folder, out, overwrite=True)
    assert [file.name for file in out.parent.iterdir()] == ["m.gguf"] and out.read_text() == "old"


def damaged(data: Tensor) -> Tensor:
    data[0, 5] ^= 1
    return data
