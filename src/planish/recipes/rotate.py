"""Rotate: turn a model's hidden states and values before another recipe: rotate+rtn, rotate+omniquant."""

from typing import Any

from planish.recipes.recipe import Recipe
from planish.transform import Rotate

PRESETS: dict[str, dict[str, Any]] = {"default": {}}


def rotate(*, rotation_seed: int = 0, values: bool = True) -> Recipe:
    """Hidden states turned by a random Hadamard matrix; another recipe has to follow.

    Equation: x' = x R,   W' = W R for what reads x,   R^T W for what writes it,   R = diag(+-1) H / sqrt(n)

    Args:
        rotation_seed: of the signs.
        values: turn each head's values too.
    """
    return Recipe(name="rotate", rotation=Rotate(seed=rotation_seed, values=values))
