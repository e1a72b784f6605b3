"""SmoothQuant (arXiv 2211.10438): channels scaled so that weights bear what activations can't; nothing is trained."""

from typing import Any

from planish.fit.spans import Stage
from planish.quant import MinMax, Searched
from planish.recipes.recipe import Recipe
from planish.transform import Smooth

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "fast": {}, "best": {"search": True}}


def smoothquant(*, alpha: float = 0.5, shift: bool = False, search: bool = False, fallback: bool = False) -> Recipe:
    """Channels scaled by their reach, then rounding to nearest; no training.

    Equation: t = max|x|^a / max|w|^(1-a),   W * t is rounded,   x / t is what it multiplies

    Args:
        alpha: a, the share of the activations.
        shift: channels are shifted to their middle too, where norm and linears have a bias.
        search: choose s (and z) by the error of the output, group by group.
        fallback: a block whose channels can't be scaled is rounded as it is; else it is refused.
    """
    smooth = Smooth(alpha=alpha, sites=("norm", "value"), shift=shift, always=True, strict=not fallback)
    slot = Searched if search else MinMax
    stage = Stage(name="smoothquant", range=slot, smooth=smooth, importance=search, products=search)
    return Recipe(name="smoothquant", stages=(stage,))
