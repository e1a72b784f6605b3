"""AWQ is read as its format says; nothing is written in it. Packed here by a writer from the format's own words."""

import pytest
import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.formats import FORMATS, detect
from planish.qtensor import QTensor
from planish.scheme import Scheme

LAYER, HEAD = "model.layers.0.mlp.up_proj", "lm_head"
SHAPES = {LAYER: (64, 96), "model.layers.0.mlp.down_proj": (96, 64), HEAD: (64, 64)}
CONFIG = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # bits that output j of eight is shifted by
ASYMMETRIC = Scheme.parse("w4g32asym")


def packed(codes: Tensor) -> Tensor:
    """uint8 [out, n] -> int32 [n, out / 8]."""
    words = torch.zeros(codes.shape[1], codes.shape[0] // 8, dtype=torch.int64)
    for output, row in enumerate(codes.long()):
        words[:, output // 8] |= row << SHIFTS[output % 8]
    return torch.where(words >= 2**31, words - 2**32, words).int()


def written(q: QTensor) -> dict[str, Tensor]:
    zero = torch.full_like(q.scale, 8).byte() if q.zero is None else q.zero
    parts = {"qweight": packed(q.codes), "qzeros": packed(zero), "scales": q.scale.T.contiguous()}
    return {f"{LAYER}.{name}": part for name, part in parts.items()}


@pytest.mark.parametrize("scheme", ["w4g32asym", "w4g32", "w4pcasym"])
def test_it_is_read_exactly(random_qtensor, scheme: str) -> None:
    parsed = Scheme.parse(scheme)
    q = random_qtensor(parsed, SHAPES[LAYER])
    assert FORMATS["awq"].decode(LAYER, written(q), parsed, SHAPES[LAYER]).equal(q)


def test_a_missing_or_misshapen_tensor_is_named(random_qtensor) -> None:
    tensors = written(random_qtensor(ASYMMETRIC, SHAPES[LAYER]))
    for key in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != key}
        with pytest.raises(PlanishError, match=f"^{key} is missing"):
            FORMATS["awq"].decode(LAYER, rest, ASYMMETRIC, SHAPES[LAYER])
        with pytest.raises(PlanishError, match=f"^{key} is torch"):
            FORMATS["awq"].decode(LAYER, rest | {key: tensors[key][:-1]}, ASYMMETRIC, SHAPES[LAYER])
    with pytest.raises(PlanishError, match="qzeros holds zero points that w4g32 can't have"):
        FORMATS["awq"].decode(LAYER, tensors, Scheme.parse("w4g32"), SHAPES[LAYER])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {LAYER: "w4g32asym", "model.layers.0.mlp.down_proj": "w4g32asym"}),
        ({"modules_to_not_convert": ["down_proj", "visual"]}, {LAYER: "w4g32asym"}),
        ({"modules_to_not_convert": ["mlp.down"], "version": "GEMM", "group_size": -1}, {LAYER: "w4pcasym"}),
    ],
)
def test_configurations_are_read(change: dict[str, object], expected: dict[str, str]) -> None:
    config = CONFIG | change
    assert detect(config) is FORMATS["awq"]
    found = FORMATS["awq"].schemes(config, SHAPES)
    assert {layer: str(scheme) for layer, scheme in found.items()} == expected


@pytest.mark.parametrize("change", [{"version": "gemv"}, {"bits": 3}])
def test_other_versions_and_bits_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(PlanishError, match="Planish reads only 4-bit 'gemm'"):
        FORMATS["awq"].schemes(CONFIG | change, SHAPES)


@pytest.mark.parametrize("packing", ["auto_round:auto_awq", "auto_round:auto_gptq"])
def test_dialects_of_auto_round_are_read(random_qtensor, packing: str) -> None:
    config = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "block_name_to_quantize": "model.layers",
        "extra_config": {"model.layers.0.mlp.down_proj": {"bits": 16}},
    }
    known, q = detect(config), random_qtensor(ASYMMETRIC, SHAPES[LAYER])
    assert known.schemes(config, SHAPES) == {LAYER: ASYMMETRIC}
    tensors = written(q)
    if packing.endswith("gptq"):
        tensors = FORMATS["gptq_v2"].encode(LAYER, q)
        tensors[f"{LAYER}.qzeros"] -= 0x11111111
    assert known.decode(LAYER, tensors, ASYMMETRIC, SHAPES[LAYER]).equal(q)
    assert detect(config | {"sym": True, "packing_format": "auto_round:auto_gptq"}) is FORMATS["auto_round"]
