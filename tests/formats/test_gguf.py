"""Law 2 for GGUF's blocks: decode(encode(q)) is q in its canonical form, and ggml's own decoder agrees."""

import dataclasses

import numpy as np
import pytest
import torch

from planish.errors import PlanishError, UnsupportedScheme
from planish.formats.gguf import KINDS, canonical, common_scale, decode, encode, plan_type, type_of
from planish.scheme import Scheme

LAYER = "model.layers.0.mlp.up_proj"
HELD = {
    ("w2g64", 576): "Q2_0",
    ("w2g128", 576): "Q2_0",  # 128 doesn't divide 576: the last group has 64 inputs
    ("w2pc", 64): "Q2_0",
    ("w2g32", 64): "Q4_0",
    ("w2g64", 160): "Q4_0",
    ("w2g96", 192): "Q4_0",
    ("w2g64asym", 128): "Q4_0",
    ("w3g64", 576): "Q4_0",
    ("w3g64", 512): "Q3_K or Q4_0",
    ("w3g256", 512): "Q3_K or Q4_0",
    ("w3pc", 768): "Q3_K or Q4_0",
    ("w3g16k", 768): "Q3_K",
    ("w3g64asym", 512): "Q4_0",
    ("w4g64", 576): "Q4_0",
    ("w4g128", 160): "Q4_0",
    ("w4pc", 96): "Q4_0",
    ("w4g32asym", 96): "Q5_0",
    ("w8g64", 192): "Q8_0",
}
each_held = pytest.mark.parametrize(("scheme", "columns"), HELD, ids=lambda value: str(value))


def reference(data: torch.Tensor, kind: str) -> np.ndarray:
    """What the blocks stand for, by the gguf package's own decoder; Q2_0 is newer than the package."""
    if kind == "Q2_0":
        blocks = data.unflatten(1, (-1, 18)).numpy()
        fields = blocks[..., 2:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8) & 3
        values = blocks[..., :2].copy().view(np.float16).astype(np.float32) * (
            fields.reshape(*blocks.shape[:2], 64) - 1.0
        )
        return values.reshape(len(data), -1)
    gguf = pytest.importorskip("gguf")
    return gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])


