"""RTN: round to nearest, on the range of each group or on the range that loses least."""

from typing import Any

from planish.fit.spans import Stage
from planish.quant import MinMax, Searched
from planish.recipes.recipe import Recipe

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "fast": {}, "best": {"search": True}}


def rtn(*, search: bool = False) -> Recipe:
    """Round to nearest; no training.

    Equation: Q = clamp(round(W / s) + z, 0, 2^b - 1)

    Args:
        search: choose s (and z) by the squared error that weighs each input by its mean square over the
            calibration data (AutoRound's opt-RTN), instead of the lowest and highest weight.
    """
    return Recipe(name="rtn", stages=(Stage(name="rtn", range=Searched if search else MinMax, importance=search),))
