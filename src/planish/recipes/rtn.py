"""RTN: round to nearest, on the range of each group or on the range that loses least."""

from typing import Any

from planish.fit.spans import Stage
from planish.quant import MinMax, Searched
from planish.recipes.recipe import Recipe

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "fast": {}, "best": {"search": True}}


def rtn(*, search: bool = False, products: bool = True) -> Recipe:
    """Round to nearest; no training.

    Equation: Q = clamp(round(W / s) + z, 0, 2^b - 1)

    Args:
        search: choose s (and z) by the error of the output on calibration data, group by group, instead of by
            the lowest and highest weight.
        products: the search counts how a group's inputs vary together; else the mean square of each input
            alone, as AutoRound's opt-RTN does, which is faster and loses more.
    """
    slot = Searched if search else MinMax
    return Recipe(name="rtn", stages=(Stage(name="rtn", range=slot, importance=search, products=search and products),))
