"""Bits under a budget: the best of all choices, never more than there is, ties to fewer bits."""

import itertools
import random

import pytest

from planish.errors import PlanishError
from planish.fit import allocate as module
from planish.fit.allocate import Widths, allocate
from planish.scheme import Average

BITS = [2, 3, 4, 8]


def cost(sizes, chosen):
    return sum(size * BITS[i] for size, i in zip(sizes, chosen, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_as_good_as_the_best_of_all_choices(seed):
    draw = random.Random(seed)
    sizes = [draw.choice([1, 2, 3, 6, 10]) * draw.choice([1, 64]) for _ in range(draw.randint(1, 5))]
    losses = [sorted((draw.random() for _ in BITS), reverse=True) for _ in sizes]
    budget = draw.uniform(2, 8) * sum(sizes)
    chosen = allocate(sizes, BITS, losses, budget)
    assert cost(sizes, chosen) <= budget

    def loss(choice):
        return sum(one[i] for one, i in zip(losses, choice, strict=True))

    fitting = [c for c in itertools.product(range(4), repeat=len(sizes)) if cost(sizes, c) <= budget]
    assert loss(chosen) == pytest.approx(min(map(loss, fitting)), abs=1e-12)  # sums in another order


def test_sizes_without_a_common_divisor_stay_below_the_budget(monkeypatch):
    monkeypatch.setattr(module, "COLUMNS", 50)
    draw = random.Random(0)
    sizes = [draw.randint(1000, 9000) | 1 for _ in range(40)]
    losses = [[draw.random() * size / 4**bits for bits in BITS] for size in sizes]
    chosen = allocate(sizes, BITS, losses, 2.5 * sum(sizes))
    assert 2.3 * sum(sizes) < cost(sizes, chosen) <= 2.5 * sum(sizes)


def test_no_more_bits_than_pay_and_ties_go_to_the_first():
    assert allocate([8, 8], BITS, [[0.0] * 4] * 2, 128) == [0, 0]
    assert allocate([8, 8], BITS, [[1.0, 0.5, 0.5, 0.5]] * 2, 16 * 2.5) == allocate(
        [8, 8], BITS, [[1.0, 0.5, 0.5, 0.5]] * 2, 16 * 2.5
    )
    assert allocate([8, 8], BITS, [[1.0, 0.5, 0.25, 0.0], [1.0, 1.0, 1.0, 1.0]], 16 * 5) == [3, 0]


def widths(average="w2.5g64", keep=slice(None)):
    asked = Average.parse(average)
    shapes = {"q": (64, 64), "k": (32, 64), "down": (64, 128)}
    return Widths(average=asked, units=(("q", "k"), ("down",)), shapes=shapes, candidates=asked.candidates[keep])


def test_a_unit_has_one_scheme_and_counts_as_a_whole():
    losses = {"q": [1.0, 0.9, 0.8, 0.8], "k": [9.0, 0.1, 0.0, 0.0], "down": [3.0, 2.0, 1.0, 0.0]}
    chosen = widths("w2.9g64").choose(losses)
    assert {name: str(scheme) for name, scheme in chosen.items()} == {"q": "w4g64", "k": "w4g64", "down": "w2g64"}
    assert widths().summary(chosen) == ("2.857 bits of a code on average, 3.107 with scales: 1 x w2g64, 2 x w4g64")


def test_before_anything_is_measured_bits_are_even():
    assert {str(scheme) for scheme in widths("w3.0g64").even().values()} == {"w3g64"}


def test_an_average_that_the_candidates_cannot_give():
    with pytest.raises(PlanishError, match="no average of 2.5 bits of w4g64, w8g64; ask for 4 to 8"):
        widths(keep=slice(2, None))
