"""Export: every pair of formats keeps every code; what a format can't hold is refused before anything is written."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import planish
from planish.bitstream import Stream
from planish.errors import PlanishError
from planish.folder import QuantizedFolder
from planish.formats import FORMATS

Tiny = Callable[..., Path]
WRITTEN = [name for name in FORMATS if name != "awq"]
IDS = torch.arange(10)[None]


@pytest.fixture
def quantized(tiny_llama: Tiny, tmp_path: Path) -> Callable[..., Path]:
    def make(scheme: str = "w4g32", name: str = "q", **how: object) -> Path:
        planish.quantize_to(tiny_llama(), tmp_path / name, "rtn", scheme, device="cpu", **how)
        return tmp_path / name

    return make


def content(folder: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Digests of quantized layers, and the other tensors."""
    opened = QuantizedFolder.open(folder)
    assert opened is not None
    layers = {name: stream.digest() for name, stream in opened.streams()}
    plain = [name for name in opened.source.names() if name.rpartition(".")[0] not in layers]
    return layers, {name: opened.source.get(name) for name in plain}


@pytest.mark.parametrize(("first", "second"), list(itertools.product(WRITTEN, WRITTEN)))
def test_any_format_to_any_other(quantized: Callable[..., Path], tmp_path: Path, first: str, second: str) -> None:
    source = quantized(format=first)
    out = planish.export(source, tmp_path / "out", format=second)
    (layers, plain), (their_layers, their_plain) = content(source), content(out)
    assert layers == their_layers and len(layers) == 14
    assert plain.keys() == their_plain.keys() and all(torch.equal(plain[name], their_plain[name]) for name in plain)
    assert torch.equal(planish.load(out, device="cpu")(IDS).logits, planish.load(source, device="cpu")(IDS).logits)
    manifest, origin = (json.loads((folder / "run.json").read_text()) for folder in (out, source))
    assert manifest == {**origin, "format": second}
    assert f"`{second}`" in (out / "README.md").read_text() and (out / "tokenizer.json").is_file()


def test_what_is_measured_goes_along(quantized: Callable[..., Path], tmp_path: Path) -> None:
    source = quantized()
    (source / "eval.json").write_text('{"perplexity": [{"data": "t", "seqlen": 8, "limit": null, "value": 3.5}]}')
    same = planish.export(source, tmp_path / "same", format="gptq")
    assert json.loads((same / "eval.json").read_text())["perplexity"][0]["value"] == 3.5
    assert "| perplexity | `t`, windows of 8 tokens | 3.5 |" in (same / "README.md").read_text()
    rounded = planish.export(source, tmp_path / "rounded", format="native", embeddings=8)
    assert not (rounded / "eval.json").exists()


