"""The codec: store, encode, decode, fake_quantize and its gradients, and QTensor's own manners."""

import dataclasses

import pytest
import torch
from torch import Tensor

from planish.bitstream import Stream
from planish.qtensor import (
    SCALE_FLOOR,
    QTensor,
    decode,
    encode,
    fake_quantize,
    from_groups,
    midpoint,
    store,
    to_groups,
)
from planish.scheme import Scheme

LARGEST = torch.finfo(torch.float16).max


def test_groups_pad_a_ragged_row_with_zeros() -> None:
    weight = torch.randn(3, 20)
    groups = to_groups(weight, 8)
    assert groups.shape == (3, 3, 8) and bool((groups[:, 2, 4:] == 0).all())
    assert torch.equal(from_groups(groups, 20), weight)


def test_store_is_fp16_and_keeps_the_sign() -> None:
    scale = torch.randn(10_000) * 10 ** torch.empty(10_000).uniform_(-9, 7)
    stored = store(scale)
    assert stored.dtype == torch.float32 and torch.equal(stored, stored.half().float())
    assert torch.equal(stored.signbit(), scale.signbit())
    usual = (scale.abs() > SCALE_FLOOR) & (scale.abs() < LARGEST)
    assert torch.equal(stored[usual], scale[usual].half().float())
    assert torch.equal(store(stored), stored)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0.0, SCALE_FLOOR), (-0.0, -SCALE_FLOOR), (1e-9, SCALE_FLOOR), (-1e-9, -SCALE_FLOOR), (1e9, LARGEST)],
)
def test_store_has_a_floor_and_never_overflows(given: float, expected: float) -> None:
    assert store(torch.tensor([given])).item() == torch.tensor(expected).half().item()


def test_store_passes_gradients_straight_through() -> None:
    scale = torch.tensor([1e-9, -0.3, 0.7, 1e9], requires_grad=True)
    store(scale).backward(torch.arange(4.0))
    assert scale.grad is not None and torch.equal(scale.grad, torch.arange(4.0))


def test_store_survives_compiling() -> None:
    compiled = torch.compile(lambda scale: store(scale * 1.0) * 1.0, backend="aot_eager", fullgraph=True)
    scale = torch.randn(1000, requires_grad=True)
    assert torch.equal(compiled(scale), store(scale)) and not torch.equal(compiled(scale), scale)
    compiled(scale).sum().backward()
    assert scale.grad is not None and torch.equal(scale.grad, torch.ones(1000))


