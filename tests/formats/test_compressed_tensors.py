"""compressed-tensors against a reader written from the format's own words, and the configurations of others."""

import pytest
import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.formats import compressed_tensors
from planish.scheme import Scheme

UP, DOWN, HEAD = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"
SHAPES = {UP: (48, 64), DOWN: (64, 64), HEAD: (256, 64)}


def signed(words: Tensor, bits: int, length: int) -> list[list[int]]:
    """Rows of signed fields of little-endian bit streams, each read from one big integer."""
    wholes = [int.from_bytes(row.numpy().tobytes(), "little") for row in words.contiguous()]
    return [[(whole >> bits * e) % 2**bits - 2 ** (bits - 1) for e in range(length)] for whole in wholes]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, None])
def test_a_plain_reader_gets_the_same_weights(random_qtensor, bits: int, symmetric: bool, group: int | None) -> None:
    q = random_qtensor(Scheme(bits=bits, group_size=group, symmetric=symmetric), SHAPES[UP])
    tensors = compressed_tensors.encode(UP, q)
    assert tensors[f"{UP}.weight_shape"].tolist() == [48, 64] and tensors[f"{UP}.weight_shape"].dtype == torch.int64
    values = torch.tensor(signed(tensors[f"{UP}.weight_packed"], bits, 64)).float()
    if not symmetric:
        zero = torch.tensor(signed(tensors[f"{UP}.weight_zero_point"].T, bits, 48)).T
        values -= zero.repeat_interleave(q.group_size, dim=1)
    scale = tensors[f"{UP}.weight_scale"].float().repeat_interleave(q.group_size, dim=1)
    assert torch.equal(values * scale, q.dequantize())
    assert (f"{UP}.weight_zero_point" in tensors) != symmetric


def test_columns_of_older_models_in_another_order_are_read(random_qtensor) -> None:
    scheme = Scheme.parse("w4g32")
    q = random_qtensor(scheme, SHAPES[UP])
    g_idx = (torch.arange(64, dtype=torch.int32) + 1) % 2
    tensors = compressed_tensors.encode(UP, q) | {f"{UP}.weight_g_idx": g_idx}
    expected = q.scale.float()[:, g_idx.long()] * (q.codes.float() - 8)
    assert torch.equal(compressed_tensors.decode(UP, tensors, scheme, SHAPES[UP]).dequantize(), expected)


def test_the_padded_layout_and_another_shape_are_refused(random_qtensor) -> None:
    scheme = Scheme.parse("w3g32")
    tensors = compressed_tensors.encode(UP, random_qtensor(scheme, SHAPES[UP]))
    padded = tensors | {f"{UP}.weight_packed": torch.zeros(48, 7, dtype=torch.int32)}
    with pytest.raises(PlanishError, match=f"^{UP}.weight_packed holds 10 codes of 3 bits a word"):
        compressed_tensors.decode(UP, padded, scheme, SHAPES[UP])
    tensors[f"{UP}.weight_shape"] = torch.tensor([64, 48])
    with pytest.raises(PlanishError, match=rf"^{UP}.weight_shape says \[64, 48\]"):
        compressed_tensors.decode(UP, tensors, scheme, SHAPES[UP])


def test_configuration_names_layers_by_scheme_and_what_stays() -> None:
    w2, w4 = Scheme.parse("w2g32"), Scheme.parse("w4pcasym")
    config = compressed_tensors.config({UP: w2, "model.layers.0.mlp.gate_proj": None, DOWN: w4})
    assert config["format"] == "pack-quantized" and config["quantization_status"] == "compressed"
    assert config["ignore"] == ["model.layers.0.mlp.gate_proj", "re:.*lm_head$"]
    assert config["config_groups"]["group_0"] == {
        "targets": [UP],
        "format": "pack-quantized",
        "weights": {
            "num_bits": 2,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }
    channel = config["config_groups"]["group_1"]["weights"]
    assert (channel["strategy"], channel["group_size"], channel["symmetric"]) == ("channel", None, False)
    assert compressed_tensors.config({UP: w2, HEAD: w2})["ignore"] == []


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": "weight"}
FULL = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "sparsity_config": {},
    "transform_config": {},
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
}


def groups(**targets: list[str]) -> dict[str, object]:
    """`config_groups` by scheme's bits: w4=["Linear"]."""
    return {
        "config_groups": {
            name: {"targets": names, "weights": WEIGHTS | {"num_bits": int(name[1:])}, "format": "pack-quantized"}
            for name, names in targets.items()
        }
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {UP: "w4g32", DOWN: "w4g32"}),
        ({"ignore": ["re:.*down_proj$"]}, {UP: "w4g32", HEAD: "w4g32"}),
        ({"ignore": None, "quantization_status": None}, {UP: "w4g32", DOWN: "w4g32", HEAD: "w4g32"}),
        (groups(w4=["Linear"], w8=["re:.*down"], w2=[DOWN]), {UP: "w4g32", DOWN: "w2g32"}),
        (groups(w8=["re:.*down_proj"]) | {"format": "mixed-precision"}, {DOWN: "w8g32"}),
        (groups(w4=["LlamaAttention", "down_proj"]), {}),
    ],
)
def test_configurations_of_others_are_read(change: dict[str, object], expected: dict[str, str]) -> None:
    found = compressed_tensors.schemes(FULL | change, SHAPES)
    assert {layer: str(scheme) for layer, scheme in found.items()} == expected


def weights(**change: object) -> dict[str, object]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | change}}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "int-quantized"}, f"^{UP} is stored as 'int-quantized'"),
        ({"format": "nvfp4-pack-quantized", **weights(type="float")}, "^.*'nvfp4-pack-quantized' .4-bit float"),
        (weights(strategy="tensor", group_size=None), "a scale for each tensor"),
        (weights(strategy=None, group_size=None), "a scale for each tensor"),
        (weights(num_bits=5), "5 bits aren't supported"),
        ({"quantization_status": "frozen"}, "weights of status 'frozen'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "quantized KV cache"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transformed weights"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "has no weights; write them out"),
        ({"ignore": ["re:*"]}, "a regular expression that isn't one"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": {"num_bits": 8}}}},
            f"^{UP} has quantized activations",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(PlanishError, match=said):
        compressed_tensors.schemes(FULL | change, SHAPES)
