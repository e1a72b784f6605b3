"""Scheme and SchemeMap: what is written is read, what can't be is refused in one line, the first rule wins."""

import pytest

from planish.errors import PlanishError
from planish.scheme import Scheme, SchemeMap, bits_per_weight

Q, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q: (64, 64), UP: (160, 64), DOWN: (64, 160)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w2g64", (2, 64, True)),
        ("w2g64asym", (2, 64, False)),
        ("w3g16k", (3, 16, True)),
        ("w2g64_asym", (2, 64, False)),
        ("w3g32sym", (3, 32, True)),
        ("w4", (4, 128, True)),
        ("w4asym", (4, 128, False)),
        ("w4pc", (4, None, True)),
        ("w8pcasym", (8, None, False)),
        ("W4A16", (4, 128, True)),
        ("W4A16_ASYM", (4, 128, False)),
        ("w3a16g64", (3, 64, True)),
        (" w4g128 ", (4, 128, True)),
    ],
)
def test_the_fields_spellings(text: str, expected: tuple[int, int | None, bool]) -> None:
    scheme = Scheme.parse(text)
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == expected
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w5g7x", "no scheme 'w5g7x'; write it as w4g128, w2g64asym, w3pc or W4A16"),
        ("", "no scheme ''"),
        ("w4g32k", "w4g32k isn't supported: GGUF's Q3_K alone has scales that share one; use w3g16k"),
        ("w3g16kasym", "use w3g16k"),
        ("int4", "no scheme 'int4'"),
        ("w4g64pc", "no scheme"),
        ("w5g64", "5 bits aren't supported; use one of 2, 3, 4, 6, 8"),
        ("w16", "16 bits aren't supported"),
        ("w4g0", "group size 0 isn't supported; use a multiple of 8, such as 32, 64 or 128"),
        ("w4g12", "group size 12 isn't supported"),
        ("w4a3", "activations of 3 bits aren't supported; use 4 to 8, or 16"),
        ("w4a4kv2", "query, key and value of 2 bits aren't supported; use 4 to 8, or 16"),
        ("w4g64a4g64", "no scheme 'w4g64a4g64': it names its groups twice; write it as w4g128a8"),
    ],
)
def test_what_is_no_scheme(text: str, said: str) -> None:
    with pytest.raises(PlanishError) as error:
        Scheme.parse(text)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "written", "expected"),
    [
        ("w4a4", "w4pca4", (None, 4, False, 16)),
        ("W8A8", "w8pca8", (None, 8, False, 16)),
        ("w8a8s", "w8pca8s", (None, 8, True, 16)),
        ("w6a6asym", "w6pca6asym", (None, 6, False, 16)),
        ("w4g128a8", "w4g128a8", (128, 8, False, 16)),
        ("w4a8g64sym", "w4g64a8", (64, 8, False, 16)),
        ("w4a4kv4", "w4pca4kv4", (None, 4, False, 4)),
        ("w4a4hkv4h", "w4pca4hkv4h", (None, 4, False, 4)),
        ("w4a4h", "w4pca4h", (None, 4, False, 16)),
        ("w4kv8", "w4g128kv8", (128, 16, False, 8)),
        ("W4A4_ASYM", "w4pca4asym", (None, 4, False, 16)),
    ],
)
def test_activations(text: str, written: str, expected: tuple[int | None, int, bool, int]) -> None:
    scheme = Scheme.parse(text)
    how = scheme.activations
    assert how is not None and (scheme.group_size, how.bits, how.symmetric, how.kv_bits) == expected
    assert str(scheme) == written and Scheme.parse(written) == scheme


def test_groups_of_a_row() -> None:
    ragged, whole = Scheme(bits=2, group_size=64), Scheme(bits=2, group_size=None)
    assert [ragged.groups_in(inputs) for inputs in (64, 65, 128, 160)] == [1, 2, 2, 3]
    assert (whole.group_in(160), whole.groups_in(160)) == (160, 1)


@pytest.mark.parametrize(
    ("text", "inputs", "expected"),
    [
        ("w3g16k", 256, 3.4375),
        ("w2g64", 128, 2.25),
        ("w2g64asym", 128, 2 + 18 / 64),
        ("w4pc", 160, 4.1),
        ("w2g64", 160, 2.3),
    ],
)
def test_bits_per_weight(text: str, inputs: int, expected: float) -> None:
    assert Scheme.parse(text).bits_per_weight(inputs) == pytest.approx(expected)


def test_bits_per_weight_counts_what_stays_in_16_bits() -> None:
    scheme = Scheme.parse("w2g64")
    parameters = sum(rows * inputs for rows, inputs in SHAPES.values())
    assert bits_per_weight({}, SHAPES, parameters) == 16
    assert bits_per_weight({Q: scheme}, SHAPES, parameters) == pytest.approx(16 - 13.75 * 64 * 64 / parameters)


def test_ignore_wins_then_the_first_rule_then_the_default() -> None:
    schemes = SchemeMap.parse("w2g32", layers=["mlp=w4g64", "down_proj=w8pc"], ignore=["layers.1"])
    assert {name: str(scheme) for name, scheme in schemes.resolve(SHAPES).items()} == {Q: "w2g32", UP: "w4g64"}
    assert str(schemes) == "w2g32, layers.1=16-bit, mlp=w4g64, down_proj=w8pc"


def test_a_rules_regex_may_hold_an_equals_sign() -> None:
    assert SchemeMap.parse("w4", layers=["(?=.*q_proj).*=w2g32"])[Q] == Scheme.parse("w2g32")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scheme": "w9"}, "9 bits aren't supported"),
        ({"layers": ["down_proj"]}, "layer rule 'down_proj' isn't REGEX=SCHEME; write it as 'down_proj=w4g64'"),
        ({"layers": ["=w4g64"]}, "layer rule '=w4g64' isn't REGEX=SCHEME"),
        ({"layers": ["down_proj=w5"]}, "5 bits aren't supported"),
        ({"ignore": ["(q_proj"]}, "'(q_proj' is no regular expression: "),
        ({"ignore": ["qq_proj"]}, "'qq_proj' matches none of the 3 linears"),
        ({"layers": ["experts=w4g32"]}, "'experts' matches none of the 3 linears"),
        ({"ignore": ["proj"]}, "no linear is left to quantize; relax --ignore"),
        ({"scheme": "w4g128"}, f"{Q}: group size 128 is larger than its 64 inputs; use a smaller group, or 'pc'"),
    ],
)
def test_refusals(arguments: dict, said: str) -> None:
    with pytest.raises(PlanishError) as error:
        SchemeMap.parse(**{"scheme": "w4g64", **arguments}).resolve(SHAPES)
    assert said in str(error.value) and "\n" not in str(error.value)