@each_held
def test_round_trip_and_ggmls_decoder(random_qtensor, scheme: str, columns: int) -> None:
    known, shape = Scheme.parse(scheme), (6, columns)
    q = random_qtensor(known, shape)
    assert bool((q.scale < 0).any())
    kind = type_of(LAYER, q, shared=known.shared)
    assert kind in plan_type(LAYER, known, shape) == HELD[scheme, columns]
    data = encode(q, kind)
    assert data.dtype == torch.uint8 and data.shape == (6, columns // KINDS[kind].weights * KINDS[kind].bytes)
    back = decode(LAYER, data, kind, known, shape)
    assert back.equal(canonical(q))
    assert torch.equal(back.dequantize(), q.dequantize())
    assert np.array_equal(reference(data, kind), q.dequantize().numpy())


def test_canonical_is_itself_or_has_the_least_zero_points(random_qtensor) -> None:
    symmetric = random_qtensor(Scheme.parse("w2g32"), (4, 64))
    assert canonical(symmetric) is symmetric
    q = dataclasses.replace(
        random_qtensor(Scheme.parse("w3g32asym"), (4, 64)), zero=torch.full((4, 2), 6, dtype=torch.uint8)
    )
    q.codes.clamp_(2, 6)
    least = canonical(q)
    assert least.zero is not None and int(least.zero.max()) <= 4
    assert torch.equal(least.dequantize(), q.dequantize())
    assert canonical(least).equal(least)


@pytest.mark.parametrize("factors", [[1, 1, 1, 1], [3, -7, 31, 2], [-32, 5, 1, 30], [32, -5, 1, 30], [6, 4, 2, 8]])
def test_scales_with_a_common_one_fit_q3_k(random_qtensor, factors: list[int]) -> None:
    scheme = Scheme.parse("w3g64")
    scale = torch.tensor([factors, [1] * 4]) * torch.tensor([[1.5 * 2**-10], [-0.5]])
    q = dataclasses.replace(random_qtensor(scheme, (2, 256)), scale=scale.half())
    assert type_of(LAYER, q) == "Q3_K"
    data = encode(q, "Q3_K")
    assert decode(LAYER, data, "Q3_K", scheme, (2, 256)).equal(q)
    assert np.array_equal(reference(data, "Q3_K"), q.dequantize().numpy())


@pytest.mark.parametrize("scales", [[1.0, 33.0, 1, 1], [32.0, -32.0, 1, 1], [1.0, 1.001, 1, 1]])
def test_scales_without_a_common_one_go_to_the_container(random_qtensor, scales: list[float]) -> None:
    scale = torch.tensor([scales]).half()
    assert common_scale(scale.unsqueeze(1)) is None
    q = dataclasses.replace(random_qtensor(Scheme.parse("w3g64"), (1, 256)), scale=scale)
    assert type_of(LAYER, q) == "Q4_0"


def test_common_scale_is_exact_at_the_ends_of_fp16() -> None:
    scale = torch.tensor([[[2.0**-24, 31 * 2.0**-24], [65504.0, -65504.0], [-1024.0, 992.0]]]).half()
    found = common_scale(scale)
    assert found is not None
    assert torch.equal(found[0].double() * found[1], scale.double())


def test_compatible_types_leave_q2_0_out(random_qtensor) -> None:
    q = random_qtensor(Scheme.parse("w2g64"), (4, 128))
    assert type_of(LAYER, q, "compatible") == plan_type(LAYER, q.scheme, q.shape, "compatible") == "Q4_0"
    assert decode(LAYER, encode(q, "Q4_0"), "Q4_0", Scheme.parse("w2g64"), (4, 128)).equal(q)
    with pytest.raises(PlanishError, match="smalest.*did you mean 'smallest'"):
        plan_type(LAYER, q.scheme, q.shape, "smalest")


@pytest.mark.parametrize(
    ("scheme", "columns", "said"),
    [
        ("w4g32", 40, "multiples of 32, not 40"),
        ("w4g16", 64, "groups of 16 don't fall on GGUF's blocks of 32"),
        ("w2g40", 160, "groups of 40"),
        ("w3g16", 256, "groups of 16 don't fall on GGUF's blocks of 32; use .*, or w3g16k"),
        ("w8g32asym", 64, "no type for w8g32asym"),
    ],
)
def test_what_no_block_holds_is_refused_by_name(random_qtensor, scheme: str, columns: int, said: str) -> None:
    known = Scheme.parse(scheme)
    q = random_qtensor(known, (8, columns))
    for attempt in (lambda: plan_type(LAYER, known, (8, columns)), lambda: type_of(LAYER, q)):
        with pytest.raises(UnsupportedScheme, match=rf"^{LAYER}: .*{said}.*--format native"):
            attempt()


def test_scales_that_share_one_need_rows_of_256(random_qtensor) -> None:
    scheme = Scheme.parse("w3g16k")
    said = rf"^{LAYER}: w3g16k is GGUF's Q3_K, which needs inputs in multiples of 256, not 576; give .* w4g32"
    with pytest.raises(UnsupportedScheme, match=said):
        plan_type(LAYER, scheme, (8, 576))
    q = random_qtensor(dataclasses.replace(scheme, shared=False), (8, 256))
    with pytest.raises(UnsupportedScheme, match=rf"^{LAYER}: its scales share none, as those of w3g16k do"):
        type_of(LAYER, q, shared=True)


def test_offsets_are_refused(random_qtensor) -> None:
    q = random_qtensor(Scheme.parse("w2g64"), (4, 64), offset=True)
    with pytest.raises(UnsupportedScheme, match=rf"^{LAYER}: .*offsets.*--format native"):
        type_of(LAYER, q)


@pytest.mark.parametrize(("byte", "value"), [(18, 0), (2, 255)], ids=["a scale", "a level"])
def test_damaged_blocks_are_named(random_qtensor, byte: int, value: int) -> None:
    scheme = Scheme.parse("w3g64")
    data = encode(random_qtensor(scheme, (2, 64)), "Q4_0")
    data[:, byte] = value
    with pytest.raises(PlanishError, match=rf"^{LAYER} holds blocks that w3g64 can't have"):
        decode(LAYER, data, "Q4_0", scheme, (2, 64))
