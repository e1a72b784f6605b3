"""Low rank inside the quantizer: gradients are the equations', what is multiplied by is what is packed."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from planish.qtensor import from_groups, midpoint, to_groups
from planish.quant import Learned, LowRank, LowRankSteps, QLinear, Quantizer, Unclipped, low_rank
from planish.scheme import Scheme

OUT, IN, RANK, ALPHA = 24, 72, 3, 0.7  # the last group of 32 is shorter


class Through(torch.autograd.Function):
    """Rounds half to even and passes the gradient on."""

    @staticmethod
    def forward(ctx, values):  # type: ignore[no-untyped-def, override]
        return values.round()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        return grad


def made(scheme: Scheme, slot: type[LowRank] = LowRank, *, offset: bool = False, shrink: float = 1.0) -> QLinear:
    """A layer whose factors are at work; with a grid shrunk so far that many weights are clamped."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    quantizer = Quantizer(
        linear.weight.detach(), scheme, weight_slot=functools.partial(slot, rank=RANK, alpha=ALPHA),
        range_slot=functools.partial(Learned, search=False, offset=offset),
    )  # fmt: skip
    with torch.no_grad():
        quantizer.weight.b.normal_(std=0.05)
        quantizer.range.scale *= shrink
        if offset:
            quantizer.range.offset.normal_(std=0.02)
    return QLinear(linear, quantizer)


def reference(layer: QLinear, x: Tensor, a: Tensor, b: Tensor, grid: list[Tensor], steps: bool) -> Tensor:
    """The product in fp64 by autograd, straight through the rounding, the clamp hard."""
    quantizer = layer.quantizer
    assert quantizer is not None
    top, middle = 2**quantizer.scheme.bits - 1, midpoint(quantizer.scheme.bits)
    slot, (scale, zero, *rest) = quantizer.weight, grid
    latent = slot.latent(layer.weight)
    base = latent.base.double() if latent.unit is None else latent.base.double() * latent.unit.double().flatten()[0]
    groups = to_groups(base + ALPHA * (b @ a), quantizer.group_size)
    if steps:
        codes = (Through.apply(groups) + middle).clamp(0, top)
    else:
        codes = (Through.apply((groups - (rest[0] if rest else 0)) / scale) + zero).clamp(0, top)
    values = scale * (codes - zero) + (rest[0] if rest else 0)
    return functional.linear(x, from_groups(values, IN), layer.bias.double())


CASES = [
    (LowRank, "w4g32", False, 1.0),
    (LowRank, "w3g32", False, 0.4),
    (LowRank, "w2g32asym", False, 0.5),
    (LowRank, "w4g32", True, 0.4),
    (LowRank, "w3g32asym", True, 0.4),
    (LowRankSteps, "w4g32", False, 1.0),
    (LowRankSteps, "w2g32", False, 0.4),
    (LowRankSteps, "w3g32asym", False, 0.6),
]


@pytest.mark.parametrize("tile", [2**24, 5 * IN])
@pytest.mark.parametrize(("slot", "text", "offset", "shrink"), CASES)
def test_gradients_are_those_of_the_equation(
    slot: type[LowRank], text: str, offset: bool, shrink: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "TILE", tile)
    layer = made(Scheme.parse(text), slot, offset=offset, shrink=shrink)
    quantizer = layer.quantizer
    assert quantizer is not None
    x = torch.randn(2, 7, IN, requires_grad=True)
    weigh = torch.randn(2, 7, OUT)
    (layer(x) * weigh).sum().backward()
    grid = [part.detach().double().requires_grad_() for part in quantizer.range() if part is not None]
    if quantizer.scheme.symmetric:
        grid[1].requires_grad_(False)
    own = [p.detach().double().requires_grad_() for p in (x, quantizer.weight.a, quantizer.weight.b)]
    wanted = reference(layer, *own, grid, steps=slot is LowRankSteps)
    # fp32 against fp64
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-5)
    (wanted * weigh.double()).sum().backward()
    slots = quantizer.range
    found = [x, quantizer.weight.a, quantizer.weight.b, slots.scale]
    found += [part for name in ("zero", "offset") if (part := getattr(slots, name, None)) is not None]
    for mine, theirs in zip(found, [part for part in [*own, *grid] if part.requires_grad], strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)
    levels = quantizer.quantize(layer.weight).codes
    if shrink < 1:
        assert ((levels == 0) | (levels == 2**quantizer.scheme.bits - 1)).float().mean() > 0.1, "many are clamped"


