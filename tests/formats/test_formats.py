"""Law 2: decode(encode(q)) == q bit for bit, or a refusal by name before any work."""

import dataclasses
import json

import pytest
import torch

from planish.errors import PlanishError, UnsupportedScheme
from planish.formats import FORMATS, choose, detect, verify
from planish.scheme import Scheme

LAYER = "model.layers.0.mlp.up_proj"
BITS = [2, 3, 4, 8]
GROUPS = [32, 64, 128, None]
READ_ONLY = {"awq"}
each_format = pytest.mark.parametrize("name", FORMATS)
each_written_format = pytest.mark.parametrize("name", [name for name in FORMATS if name not in READ_ONLY])


def refused(name: str, scheme: Scheme, shape: tuple[int, int]) -> bool:
    """What each format is known not to hold."""
    if name == "native" or name in READ_ONLY:
        return name in READ_ONLY
    ragged = shape[1] % scheme.group_in(shape[1]) != 0
    if name.startswith("compressed_tensors"):
        return ragged
    return ragged or shape[0] % 32 != 0 or shape[1] % 32 != 0 or (name == "gptq" and not scheme.symmetric)


@each_format
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(32, 128), (96, 384), (64, 160), (40, 128), (32, 136)])
def test_round_trip_or_refusal(random_qtensor, name, bits, group, symmetric, shape) -> None:
    scheme, known = Scheme(bits=bits, group_size=group, symmetric=symmetric), FORMATS[name]
    q = random_qtensor(scheme, shape)
    assert bool((q.scale < 0).any())
    if refused(name, scheme, shape):
        for attempt in (lambda: known.check(LAYER, scheme, shape), lambda: known.encode(LAYER, q)):
            with pytest.raises(UnsupportedScheme, match=rf"^{LAYER}: .*; use .*native|gptq_v2"):
                attempt()
        return
    known.check(LAYER, scheme, shape)
    tensors = known.encode(LAYER, q)
    assert all(tensor.is_contiguous() and key.startswith(LAYER + ".") for key, tensor in tensors.items())
    back = known.decode(LAYER, tensors, scheme, shape)
    assert back.equal(q) and back.codes.is_contiguous() and back.scale.is_contiguous()
    assert torch.equal(back.dequantize(), q.dequantize())


@each_format
def test_only_native_holds_offsets(random_qtensor, name) -> None:
    scheme, shape = Scheme(bits=2, group_size=32), (32, 128)
    q = random_qtensor(scheme, shape, offset=True)
    if name == "native":
        assert FORMATS[name].decode(LAYER, FORMATS[name].encode(LAYER, q), scheme, shape).equal(q)
    else:
        with pytest.raises(UnsupportedScheme, match=rf"^{LAYER}: .*(offset|read only).*--format .*native"):
            FORMATS[name].encode(LAYER, q)


HOLDS_ORDER = {"native", "gptq", "gptq_v2"}


@each_format
def test_columns_in_another_order_are_held_or_refused(random_qtensor, name) -> None:
    scheme, shape, known = Scheme(bits=4, group_size=32), (32, 128), FORMATS[name]
    groups = torch.randperm(128, generator=torch.Generator().manual_seed(0)).view(4, 32)
    ascending = dataclasses.replace(random_qtensor(scheme, shape), order=groups.sort(dim=1).values.flatten().int())
    if name not in HOLDS_ORDER:
        with pytest.raises(UnsupportedScheme, match=rf"^{LAYER}: {name}.*(another order|read only).*--format .*native"):
            known.encode(LAYER, ascending)
        return
    back = known.decode(LAYER, known.encode(LAYER, ascending), scheme, shape)
    assert back.equal(ascending) and torch.equal(back.dequantize(), ascending.dequantize())
    for order in (groups.flatten().int(), torch.arange(128, dtype=torch.int32)):
        other = dataclasses.replace(ascending, order=order)
        if name == "native":
            assert known.decode(LAYER, known.encode(LAYER, other), scheme, shape).equal(other)
            continue
        with pytest.raises(UnsupportedScheme, match=rf"^{LAYER}: {name} can't hold this order.*--format native"):
            known.encode(LAYER, other)