def test_a_target_takes_its_format(quantized: Callable[..., Path], tmp_path: Path) -> None:
    out = planish.export(quantized(), tmp_path / "out", target="vllm")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    with pytest.raises(PlanishError, match="cut over 4 GPUs in vllm, 16 inputs each"):
        planish.export(tmp_path / "q", tmp_path / "tp", target="vllm", tp=4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings(tiny_llama: Tiny, tmp_path: Path, bits: int, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    planish.quantize_to(model, tmp_path / "q", "rtn", "w4g32", device="cpu")
    small = planish.export(tmp_path / "q", tmp_path / "small", format="native", embeddings=bits)
    planish.quantize_to(model, tmp_path / "direct", "rtn", "w4g32", device="cpu", embeddings=bits)
    assert content(small)[0] == content(tmp_path / "direct")[0]
    assert len(content(small)[0]) == (15 if tied else 16)
    with pytest.raises(PlanishError, match="holds embeddings in 16 bits only; --embeddings 16 writes it so"):
        planish.export(small, tmp_path / "refused", format="gptq")
    wide = planish.export(small, tmp_path / "wide", format="gptq", embeddings=16)
    shrunk = planish.load(small, device="cpu", dtype=torch.float32)(IDS).logits
    widened = planish.load(wide, device="cpu", dtype=torch.float32)(IDS).logits
    assert (shrunk - widened).norm() < 5e-3 * shrunk.norm()  # the table is rounded to bf16 once more


def test_to_a_gguf_file(quantized: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out = planish.export(quantized(), tmp_path / "out.gguf", format="gguf")
    assert out.read_bytes()[:4] == b"GGUF"


def test_an_embedding_is_not_rounded_twice(quantized: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    small = quantized(embeddings=8)
    for format in ("gguf", "native"):
        with pytest.raises(PlanishError, match="has 8 bits already; export without --embeddings"):
            planish.export(small, tmp_path / "out.gguf", format=format, embeddings=4)


def test_quantize_may_write_a_gguf_file_beside(tiny_llama: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "out"
    planish.quantize_to(tiny_llama(), out, "rtn", "w4g32", device="cpu", target="llama.cpp")
    assert (out / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert str(planish.info(out).schemes["model.embed_tokens"]) == "w8g32"  # as in the file
    planish.load(out, device="cpu")(IDS)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "no format None: give --format, one of native"),
        ({"format": "gtpq"}, "no format 'gtpq': did you mean 'gptq'?"),
        ({"format": "awq"}, "awq is read only"),
        ({"format": "native", "embeddings": 5}, "embeddings of 5 bits; use one of 4, 8, 16"),
        ({"format": "gptq", "embeddings": 8}, "gptq holds embeddings in 16 bits only"),
        ({"target": "vlm"}, "no target 'vlm'"),
        ({"target": "llama.cpp", "format": "gptq"}, "llama.cpp doesn't read gptq"),
    ],
)
def test_refusals(quantized: Callable[..., Path], tmp_path: Path, how: dict, message: str) -> None:
    with pytest.raises(PlanishError) as refused:
        planish.export(quantized(), tmp_path / "out", **how)
    assert message in str(refused.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["q", "tiny"]


def test_a_float_model_is_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match="isn't quantized; use planish quantize"):
        planish.export(tiny_llama(), tmp_path / "out", format="gptq")


def test_columns_in_another_order_stay_so(quantized: Callable[..., Path], tmp_path: Path) -> None:
    model = planish.load(quantized(format="native"), device="cpu")
    layer = model.model.layers[0].self_attn.q_proj
    # as GPTQ orders them: groups anywhere, columns of a group from left to right
    layer.order = torch.cat([torch.arange(32, 64), torch.arange(0, 32)]).int()
    planish.save(model, tmp_path / "ordered", format="native")
    out = planish.export(tmp_path / "ordered", tmp_path / "gptq", format="gptq")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["desc_act"] is True
    found = QuantizedFolder.open(out)
    assert found is not None
    streams: dict[str, Stream] = dict(found.streams())
    assert torch.equal(streams["model.layers.0.self_attn.q_proj"].order, layer.order)
    with pytest.raises(PlanishError, match="can't hold columns in another order"):
        planish.export(out, tmp_path / "auto", format="auto_round")


def test_what_is_read_back_different_gets_no_name(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, original = quantized(), QuantizedFolder.stream

    def faulty(self: QuantizedFolder, name: str, device: str = "cpu") -> Stream:
        stream = original(self, name, device)
        if self.source.folder != source and name == "model.layers.1.mlp.up_proj":
            stream.scale[0, 0] += 1
        return stream

    monkeypatch.setattr(QuantizedFolder, "stream", faulty)
    with pytest.raises(PlanishError, match="^model.layers.1.mlp.up_proj was read back different from what was written"):
        planish.export(source, tmp_path / "out", format="native")
    assert not any("out" in entry.name for entry in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scheme", "format", "expected", "limit"),
    [
        ("w4g48", "gptq", "w4g32", 0.01),  # 64 and 128 inputs have no groups of 48
        ("w4g32asym", "gptq", "w4g32", 0.03),
        ("w3g16", "gguf", "w4g32", 0.02),
    ],
)
def test_what_a_format_cant_hold_may_be_rounded_once_more(
    quantized: Callable[..., Path], tmp_path: Path, scheme: str, format: str, expected: str, limit: float
) -> None:
    folder, said = quantized(scheme, format="native"), list[str]()
    out = tmp_path / ("out.gguf" if format == "gguf" else "out")
    with pytest.raises(PlanishError, match="use"):
        planish.export(folder, out, format=format)
    planish.export(folder, out, format=format, inexact=said.append)
    assert len(said) == 15 and f"q_proj: rounded once more, to {expected}; relative" in said[0]
    assert said[-1].startswith("14 layers were rounded once more: ")
    if format == "gguf":
        assert out.read_bytes()[:4] == b"GGUF"
        return
    errors = json.loads((out / "run.json").read_text())["figures"]["rounded_again"]
    was, now = (dict(QuantizedFolder.open(path).layers()) for path in (folder, out))
    for name, error in errors.items():
        weight = was[name].dequantize()
        lost = (now[name].dequantize() - weight).norm() ** 2 / weight.norm() ** 2
        assert 0 < error < limit and float(lost) == pytest.approx(error, rel=1e-4)
    assert "rounded once more | 14 linears" in (out / "README.md").read_text()


def test_what_is_held_is_not_rounded(quantized: Callable[..., Path], tmp_path: Path) -> None:
    said = list[str]()
    folder = quantized("w4g32", format="native")
    out = planish.export(folder, tmp_path / "out", format="gptq", inexact=said.append)
    assert not said and content(out)[0] == content(folder)[0]


@pytest.mark.parametrize(
    ("scheme", "how", "expected"),
    [
        ("w4g32asym", {"format": "gptq"}, "w4g32"),
        ("w2g32asym", {"target": "vllm"}, "w2g32"),
        ("w4g32asym", {"target": "sglang"}, "w4g32"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_quantize_inexactly_is_quantize_and_export(
    quantized: Callable[..., Path], tmp_path: Path, scheme: str, how: dict, expected: str, resume: bool
) -> None:
    native, said, told = quantized(scheme, format="native"), list[str](), list[str]()
    model, out = tmp_path / "tiny", tmp_path / "out"
    with pytest.raises(PlanishError):
        planish.quantize_to(model, out, "rtn", scheme, device="cpu", **how)
    exported = planish.export(native, tmp_path / "exported", inexact=said.append, **how)
    notes = list[str]()
    made = planish.quantize_to(
        model, out, "rtn", scheme, device="cpu", inexact=told.append, resume=resume, **how,
        announce=lambda resolved: notes.extend(resolved.summary()),
    )  # fmt: skip
    assert told == said and len(told) == 15
    assert any(f"can't take 14 linears so: rounded once more in the end, {next(iter(made.layers))} to {expected}" in
               note for note in notes)  # fmt: skip
    names = sorted(file.name for file in out.iterdir())
    assert names == sorted(file.name for file in exported.iterdir())
    for name in set(names) - {"run.json"}:
        assert (out / name).read_bytes() == (exported / name).read_bytes(), name
    manifests = [json.loads((folder / "run.json").read_text()) for folder in (out, exported)]
    errors = [manifest["figures"]["rounded_again"] for manifest in manifests]
    assert errors[0] == errors[1] and len(errors[0]) == 14 and set(made.layers.values()) == {expected}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["exported", "out", "q", "tiny"]


def test_quantize_inexactly_to_a_gguf_beside(tiny_llama: Tiny, tmp_path: Path) -> None:
    gguf, said = pytest.importorskip("gguf"), list[str]()
    out = tmp_path / "out"
    planish.quantize_to(tiny_llama(), out, "rtn", "w3g16", device="cpu", target="llama.cpp", inexact=said.append)
    assert {str(scheme) for name, scheme in planish.info(out).schemes.items() if "layers" in name} == {"w3g16"}
    found = gguf.GGUFReader(out / "model.gguf").fields
    layers, errors = (found[f"planish.rounded_again.{what}"].contents() for what in ("layers", "errors"))
    assert len(layers) == len(errors) == 14 and all(0 < error < 0.02 for error in errors)
    assert f"{layers[0]}: rounded once more, to w4g32; relative squared error {errors[0]:.3g}" == said[0]
    assert found["general.name"].contents() == "out"


def test_a_whole_model_stage_may_be_rounded_once_more(tiny_llama: Tiny, tmp_path: Path) -> None:
    said = list[str]()
    how = {"samples": 8, "seqlen": 16, "device": "cpu", "epochs": 1, "batch_size": 4, "e2e_epochs": 1}
    ids = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    made = planish.quantize_to(
        tiny_llama(), tmp_path / "out", "efficientqat", "w4g32asym", data=ids, format="gptq", inexact=said.append, **how
    )
    assert made.format == "gptq" and set(made.layers.values()) == {"w4g32"} and len(said) == 15
    assert planish.load(tmp_path / "out", device="cpu")(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("scheme", "how", "message"),
    [
        ("w4g32asym", {"format": "gptq", "embeddings": 8}, "gptq holds embeddings in 16 bits only"),
        ("w4g32", {"format": "gptq", "layers": ["down_proj=w8g32"]}, "gptq can't hold w8g32 beside w4g32"),
        ("w4a4", {"format": "gptq"}, "gptq can't say that activations are rounded"),
        ("w2.5g24asym", {"format": "gptq"}, "gptq can't hold groups of 24"),
    ],
)
def test_what_rounding_layers_cant_mend_is_refused_before_any_work(
    tiny_llama: Tiny, tmp_path: Path, scheme: str, how: dict, message: str
) -> None:
    how |= {"device": "cpu", "inexact": pytest.fail, "announce": pytest.fail}
    with pytest.raises(PlanishError) as refused:
        planish.quantize_to(tiny_llama(), tmp_path / "out", "rtn", scheme, **how)
    assert message in str(refused.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["tiny"]


def test_export_to_a_target_may_round_once_more(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder, said = quantized("w4g32asym", format="native"), list[str]()
    with pytest.raises(PlanishError, match="sglang can't load w4g32asym"):
        planish.export(folder, tmp_path / "out", target="sglang")
    out = planish.export(folder, tmp_path / "out", target="sglang", inexact=said.append)
    assert set(map(str, planish.info(out).schemes.values())) == {"w4g32"} and len(said) == 15


def test_an_export_that_fails_in_the_end_costs_no_block(tiny_llama: Tiny, tmp_path: Path) -> None:
    model, spans = tiny_llama(), list[object]()
    how = {"format": "gptq", "device": "cpu", "resume": True}

    def fail(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt):
        planish.quantize_to(model, tmp_path / "out", "rtn", "w4g32asym", inexact=fail, **how)
    other = {**how, "format": "auto", "target": "sglang"}
    with pytest.raises(PlanishError, match="another request: then was gptq can't .*, is sglang can't"):
        planish.quantize_to(model, tmp_path / "out", "rtn", "w4g32asym", inexact=fail, **other)
    planish.quantize_to(
        model, tmp_path / "out", "rtn", "w4g32asym", inexact=lambda line: None, progress=spans.append, **how
    )
    planish.quantize_to(model, tmp_path / "whole", "rtn", "w4g32asym", inexact=lambda line: None, **how)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "tiny", "whole"]
    assert not [event for event in spans if event.name.startswith("model.layers")]  # all were finished
