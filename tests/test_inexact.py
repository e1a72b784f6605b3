"""Inexact: which grid a layer goes to that a format or target can't hold, and what that loses."""

import pytest
import torch

from planish.bitstream import Stream
from planish.errors import PlanishError
from planish.inexact import Rounding, mended
from planish.quant import Quantizer
from planish.scheme import Scheme

SHAPES = {f"model.layers.0.self_attn.{name}_proj": (128, 256) for name in "qkvo"}


@pytest.mark.parametrize(
    ("scheme", "how", "format", "expected"),
    [
        ("w4g32asym", {"format": "gptq"}, "gptq", "w4g32"),
        ("w4g48", {"format": "gptq"}, "gptq", "w4g32"),
        ("w6g64", {"format": "gptq"}, "gptq", "w8g64"),
        ("w3g16", {"format": "gguf"}, "gguf", "w4g32"),
        ("w2g64asym", {"format": "auto", "target": "vllm"}, "compressed_tensors", "w2g64"),
        ("w2g64", {"format": "auto", "target": "sglang"}, "compressed_tensors", "w4g64"),
        ("w3g16", {"format": "auto", "target": "llama.cpp"}, "gguf", "w4g32"),
    ],
)
def test_the_nearest_grid_that_is_held(scheme: str, how: dict, format: str, expected: str) -> None:
    found, again = mended(dict.fromkeys(SHAPES, Scheme.parse(scheme)), SHAPES, **how)
    assert found == format and {layer: str(mend) for layer, mend in again.items()} == dict.fromkeys(SHAPES, expected)


def test_what_is_held_stays_and_groups_are_not_split_over_gpus() -> None:
    schemes = {**dict.fromkeys(SHAPES, Scheme.parse("w4g128")), "model.layers.0.self_attn.o_proj": None}
    assert mended(schemes, SHAPES, format="auto", target="vllm", tp=2) == ("compressed_tensors", {})
    found, again = mended(schemes, SHAPES | {"model.layers.0.self_attn.o_proj": (7, 7)}, format="gptq_v2")
    assert found == "gptq_v2" and again == {}
    own = {"model.layers.0.self_attn.o_proj": Scheme.parse("w4g128")}
    assert mended(own, SHAPES, format="auto", target="vllm", tp=4)[1] == {
        "model.layers.0.self_attn.o_proj": Scheme.parse("w4g64")
    }


@pytest.mark.parametrize(
    ("schemes", "how", "message"),
    [
        (("w4g32", "w8g32"), {"format": "gptq"}, "gptq can't hold w8g32 beside w4g32"),
        (("w4a4", "w4a4"), {"format": "gptq"}, "gptq can't say that activations are rounded"),
        (("w4g32asym", "w4g32asym"), {"format": "awq"}, "awq is read only"),
        (("w4g64", "w4g64"), {"format": "auto", "target": "vllm", "tp": 3}, "can't be cut over 3 GPUs"),
    ],
)
def test_what_no_rounding_mends_is_refused(schemes: tuple[str, str], how: dict, message: str) -> None:
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    with pytest.raises(PlanishError) as refused:
        mended(dict(zip(names, map(Scheme.parse, schemes), strict=True)), dict.fromkeys(names, (64, 256)), **how)
    assert message in str(refused.value)


def test_rounding_measures_what_it_loses() -> None:
    weight, said = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), list[str]()
    first = Quantizer(weight, Scheme.parse("w4g32asym")).quantize(weight)
    rounding = Rounding(schemes={"a": Scheme.parse("w4g32")}, tell=said.append)
    second = rounding.round("a", Stream.of(first)).qtensor()
    assert second.symmetric
    lost = (second.dequantize() - first.dequantize()).norm() ** 2 / first.dequantize().norm() ** 2
    assert 0 < rounding.errors["a"] == pytest.approx(float(lost), rel=1e-4)
    rounding.say()
    assert said[0].startswith("a: rounded once more, to w4g32; relative squared error 0.0") and len(said) == 2