@each_written_format
def test_a_missing_or_misshapen_tensor_is_named(random_qtensor, name) -> None:
    scheme, shape, known = Scheme(bits=4, group_size=32), (32, 128), FORMATS[name]
    tensors = known.encode(LAYER, random_qtensor(scheme, shape))
    for key in tensors.keys() - {f"{LAYER}.g_idx"}:
        rest = {other: tensor for other, tensor in tensors.items() if other != key}
        with pytest.raises(PlanishError, match=f"^{key} is missing"):
            known.decode(LAYER, rest, scheme, shape)
        with pytest.raises(PlanishError, match=f"^{key} is torch"):
            known.decode(LAYER, rest | {key: tensors[key][:-1]}, scheme, shape)


def linears(blocks: int = 2) -> dict[str, tuple[int, int]]:
    parts = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
    shapes = {f"model.layers.{i}.{part}": shape for i in range(blocks) for part, shape in parts.items()}
    return shapes | {"lm_head": (256, 64)}


W2, W4 = Scheme.parse("w2g32"), Scheme.parse("w4g64")
CASES: dict[str, dict[str, Scheme | None]] = {
    "one scheme": {},
    "asymmetric": {"": Scheme.parse("w2g32asym")},
    "whole rows": {"": Scheme.parse("w3pc")},
    "one part in 16 bits": {"down_proj": None},
    "one block in 16 bits": {"layers.0": None},
    "mixed bits": {"down_proj": W4},
    "head": {"lm_head": W4},
    "mixed symmetry": {"down_proj": Scheme.parse("w2g32asym")},
}
HELD = {
    "native": set(CASES),
    "auto_round": set(CASES) - {"mixed symmetry"},
    "gptq": {"one scheme", "whole rows", "one part in 16 bits"},
    "gptq_v2": {"one scheme", "asymmetric", "whole rows", "one part in 16 bits"},
    "compressed_tensors": set(CASES),
    "compressed_tensors_int": set(CASES),
    "awq": set(),
}


def schemes_of(case: str) -> dict[str, Scheme | None]:
    schemes: dict[str, Scheme | None] = {}
    for layer in linears():
        schemes[layer] = None if layer == "lm_head" else W2
        for part, scheme in CASES[case].items():
            if part in layer and (part or layer != "lm_head"):
                schemes[layer] = scheme
    return schemes


@each_format
@pytest.mark.parametrize("case", CASES)
def test_configuration_names_every_layers_scheme(name: str, case: str) -> None:
    schemes, known = schemes_of(case), FORMATS[name]
    if case not in HELD[name]:
        with pytest.raises(UnsupportedScheme, match="^(model|lm_head).*use .*(auto_round|native|gptq_v2)"):
            verify(known, schemes, linears())
        return
    verify(known, schemes, linears())
    config = json.loads(json.dumps(known.config(schemes)))
    assert detect(config) is known
    assert known.schemes(config, linears()) == {layer: s for layer, s in schemes.items() if s is not None}


@pytest.mark.parametrize("case", CASES)
def test_auto_is_auto_round_where_it_holds_the_model_else_native(case: str) -> None:
    expected = "auto_round" if case in HELD["auto_round"] else "native"
    assert choose(schemes_of(case), linears()).name == expected


def test_auto_is_native_for_ragged_groups() -> None:
    schemes = {LAYER: Scheme.parse("w4g128")}
    assert choose(schemes, {LAYER: (64, 576)}).name == "native"
    assert choose({LAYER: Scheme.parse("w4g64")}, {LAYER: (64, 576)}).name == "auto_round"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "'bitsandbytes'.*native, auto_round, gptq, gptq_v2, compressed_tensors, compressed_tensors_int, awq",
        ),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_p"}, "gptq of dialect gptq_p"),
        ({}, "None"),
    ],
)
def test_unknown_method_is_named(config: dict[str, str], said: str) -> None:
    with pytest.raises(PlanishError, match=said):
        detect(config)


@each_format
def test_a_model_without_quantized_layers_has_no_configuration(name: str) -> None:
    with pytest.raises(PlanishError, match="no layer is quantized"):
        FORMATS[name].config({LAYER: None})
