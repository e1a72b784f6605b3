"""The methods by name. A recipe is a function whose keyword arguments are its keys; it returns a Recipe.

To add one, write `recipes/foo.py` and a line here; `--recipe ./mine.py:mine` takes one from anywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any

from planish.recipes.recipe import Recipe, build, describe, split_preset
from planish.recipes.rtn import PRESETS as RTN_PRESETS
from planish.recipes.rtn import rtn
from planish.recipes.signround import PRESETS as SIGNROUND_PRESETS
from planish.recipes.signround import signround

RECIPES: dict[str, Callable[..., Recipe]] = {"rtn": rtn, "signround": signround}
PRESETS: dict[str, Mapping[str, Mapping[str, Any]]] = {"rtn": RTN_PRESETS, "signround": SIGNROUND_PRESETS}

__all__ = ["PRESETS", "RECIPES", "Recipe", "build", "describe", "split_preset"]
