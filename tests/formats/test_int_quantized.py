"""compressed-tensors with a byte a weight against its own words; activations in its configuration, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

import planish
from planish.errors import PlanishError
from planish.formats import FORMATS, detect
from planish.scheme import Scheme

LAYER, SHAPES = "model.layers.0.mlp.up_proj", {"model.layers.0.mlp.up_proj": (48, 64)}
KNOWN = FORMATS["compressed_tensors_int"]


@pytest.mark.parametrize("text", ["w8pc", "w4g32", "w8g32asym", "w4pcasym"])
def test_a_plain_reader_gets_the_same_weights(random_qtensor, text: str) -> None:
    q = random_qtensor(Scheme.parse(text), (48, 64))
    tensors = KNOWN.encode(LAYER, q)
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("scale")} == {torch.int8}
    values = tensors[f"{LAYER}.weight"].float()
    if not q.symmetric:
        values -= tensors[f"{LAYER}.weight_zero_point"].float().repeat_interleave(q.group_size, 1)
    scale = tensors[f"{LAYER}.weight_scale"].float().repeat_interleave(q.group_size, 1)
    assert torch.equal(values * scale, q.dequantize())


@pytest.mark.parametrize("text", ["w8a8", "w8a8s", "w4a8asym", "w4g32a4", "w8g32"])
def test_schemes_come_back_from_the_configuration(text: str) -> None:
    scheme = Scheme.parse(text)
    words = KNOWN.config({LAYER: scheme})
    (group,) = words["config_groups"].values()
    assert words["format"] == group["format"] == "int-quantized" and detect(words) is KNOWN
    how = group["input_activations"]
    assert (how is None) == (scheme.activations is None)
    if how is not None:
        assert (how["strategy"], how["dynamic"], how["num_bits"]) == ("token", True, scheme.activations.bits)  # type: ignore[union-attr]
    assert KNOWN.schemes(words, SHAPES) == {LAYER: scheme}


@pytest.mark.parametrize("change", [{"dynamic": False}, {"strategy": "tensor"}, {"type": "float"}])
def test_stored_ranges_are_refused(change: dict[str, Any]) -> None:
    words = KNOWN.config({LAYER: Scheme.parse("w8a8")})
    words["config_groups"]["group_0"]["input_activations"] |= change
    with pytest.raises(PlanishError, match=f"^{LAYER} has activations whose ranges are stored, or aren't of tokens"):
        KNOWN.schemes(words, SHAPES)


def test_codes_beyond_their_bits_are_refused(random_qtensor) -> None:
    scheme = Scheme.parse("w4pc")
    tensors = KNOWN.encode(LAYER, random_qtensor(scheme, (48, 64)))
    tensors[f"{LAYER}.weight"][0, 0] = 8
    with pytest.raises(PlanishError, match=f"^{LAYER} has codes that 4 bits don't hold"):
        KNOWN.decode(LAYER, tensors, scheme, (48, 64))


@pytest.mark.parametrize("text", ["w8a8", "w4a8s"])
def test_a_model_is_written_and_read(tmp_path: Path, tiny_llama: Any, text: str) -> None:
    model, ids = tiny_llama(), torch.arange(1, 33).view(1, -1)
    asked: dict[str, Any] = {"device": "cpu", "format": "compressed_tensors_int"}
    planish.quantize_to(model, tmp_path / "out", "rtn", text, **asked)
    loaded: Any = planish.load(tmp_path / "out", device="cpu")
    assert loaded.model.layers[0].mlp.up_proj.scheme == Scheme.parse(text)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, planish.quantize(model, "rtn", text, device="cpu")(ids).logits)


def test_codes_that_nobody_speaks_of_are_refused(tmp_path: Path, tiny_llama: Any) -> None:
    planish.quantize_to(tiny_llama(), tmp_path / "out", "rtn", "w8a8", device="cpu", format="compressed_tensors_int")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"model.layers.0.mlp.up_proj"', '"model.layers.9.mlp.up_proj"'))
    with pytest.raises(PlanishError, match="up_proj.weight holds codes, but config.json names no scheme for it"):
        planish.load(tmp_path / "out", device="cpu")