def test_codes_round_half_to_even_before_zero_is_added() -> None:
    weight, one = torch.tensor([[[0.5, 1.5, 2.5, -0.5]]]), torch.ones(1, 1, 1)
    assert encode(weight, one, one, 4).flatten().tolist() == [1, 3, 3, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_codes_are_clamped_and_decoded_on_the_grid(sign: int) -> None:
    weight = torch.tensor([[[-9.0, -2.0, -1.0, 0.0, 1.0, 9.0]]])
    scale, zero = torch.full((1, 1, 1), 0.5 * sign), torch.full((1, 1, 1), 2.0)
    codes = encode(weight, scale, zero, 2)
    assert codes.flatten().tolist() == ([0, 0, 0, 2, 3, 3] if sign > 0 else [3, 3, 3, 2, 0, 0])
    assert decode(codes, scale, zero).flatten().tolist() == [
        value * sign for value in ([-1, -1, -1, 0, 0.5, 0.5] if sign > 0 else [0.5, 0.5, 0.5, 0, -1, -1])
    ]


def test_rounding_and_offset_are_where_the_equation_says() -> None:
    weight, scale, zero = torch.randn(4, 2, 8), torch.rand(4, 2, 1) + 0.1, torch.full((4, 2, 1), 8.0)
    rounding, offset = torch.rand(4, 2, 8) - 0.5, torch.randn(4, 2, 1)
    codes = encode(weight, scale, zero, 4, rounding, offset)
    assert torch.equal(codes, (torch.round((weight - offset) / scale + rounding) + zero).clamp(0, 15))
    assert torch.equal(decode(codes, scale, zero, offset), scale * (codes - zero) + offset)


def _case(
    bits: int, symmetric: bool, rounded: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """weight, rounding, scale, zero with scales of both signs and many a clamped code."""
    generator = torch.Generator().manual_seed(bits)
    grid = (5, 3, 1)
    sign = 1 - 2 * torch.randint(0, 2, grid, generator=generator)
    scale = sign * (torch.rand(grid, generator=generator) + 0.5) / 2**bits
    rounding = torch.randn(5, 3, 16, generator=generator) if rounded else None
    zero = torch.randint(0, 2**bits, grid, generator=generator).float()
    zero = torch.full(grid, float(midpoint(bits))) if symmetric else zero
    return torch.randn(5, 3, 16, generator=generator).to(dtype), rounding, scale, zero


def _straight_through(weight: Tensor, rounding: Tensor | None, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The equation in plain autograd: round passes gradients, clamp doesn't where it clamps."""
    steps = weight.float() / scale if rounding is None else weight.float() / scale + rounding
    rounded = steps + (torch.round(steps) - steps).detach()
    return scale * ((rounded + zero).clamp(0, 2**bits - 1) - zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("rounded", [True, False], ids=["offset", "nearest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fake_quantize_is_the_codec_with_straight_through_gradients(
    bits: int, symmetric: bool, rounded: bool, dtype: torch.dtype
) -> None:
    case = _case(bits, symmetric, rounded, dtype)
    codes = encode(case[0], case[2], case[3], bits, case[1])
    clamped = (codes == 0) | (codes == 2**bits - 1)
    assert bool(clamped.any()) and not bool(clamped.all()) and bool((case[2] < 0).any())
    assert torch.equal(fake_quantize(*case, bits, dtype), decode(codes, case[2], case[3]).to(dtype))

    grad = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = ([t.clone().requires_grad_() if t is not None else None for t in case] for _ in range(2))
    fake_quantize(*found, bits, dtype).backward(grad)
    _straight_through(*expected, bits).backward(grad.float())
    assert found[0].grad.dtype == dtype
    for mine, plain in zip(found, expected, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-5, atol=1e-5, check_dtype=False)
            assert bool((mine.grad != 0).any())


def test_weights_without_gradient_get_none() -> None:
    weight, _, scale, zero = _case(4, True, False, torch.float32)
    scale.requires_grad_()
    fake_quantize(weight, None, scale, zero, 4, torch.float32).sum().backward()
    assert weight.grad is None and scale.grad is not None


@pytest.mark.parametrize("rounded", [True, False], ids=["offset", "nearest"])
def test_the_op_keeps_the_rules_of_custom_ops(rounded: bool) -> None:
    weight, rounding, scale, zero = _case(4, False, rounded, torch.float32)
    trained = [t.requires_grad_() if t is not None else None for t in (weight, rounding, scale, zero)]
    torch.library.opcheck(fake_quantize, (*trained, 4, torch.float32))
    torch.library.opcheck(store, (scale,))


@pytest.fixture
def quantized() -> QTensor:
    generator = torch.Generator().manual_seed(0)
    return QTensor(
        codes=torch.randint(0, 8, (6, 40), generator=generator, dtype=torch.uint8),
        scale=torch.randn(6, 3, generator=generator).half(),
        zero=torch.randint(0, 8, (6, 3), generator=generator, dtype=torch.uint8),
        offset=torch.randn(6, 3, generator=generator),
        bits=3,
        group_size=16,
        order=torch.arange(40, dtype=torch.int32),
    )


def test_dequantize_is_the_equation_rounded_once(quantized: QTensor) -> None:
    zero, offset = quantized.zero, quantized.offset
    assert zero is not None and offset is not None
    for row, column in [(0, 0), (3, 17), (5, 39)]:
        group = column // 16
        code = quantized.codes[row, column].item() - zero[row, group].item()
        expected = quantized.scale[row, group].float() * code + offset[row, group]
        assert quantized.dequantize()[row, column] == expected
    assert torch.equal(quantized.dequantize(torch.bfloat16), quantized.dequantize().bfloat16())
    symmetric = dataclasses.replace(quantized, zero=None)
    constant = dataclasses.replace(quantized, zero=torch.full_like(zero, 4))
    assert symmetric.symmetric and torch.equal(symmetric.dequantize(), constant.dequantize())


@pytest.mark.parametrize("part", ["codes", "scale", "zero", "offset", "order"])
def test_equal_and_digest_see_every_part(quantized: QTensor, part: str) -> None:
    same = dataclasses.replace(quantized, **{part: getattr(quantized, part).clone()})
    assert quantized.equal(same) and Stream.of(quantized).digest() == Stream.of(same).digest()
    changed = getattr(quantized, part).clone()
    changed.view(-1)[1] += 1
    others = [dataclasses.replace(quantized, **{part: changed})]
    if part in ("zero", "offset", "order"):
        others.append(dataclasses.replace(quantized, **{part: None}))
    for other in others:
        assert not quantized.equal(other) and Stream.of(quantized).digest() != Stream.of(other).digest()


def test_columns_in_another_order_are_put_back(quantized: QTensor) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).int()
    plain, moved = quantized.dequantize(), dataclasses.replace(quantized, order=order).dequantize()
    for column in range(40):
        assert torch.equal(moved[:, order[column]], plain[:, column])
    assert torch.equal(dataclasses.replace(quantized, order=None).dequantize(), plain)


def test_scheme_and_device(quantized: QTensor) -> None:
    assert quantized.scheme == Scheme(bits=3, group_size=16, symmetric=False)
    whole = dataclasses.replace(
        quantized, scale=quantized.scale[:, :1], zero=None, offset=None, group_size=quantized.shape[1]
    )
    assert str(whole.scheme) == "w3pc"
    assert quantized.to("cpu").equal(quantized) and whole.to("meta").zero is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": torch.ones(6, 3)},
        {"scale": torch.ones(6, 2).half()},
        {"group_size": 40},
        {"zero": torch.ones(6, 3)},
        {"order": torch.arange(40)},
        {"order": torch.arange(39).int()},
    ],
)
def test_what_does_not_belong_together_is_a_bug(quantized: QTensor, wrong: dict) -> None:
    with pytest.raises(AssertionError):
        dataclasses.replace(quantized, **wrong)
