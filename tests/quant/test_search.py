"""The range search: never worse than what it was given, much better where a group has an outlier."""

import pytest
import torch
from torch import Tensor

from planish.qtensor import decode, encode, store, to_groups
from planish.quant import MinMax, Searched, search
from planish.quant.range import Grid
from planish.quant.search import search_grid
from planish.scheme import Scheme

SCHEMES = [Scheme.parse(f"w{bits}g32{end}") for bits in (2, 3, 4, 8) for end in ("", "asym")]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def groups_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 160, generator=generator)
    if kind == "outliers":
        weight[:, ::32] = 4 * weight[:, ::32].sign()
    elif kind == "one-sided":
        weight = weight.abs()
    elif kind == "constant":
        weight = torch.full_like(weight, 0.3)
    elif kind == "zeros":
        weight = torch.zeros_like(weight)
    elif kind == "tiny":
        weight *= 1e-7
    elif kind == "ragged":
        weight = weight[:, :150]
    return to_groups(weight, 32)


def error(groups: Tensor, grid: Grid, bits: int, importance: Tensor | None) -> Tensor:
    """Weighted squared error of each group, [out, G]."""
    lost = decode(encode(groups, grid.scale, grid.zero, bits), grid.scale, grid.zero) - groups
    if importance is not None and importance.ndim == 3:
        return torch.einsum("ogi,gij,ogj->og", lost, importance, lost)
    return (lost.square() * (1 if importance is None else importance)).sum(-1)


def products_of(inputs: int = 160) -> Tensor:
    """Mean products of inputs that vary together, [G, g, g]."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 12, generator=generator) @ torch.randn(12, inputs, generator=generator)
    x = to_groups(x + 0.1 * torch.randn(x.shape, generator=generator), 32)
    return torch.einsum("tgi,tgj->gij", x, x) / len(x)


@each_scheme
@pytest.mark.parametrize("kind", ["normal", "outliers", "one-sided", "constant", "zeros", "tiny", "ragged"])
@pytest.mark.parametrize("weighted", ["not", "by squares", "by products"])
def test_no_group_is_worse_than_its_minimum_and_maximum(scheme: Scheme, kind: str, weighted: str) -> None:
    groups = groups_of(kind)
    importance = {
        "not": None,
        "by squares": torch.rand(5, 32, generator=torch.Generator().manual_seed(1)) ** 4,
        "by products": products_of(groups_of(kind).shape[1] * 32),
    }[weighted]
    plain = MinMax(groups, scheme)(groups)
    grid = Searched(groups, scheme, importance)(groups)
    found, start = (error(groups, one, scheme.bits, importance) for one in (grid, plain))
    # products are summed in another order here
    assert bool((found <= start * (1 + 1e-4 * (weighted == "by products"))).all())
    assert torch.equal(grid.scale, store(grid.scale)), "a scale as it is stored"
    assert bool(((grid.zero >= 0) & (grid.zero < 2**scheme.bits) & (grid.zero == grid.zero.round())).all())


@pytest.mark.parametrize("text", ["w2g32", "w2g32asym", "w3g32", "w3g32asym", "w4g32"])
@pytest.mark.parametrize(("weight_of_outliers", "share"), [(1.0, 0.92), (1e-3, 0.5)], ids=["all", "unimportant"])
def test_outliers_cost_less(text: str, weight_of_outliers: float, share: float) -> None:
    scheme, groups = Scheme.parse(text), groups_of("outliers")
    importance = torch.ones(5, 32)
    importance[:, 0] = weight_of_outliers
    plain = error(groups, MinMax(groups, scheme)(groups), scheme.bits, importance).sum()
    assert error(groups, Searched(groups, scheme, importance)(groups), scheme.bits, importance).sum() < share * plain


@pytest.mark.parametrize("text", ["w2g32", "w2g32asym", "w4g32"])
def test_inputs_that_matter_are_served_first(text: str) -> None:
    scheme, groups = Scheme.parse(text), groups_of("normal")
    importance = torch.full((5, 32), 1e-3)
    importance[:, 7] = 1.0
    at_seven = (importance == 1.0).float()
    seen = error(groups, Searched(groups, scheme, importance)(groups), scheme.bits, at_seven).sum()
    blind = error(groups, Searched(groups, scheme)(groups), scheme.bits, at_seven).sum()
    assert seen < 0.1 * blind


@pytest.mark.parametrize("text", ["w2g32", "w2g32asym", "w4g32", "w4g32asym"])
def test_products_serve_the_output_better_than_squares(text: str) -> None:
    scheme, groups, products = Scheme.parse(text), groups_of("normal"), products_of()
    squares = products.diagonal(dim1=1, dim2=2)
    whole = error(groups, Searched(groups, scheme, products)(groups), scheme.bits, products).sum()
    assert whole < 0.95 * error(groups, Searched(groups, scheme, squares)(groups), scheme.bits, products).sum()


@each_scheme
def test_products_of_unrelated_inputs_are_squares(scheme: Scheme) -> None:
    groups, squares = groups_of("normal"), torch.rand(5, 32, generator=torch.Generator().manual_seed(1))
    grids = [Searched(groups, scheme, how)(groups) for how in (squares, torch.diag_embed(squares))]
    first, second = (error(groups, grid, scheme.bits, squares) for grid in grids)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=0)


@each_scheme
def test_inputs_never_seen_change_nothing(scheme: Scheme) -> None:
    groups = groups_of("normal")
    grid, plain = Searched(groups, scheme, torch.zeros(5, 32))(groups), MinMax(groups, scheme)(groups)
    assert torch.equal(grid.scale, plain.scale) and torch.equal(grid.zero, plain.zero)


def test_a_grid_that_is_exact_already_is_kept() -> None:
    scale = store(torch.rand(24, 5, 1) + 0.1)
    zero = torch.full_like(scale, 2.0)
    groups = decode(torch.randint(0, 4, (24, 5, 32)).float(), scale, zero)
    found = search_grid(groups, Scheme.parse("w2g32"), None, scale, zero)
    assert torch.equal(found[0], scale) and torch.equal(found[1], zero)


@each_scheme
@pytest.mark.parametrize("weighted", [False, True])
def test_candidates_tried_together_give_the_same(
    scheme: Scheme, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, importance = groups_of("normal"), products_of() if weighted else None
    found = []
    for together in (1, 7 * groups.numel(), 10**9):
        monkeypatch.setattr(search, "CPU_TRIED", together)
        found.append(Searched(groups, scheme, importance)(groups))
    for other in found[1:]:
        assert torch.equal(found[0].scale, other.scale) and torch.equal(found[0].zero, other.zero)


@each_scheme
def test_the_same_bits_every_time(scheme: Scheme) -> None:
    groups = groups_of("normal").bfloat16()
    first, second = (Searched(groups, scheme)(groups) for _ in range(2))
    assert torch.equal(first.scale, second.scale) and torch.equal(first.zero, second.zero)
