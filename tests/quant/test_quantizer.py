"""Quantizer and QLinear: slots get what they need, gradients reach them, nothing else is trained."""

import functools

import pytest
import torch
from torch import Tensor, nn

from planish.quant import Given, Grid, Learned, MinMax, Offset, QLinear, Quantizer, Steps, TunedMinMax, grid_of
from planish.scheme import Scheme

W2 = Scheme.parse("w2g32")


def weight_of(rows: int = 8, inputs: int = 80, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("text", ["w2g32", "w3g64", "w4pc", "w8g128", "w2g32asym", "w4pcasym"])
def test_what_is_stored_is_what_the_scheme_says(text: str) -> None:
    scheme, weight = Scheme.parse(text), weight_of(inputs=160)
    quantized = Quantizer(weight, scheme).quantize(weight)
    assert quantized.scheme == scheme and quantized.shape == (8, 160)
    assert quantized.scale.shape == (8, scheme.groups_in(160))
    assert int(quantized.codes.max()) < 2**scheme.bits and quantized.codes.is_contiguous()
    assert scheme.symmetric == (quantized.zero is None)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_error_is_at_most_half_a_step_and_the_zero_points_rounding(bits: int) -> None:
    weight, scheme = weight_of(), Scheme(bits=bits, group_size=32, symmetric=False)
    quantized = Quantizer(weight, scheme).quantize(weight)
    step = quantized.scale.float().repeat_interleave(32, 1)[:, :80]
    assert bool(((quantized.dequantize() - weight).abs() <= 1.01 * step).all())
    halves = (quantized.dequantize() - weight).abs() <= 0.501 * step
    assert halves.float().mean() > 0.9


def test_slots_get_groups_and_the_importance_of_each_input() -> None:
    seen = {}

    class Recorded(MinMax):
        def __init__(self, groups: Tensor, scheme: Scheme, importance: Tensor | None = None) -> None:
            super().__init__(groups, scheme)
            seen.update(groups=groups, importance=importance)

    weight = weight_of(dtype=torch.bfloat16)
    Quantizer(weight, W2, range_slot=Recorded, importance=torch.arange(80.0))
    assert seen["groups"].shape == (8, 3, 32) and seen["groups"].dtype == torch.bfloat16
    assert torch.equal(seen["importance"].flatten(), torch.cat([torch.arange(80.0), torch.zeros(16)]))
    products = torch.rand(3, 32, 32)
    Quantizer(weight, W2, range_slot=Recorded, importance=products)
    assert seen["importance"] is products
    Quantizer(weight, W2, range_slot=Recorded)
    assert seen["importance"] is None


def test_a_weight_slot_is_asked_before_the_range() -> None:
    class Doubled(nn.Module):
        def __init__(self, weight: Tensor, scheme: Scheme) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.factor

    weight = weight_of()
    doubled = Quantizer(weight, W2, weight_slot=Doubled)
    assert torch.equal(doubled(weight), Quantizer(2 * weight, W2)(2 * weight))
    assert torch.equal(doubled.quantize(weight).dequantize(), doubled(weight))
    doubled(weight).sum().backward()
    ((factor, _),) = doubled.trainable("weight")
    assert factor.grad is not None and factor.grad != 0


@pytest.mark.parametrize("scheme", [W2, Scheme.parse("w2g32asym")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_reach_every_parameter_of_the_slots(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = weight_of(dtype=dtype)
    quantizer = Quantizer(weight, scheme, range_slot=TunedMinMax, rounding_slot=Offset)
    counts = {slot: len(quantizer.trainable(slot)) for slot in ("weight", "range", "rounding")}
    assert counts == {"weight": 0, "range": 1 if scheme.symmetric else 2, "rounding": 1}
    result = quantizer(weight)
    assert result.dtype == dtype and result.shape == weight.shape
    (result.float() ** 2).sum().backward()
    for parameter in quantizer.parameters():
        assert parameter.dtype == torch.float32 and parameter.grad is not None
        assert bool(parameter.grad.isfinite().all()) and bool((parameter.grad != 0).any())


def test_padding_of_a_ragged_row_gets_no_gradient() -> None:
    weight = weight_of()
    quantizer = Quantizer(weight, W2, rounding_slot=Offset)
    quantizer(weight).sum().backward()
    ((v, _),) = quantizer.trainable("rounding")
    assert v.grad is not None and bool((v.grad[:, 2, 16:] == 0).all()) and bool((v.grad[:, 2, :16] != 0).any())


@pytest.mark.parametrize("bias", [True, False])
def test_qlinear_is_the_linear_with_the_decoded_weight(bias: bool) -> None:
    linear = nn.Linear(80, 8, bias=bias)
    layer = QLinear(linear, Quantizer(linear.weight.detach(), W2, rounding_slot=Offset))
    x = torch.randn(2, 5, 80)
    expected = nn.functional.linear(x, layer.quantizer.quantize(linear.weight).dequantize(), linear.bias)
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert linear.weight.grad is None and layer.weight is linear.weight and layer.bias is linear.bias
    assert all(p.grad is not None for p in layer.quantizer.parameters())


def test_a_slot_may_be_any_callable() -> None:
    class Constant(nn.Module):
        def __init__(self, groups: Tensor, scheme: Scheme, importance: Tensor | None, step: float) -> None:
            super().__init__()
            self.step = step

        def forward(self, groups: Tensor) -> Grid:
            return Grid(torch.full((*groups.shape[:2], 1), self.step), torch.full((*groups.shape[:2], 1), 2.0))

    weight = weight_of()
    quantized = Quantizer(weight, W2, range_slot=functools.partial(Constant, step=-0.5)).quantize(weight)
    assert bool((quantized.scale == -0.5).all())
    assert set(quantized.dequantize().unique().tolist()) <= {1.0, 0.5, 0.0, -0.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["w2g32", "w3g32asym"])
def test_a_weight_in_steps_keeps_its_codes_when_scales_move(scheme: str, dtype: torch.dtype) -> None:
    weight, parsed = weight_of(), Scheme.parse(scheme)
    held = Quantizer(weight, parsed).quantize(weight)
    grid = grid_of(held)
    slots = {"weight_slot": functools.partial(Steps, scale=grid.scale),
             "range_slot": functools.partial(Learned, start=functools.partial(Given, grid=grid))}  # fmt: skip
    quantizer = Quantizer(weight, parsed, **slots)
    assert torch.equal(quantizer.quantize(weight).codes, held.codes)
    with torch.no_grad():
        quantizer.range.scale.mul_(1.3)  # type: ignore[union-attr, operator]
    assert torch.equal(quantizer.quantize(weight).codes, held.codes)
    given = weight.to(dtype)
    dense = quantizer(given)
    assert torch.equal(dense, quantizer.quantize(given).dequantize(dtype))
    grad = torch.randn(8, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
    dense.backward(grad)
    value, scale = quantizer.get_parameter("weight.value"), quantizer.get_parameter("range.scale")
    step = quantizer.quantize(weight).scale.float().repeat_interleave(32, 1)[:, :80]
    levels, zero = (quantizer.quantize(weight).dequantize() / step).round(), grid.zero.expand(-1, -1, 32).flatten(1)
    inside = (value.round() + zero[:, :80]).clamp(0, 2**parsed.bits - 1) == value.round() + zero[:, :80]
    assert inside.any() and (inside.all() != parsed.symmetric)
    torch.testing.assert_close(value.grad, grad.float() * step * inside, rtol=1e-5, atol=0)
    terms = torch.nn.functional.pad(grad.float() * levels, (0, 16)).unflatten(1, (3, 32)).sum(-1, keepdim=True)
    torch.testing.assert_close(scale.grad, terms, rtol=1e-4, atol=1e-4)
