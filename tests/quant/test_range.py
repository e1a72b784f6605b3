"""Range slots: which side gets the extra level, what a grid reaches, and how far factors may go."""

import pytest
import torch
from torch import Tensor

from planish.qtensor import QTensor, midpoint, to_groups
from planish.quant import MinMax, Offset, Quantizer, Searched, TunedMinMax
from planish.quant.range import RoundThrough, ends
from planish.scheme import Scheme

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def quantized(row: list[float], bits: int, symmetric: bool = True) -> QTensor:
    weight = torch.tensor([row])
    return Quantizer(weight, Scheme(bits=bits, group_size=8, symmetric=symmetric)).quantize(weight)


@BITS
@pytest.mark.parametrize("sign", [1, -1])
def test_the_extra_level_is_on_the_larger_tail(bits: int, sign: int) -> None:
    row = [sign * value for value in (1.0, -0.25, 0.0, 0.1, 0.2, -0.1, 0.3, -0.2)]
    q = quantized(row, bits)
    assert q.scale.item() == pytest.approx(-sign / midpoint(bits), rel=1e-3)
    # code 0 is the extra level: the larger end, which a grid of equal tails would clamp or waste a level on
    assert q.codes[0, 0] == 0 and q.dequantize()[0, 0].item() == pytest.approx(row[0], rel=1e-3)
    assert q.zero is None and q.dequantize()[0, 2] == 0


@BITS
@pytest.mark.parametrize("row", [[1.0, 2.0, 3.0, 4.0] * 2, [-1.0, -4.0, -2.0, -3.0] * 2, [-1.0, 2.0, 0.5, -0.5] * 2])
def test_an_asymmetric_grid_always_holds_zero_and_both_ends(bits: int, row: list[float]) -> None:
    q = quantized(row, bits, symmetric=False)
    assert q.zero is not None and q.scale.item() > 0
    low, high = -q.zero.item() * q.scale.item(), (2**bits - 1 - q.zero.item()) * q.scale.item()
    span = max(0, *row) - min(0, *row)
    assert q.scale.item() == pytest.approx(span / (2**bits - 1), rel=1e-3)
    assert low == pytest.approx(min(0, *row), abs=0.51 * q.scale.item())
    assert high == pytest.approx(max(0, *row), abs=0.51 * q.scale.item())


@BITS
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(bits: int, symmetric: bool) -> None:
    q = quantized([0.0] * 8, bits, symmetric)
    assert bool((q.dequantize() == 0).all()) and q.scale.item() != 0 and bool(q.scale.isfinite())


def test_padding_is_no_end() -> None:
    # a short last group of large weights only: zero is an end anyway, so padding changes nothing
    weight = torch.cat([torch.randn(4, 8), torch.rand(4, 4) + 5], dim=1)
    scheme = Scheme(bits=4, group_size=8, symmetric=False)
    low, high = ends(to_groups(weight, 8))
    assert torch.equal(high[:, 1, 0], weight[:, 8:].amax(1)) and bool((low[:, 1] == 0).all())
    assert bool((Quantizer(weight, scheme)(weight) - weight).abs().max() < 0.5)


def test_round_through() -> None:
    values = torch.tensor([0.5, 1.5, -0.7], requires_grad=True)
    rounded = RoundThrough.apply(values)
    assert rounded.tolist() == [0, 2, -1]
    rounded.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert values.grad is not None and values.grad.tolist() == [1, 2, 3]


def weight_of() -> Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("search", [True, False])
def test_tuned_starts_where_it_says_and_stays_in_its_limits(symmetric: bool, search: bool) -> None:
    weight, scheme = weight_of(), Scheme(bits=3, group_size=32, symmetric=symmetric)
    groups = to_groups(weight, 32)
    start = (Searched if search else MinMax)(groups, scheme)(groups)
    tuned = TunedMinMax(groups, scheme, search=search)
    torch.testing.assert_close(tuned(groups).scale, start.scale, rtol=1e-3, atol=0)
    assert torch.equal(tuned(groups).zero, start.zero)
    factors = list(tuned.parameters())
    assert len(factors) == (1 if symmetric else 2) and all(bool((f == 1).all()) for f in factors)
    for value, expected in [(5.0, 2.0 if search else 1.0), (0.5, 0.5), (-1.0, 0.0)]:
        with torch.no_grad():
            for factor in factors:
                factor.fill_(value)
        grid = tuned(groups)
        torch.testing.assert_close(grid.scale, (start.scale * expected), rtol=1e-3, atol=2e-5)
        assert bool(((grid.zero >= 0) & (grid.zero <= 7)).all())


def test_one_end_of_an_asymmetric_range_moves_alone() -> None:
    weight, scheme = weight_of(), Scheme(bits=4, group_size=32, symmetric=False)
    groups = to_groups(weight, 32)
    tuned = TunedMinMax(groups, scheme, search=False)
    before = tuned(groups)
    with torch.no_grad():
        tuned.high_factor.fill_(0.5)
    after = tuned(groups)
    step = after.scale
    assert bool((after.zero > before.zero).all())
    torch.testing.assert_close(after.zero * step, before.zero * before.scale, rtol=0, atol=0.51 * step.max().item())
    top = (15 - before.zero) * before.scale / 2
    torch.testing.assert_close((15 - after.zero) * step, top, rtol=0, atol=0.51 * step.max().item())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_a_factors_gradient_moves_the_error_down(symmetric: bool) -> None:
    weight, scheme = weight_of(), Scheme(bits=2, group_size=32, symmetric=symmetric)
    quantizer = Quantizer(
        weight, scheme, range_slot=lambda *parts: TunedMinMax(*parts, search=False), rounding_slot=Offset
    )

    def error() -> Tensor:
        return (quantizer(weight) - weight).square().mean()

    first = error()
    for _ in range(30):
        quantizer.zero_grad()
        error().backward()
        with torch.no_grad():
            for parameter, _ in quantizer.trainable("range"):
                parameter -= 0.01 * parameter.grad.sign()
    assert error() < 0.9 * first
