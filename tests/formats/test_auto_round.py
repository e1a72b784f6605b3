"""AutoRound's configuration: packing by symmetry, exceptions, and what of others' models is refused."""

import pytest

from planish.errors import PlanishError
from planish.formats import auto_round
from planish.scheme import Scheme

UP, DOWN, HEAD = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"
SHAPES = {UP: (64, 64), DOWN: (64, 64), HEAD: (256, 64)}
W2 = Scheme.parse("w2g32")


def test_packing_follows_symmetry() -> None:
    assert auto_round.config({UP: W2})["packing_format"] == "auto_round:auto_gptq"
    assert auto_round.config({UP: Scheme.parse("w2g32asym")})["packing_format"] == "auto_round"


def test_no_group_index_is_written(random_qtensor) -> None:
    tensors = auto_round.encode(UP, random_qtensor(W2, (32, 64)))
    assert set(tensors) == {f"{UP}.{key}" for key in ("qweight", "qzeros", "scales")}


def test_configuration_names_blocks_and_exceptions() -> None:
    gate, head = "model.layers.0.mlp.gate_proj", Scheme.parse("w4pc")
    config = auto_round.config({UP: W2, gate: W2, DOWN: None, HEAD: head})
    assert config == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 2,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
        "extra_config": {
            DOWN: {"bits": 16},
            HEAD: {"bits": 4, "group_size": -1, "sym": True, "data_type": "int"},
        },
    }


def test_several_stacks_of_blocks_are_a_list() -> None:
    schemes = {"encoder.layers.0.fc": W2, "decoder.layers.0.fc": W2, "vision.layers.0.fc": None}
    config = auto_round.config(schemes)
    assert config["block_name_to_quantize"] == ["decoder.layers", "encoder.layers"]
    assert "extra_config" not in config


BASE = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 2,
    "group_size": 32,
    "sym": True,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {UP: "w2g32", DOWN: "w2g32"}),
        ({"block_name_to_quantize": "model.layers.0,model.layers.7"}, {UP: "w2g32"}),
        ({"extra_config": {r".*\.down_proj": {"bits": 16}}}, {UP: "w2g32"}),
        ({"extra_config": {DOWN: {"bits": 8, "group_size": -1}}}, {UP: "w2g32", DOWN: "w8pc"}),
        ({"extra_config": {HEAD: {"bits": 4}}}, {UP: "w2g32", DOWN: "w2g32", HEAD: "w4g32"}),
    ],
)
def test_configurations_of_others_are_read(change: dict[str, object], expected: dict[str, str]) -> None:
    found = auto_round.schemes(BASE | change, SHAPES)
    assert {layer: str(scheme) for layer, scheme in found.items()} == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"packing_format": "auto_round:auto_awq"}, "packed as 'auto_round:auto_awq'"),
        ({"sym": False}, "w2g32asym is packed as 'auto_round:auto_gptq'; Planish reads only auto_round "),
        ({"data_type": "mx_fp"}, "only integer weights"),
        ({"act_bits": 8}, "only integer weights"),
    ],
)
def test_what_cannot_be_read_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(PlanishError, match=f"^{UP}: .*{said}"):
        auto_round.schemes(BASE | change, SHAPES)
