"""The methods by name. A recipe is a function whose keyword arguments are its keys; it returns a Recipe.

To add one, write `recipes/foo.py` and a line here; `--recipe ./mine.py:mine` takes one from anywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any

from planish.recipes.block_ap import PRESETS as BLOCK_AP_PRESETS
from planish.recipes.block_ap import block_ap
from planish.recipes.e2e_qp import PRESETS as E2E_QP_PRESETS
from planish.recipes.e2e_qp import e2e_qp
from planish.recipes.efficientqat import PRESETS as EFFICIENTQAT_PRESETS
from planish.recipes.efficientqat import efficientqat
from planish.recipes.l4q import PRESETS as L4Q_PRESETS
from planish.recipes.l4q import l4q
from planish.recipes.lrqat import PRESETS as LRQAT_PRESETS
from planish.recipes.lrqat import lrqat
from planish.recipes.omniquant import PRESETS as OMNIQUANT_PRESETS
from planish.recipes.omniquant import omniquant
from planish.recipes.peqa import PRESETS as PEQA_PRESETS
from planish.recipes.peqa import peqa
from planish.recipes.planish import PRESETS as PLANISH_PRESETS
from planish.recipes.planish import planish
from planish.recipes.recipe import Recipe, build, describe, split_preset
from planish.recipes.rotate import PRESETS as ROTATE_PRESETS
from planish.recipes.rotate import rotate
from planish.recipes.rtn import PRESETS as RTN_PRESETS
from planish.recipes.rtn import rtn
from planish.recipes.signround import PRESETS as SIGNROUND_PRESETS
from planish.recipes.signround import signround
from planish.recipes.smoothquant import PRESETS as SMOOTHQUANT_PRESETS
from planish.recipes.smoothquant import smoothquant

RECIPES: dict[str, Callable[..., Recipe]] = {
    "planish": planish,
    "rtn": rtn,
    "rotate": rotate,
    "smoothquant": smoothquant,
    "signround": signround,
    "omniquant": omniquant,
    "block_ap": block_ap,
    "e2e_qp": e2e_qp,
    "efficientqat": efficientqat,
    "peqa": peqa,
    "l4q": l4q,
    "lrqat": lrqat,
}
PRESETS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "planish": PLANISH_PRESETS,
    "rtn": RTN_PRESETS,
    "rotate": ROTATE_PRESETS,
    "smoothquant": SMOOTHQUANT_PRESETS,
    "signround": SIGNROUND_PRESETS,
    "omniquant": OMNIQUANT_PRESETS,
    "block_ap": BLOCK_AP_PRESETS,
    "e2e_qp": E2E_QP_PRESETS,
    "efficientqat": EFFICIENTQAT_PRESETS,
    "peqa": PEQA_PRESETS,
    "l4q": L4Q_PRESETS,
    "lrqat": LRQAT_PRESETS,
}

__all__ = ["PRESETS", "RECIPES", "Recipe", "build", "describe", "split_preset"]
