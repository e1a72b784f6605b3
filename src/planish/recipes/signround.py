"""SignRound (arXiv 2309.05516) and its successor (arXiv 2512.04746): rounding and range learned by sign-SGD.

Each weight has a rounding offset V, each group a factor on its range; both move by sign(gradient) of the
error of a few consecutive blocks, with a rate that falls linearly to zero. The defaults depart from the
publications where it paid on validation text: spans of three blocks, the largest errors left out of the
loss at every width, V free to move by a whole step. `paper` is the publication's own setting.
"""

import functools
from typing import Any

from planish.fit.reconstruct import Reconstruct
from planish.fit.spans import Stage
from planish.quant import Offset, TunedMinMax
from planish.recipes.recipe import Recipe

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"steps": 20},
    "light": {"steps": 50},
    "best": {"steps": 1000, "samples": 512},
    "paper": {"samples": 512, "rate": 5e-3, "search": False, "trim": 0.0, "span": 1},
}


def signround(
    *,
    steps: int = 200,
    rate: float | None = None,
    range_rate: float | None = None,
    search: bool = True,
    products: bool = False,
    trim: float = 0.003,
    prefix: str = "float",
    span: int = 3,
    holdout: int = 8,
    batch_size: int = 8,
    compile: bool | None = None,
) -> Recipe:
    """Learned rounding and range by signed gradient descent, a few blocks at a time.

    Equation: Q = clamp(round(W / s + V) + z, 0, 2^b - 1), V and the factors of s (and z) learned

    Args:
        steps: optimizer steps a span.
        rate: learning rate of V at step 0; 2 / steps, but at most 0.05, if not given.
        range_rate: learning rate of the range's factors; that of V, but at most 0.01, if not given.
        search: start from the range that loses least, weighed by the inputs' mean squares, and let factors
            grow up to 2; else from min/max, factors at most 1, as published.
        products: that search counts how a group's inputs vary together, as `rtn` does.
        trim: share of elements with the largest errors left out of the loss.
        prefix: what the target is computed on: "float" (the float blocks on the float prefix) or "quantized".
        span: consecutive blocks fitted together.
        holdout: samples held out to choose the state that is kept.
        batch_size: samples a step.
        compile: fuse the blocks' elementwise work by torch.compile; by the model's size if not given.
    """
    rate = min(2 / max(steps, 1), 0.05) if rate is None else rate
    fit = Reconstruct(
        steps=steps,
        batch_size=batch_size,
        target=prefix,
        trim=trim,
        holdout=holdout,
        checks=max(1, min(8, steps // 5)),
        span=span,
        rates={"rounding": rate, "range": min(rate, 0.01) if range_rate is None else range_rate},
        compile=compile,
    )
    stage = Stage(
        name="signround",
        range=functools.partial(TunedMinMax, search=search),
        rounding=Offset,
        fit=fit,
        importance=search,
        products=search and products,
    )
    return Recipe(name="signround", stages=(stage,))
