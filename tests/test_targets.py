"""Who loads what: the table agrees with itself, and what a target can't load is refused by layer, reason and mend."""

import pytest

from planish.errors import PlanishError
from planish.formats import FORMATS
from planish.scheme import BITS, Scheme
from planish.targets import GGUF, LOADERS, TARGETS, choose_for, formats_of, verdicts

BLOCK = {
    "self_attn.q_proj": (512, 512),
    "self_attn.k_proj": (256, 512),
    "self_attn.v_proj": (256, 512),
    "self_attn.o_proj": (512, 512),
    "mlp.gate_proj": (1024, 512),
    "mlp.up_proj": (1024, 512),
    "mlp.down_proj": (512, 1024),
}
SHAPES = {f"model.layers.{index}.{name}": shape for index in range(2) for name, shape in BLOCK.items()}


def every(scheme: str, **others: str | None) -> dict[str, Scheme | None]:
    """One scheme for all linears but those whose names end in one of the keys."""
    found: dict[str, Scheme | None] = {}
    for name in SHAPES:
        text = next((text for end, text in others.items() if name.endswith(end)), scheme)
        found[name] = None if text is None else Scheme.parse(text)
    return found


def test_the_table_names_formats_and_bits_that_there_are() -> None:
    for loader in LOADERS:
        assert loader.format in {*FORMATS, GGUF} and set(loader.bits) <= set(BITS)
        assert loader.checked.endswith("run") != loader.checked.startswith("not run; "), loader


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_chosen_is_what_loads(target: str) -> None:
    for text in ("w4g128", "w8g128", "w4g64asym", "w2g64", "w3g128", "w2g64asym"):
        try:
            name = choose_for(target, every(text), SHAPES)
        except PlanishError as error:
            assert str(error).startswith("model.layers.0.self_attn.q_proj: ") and target in str(error)
            continue
        assert name in formats_of(target)
        (verdict,) = (found for found in verdicts(name, [Scheme.parse(text)]) if found.target == target)
        assert verdict.loads and "{path}" in verdict.how and verdict.checked


@pytest.mark.parametrize(
    ("target", "scheme", "expected"),
    [
        ("vllm", "w4g128", "compressed_tensors"),
        ("vllm", "w2g64", "compressed_tensors"),
        ("sglang", "w4g128", "compressed_tensors"),
        ("vllm", "w8a8s", "compressed_tensors_int"),
        ("transformers", "w2g64asym", "auto_round"),
        ("llama.cpp", "w3g64", "gguf"),
    ],
)
def test_the_preferred_format(target: str, scheme: str, expected: str) -> None:
    assert choose_for(target, every(scheme), SHAPES) == expected


def test_a_group_that_strict_formats_refuse_is_held_by_the_next_one() -> None:
    assert choose_for("transformers", every("w4g96"), SHAPES) == "native"


@pytest.mark.parametrize(
    ("schemes", "how", "message"),
    [
        (every("w2g64asym"), {}, "q_proj: vllm can't load w2g64asym as compressed_tensors; of that it reads w2, w3,"),
        (every("w4g128", k_proj="w8g128"), {}, "k_proj (w8g128) and model.layers.0.self_attn.q_proj (w4g128) are one"),
        (every("w4g128", up_proj=None), {}, "up_proj (16-bit) and model.layers.0.mlp.gate_proj (w4g128) are one"),
        (every("w4g128"), {"tp": 8}, "o_proj: cut over 8 GPUs in vllm, 64 inputs each, groups of 128 are split"),
        (every("w4g128"), {"tp": 3}, "q_proj: its 512 outputs can't be cut over 3 GPUs"),
        (every("w4g128"), {"tp": 0}, "--tp 0; at least 1 GPU"),
        (every("w4a4"), {}, "q_proj: vllm can't load w4pca4 as compressed_tensors; of that it reads w2, w3, w4,"),
        (every("w4a4"), {"format": "compressed_tensors_int"}, "can't load w4pca4 as compressed_tensors_int; of that it "
         "reads w8a8"),
        (every("w4g128"), {"format": "gguf"}, "vllm doesn't read gguf; use --format compressed_tensors"),
        (every("w4g96"), {}, "groups of 96"),
    ],
)
def test_refusals(schemes: dict, how: dict, message: str) -> None:
    with pytest.raises(PlanishError) as refused:
        choose_for("vllm", schemes, SHAPES, **how)
    assert message in str(refused.value)


def test_experts_of_a_block_have_one_scheme() -> None:
    names = [f"model.layers.0.mlp.experts.{index}.down_proj" for index in range(2)]
    shapes = dict.fromkeys(names, (512, 512))
    schemes = {names[0]: Scheme.parse("w4g128"), names[1]: Scheme.parse("w8g128")}
    with pytest.raises(PlanishError, match="are one matrix in vllm"):
        choose_for("vllm", schemes, shapes)
    assert choose_for("vllm", dict.fromkeys(names, Scheme.parse("w4g128")), shapes) == "compressed_tensors"


def test_a_target_that_there_is_not() -> None:
    with pytest.raises(PlanishError, match="no target 'vlm': did you mean 'vllm'"):
        formats_of("vlm")