def test_tiles_are_larger_where_a_kernel_makes_no_temporaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "TILE", 2 * IN)
    seen: list[int] = []
    real = low_rank.Latent.gradients

    def watched(self: Any, grad: Tensor, *rest: Any) -> Any:
        seen.append(len(grad))
        return real(self, grad, *rest)

    monkeypatch.setattr(low_rank.Latent, "gradients", watched)
    layer = made(Scheme.parse("w4g32"))
    assert layer.quantizer is not None
    found: list[Tensor] = []
    for rows, takes in [(2, lambda group, rank: rank > 99), (2 * low_rank.LARGER, lambda group, rank: group == 32)]:
        monkeypatch.setitem(low_rank.fused, "cpu", takes)
        seen.clear()
        layer.zero_grad()
        layer(torch.ones(3, IN)).sum().backward()
        assert seen[0] == rows and sum(seen) == OUT
        found.append(torch.cat([layer.quantizer.weight.a.grad.flatten(), layer.quantizer.weight.b.grad.flatten()]))
    assert found[0].any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("slot", "text", "offset", "shrink"), CASES)
def test_conversion_is_exact(
    slot: type[LowRank], text: str, offset: bool, shrink: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "TILE", 5 * IN)
    layer = made(Scheme.parse(text), slot, offset=offset, shrink=shrink)
    assert layer.quantizer is not None
    packed = layer.quantizer.quantize(layer.weight).dequantize(dtype)
    eye = torch.eye(IN, dtype=dtype)
    assert torch.equal(layer.quantizer.weight.multiply(eye, layer.weight, None, layer.quantizer.range()).T, packed)
    assert torch.equal(layer.quantizer(layer.weight), layer.quantizer.quantize(layer.weight).dequantize())


def test_a_graph_holds_nothing_of_the_size_of_a_weight() -> None:
    layer, kept = made(Scheme.parse("w4g32")), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(3, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    large = [tensor for tensor in kept if tensor.numel() >= OUT * IN]
    assert len(large) == 1 and large[0].data_ptr() == layer.weight.data_ptr()


def test_it_rounds_the_same_under_autocast() -> None:
    layer, x = made(Scheme.parse("w4g32")), torch.eye(IN)
    assert layer.quantizer is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    wanted = functional.linear(x.bfloat16(), layer.quantizer.quantize(layer.weight).dequantize(torch.bfloat16),
                               layer.bias.bfloat16())  # fmt: skip
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)


def test_the_published_start_clips_neither_end() -> None:
    groups = torch.randn(16, 3, 32, generator=torch.Generator().manual_seed(1)) + 0.5
    scale, zero, _ = Unclipped(groups, Scheme.parse("w3g32"))(groups)
    steps = (groups / scale).round()
    assert (scale > 0).all() and (zero == 4).all()
    # fp16 scales may be a thousandth too short
    assert steps.min() >= -4 and steps.max() <= 3 and (groups / scale).amax() > 2.9


def test_a_base_in_8_bits_is_near_the_weight() -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    slot = LowRank(weight, Scheme.parse("w4g32"), RANK, ALPHA, int8=True)
    assert slot.base is not None and slot.base.dtype == torch.int8
    # half a step of a group's largest value over 127
    torch.testing.assert_close(slot(weight), weight, rtol=0, atol=0.5 * 3.8 / 127)
