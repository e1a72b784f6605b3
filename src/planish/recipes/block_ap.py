"""Block-AP, the first half of EfficientQAT (arXiv 2407.11062): all parameters of a block trained at once.

W, s and z (and, by a switch, the norms) move by AdamW, so that the quantized block gives what the float block
gives. The publication trains one block at a time on 4096 windows, from the min/max range, at 2e-5 for W; where
there are fewer windows those rates leave a model undertrained. So the defaults depart from it: the range starts
searched, rates rise as the steps get fewer, spans of blocks are fitted together. `paper` is the publication's.
"""

import functools
from typing import Any

from planish.fit.reconstruct import Reconstruct
from planish.fit.spans import Stage
from planish.quant import Free, Learned
from planish.recipes.recipe import Recipe

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"steps": 50},
    "light": {"steps": 100},
    "best": {"epochs": 8.0, "samples": 512},
    "paper": {
        "rate": 2e-5,
        "range_rate": 1e-4,
        "zero_rate": 1e-4,
        "norm_rate": 2e-5,
        "relative": False,
        "search": False,
        "trim": 0.0,
        "span": 1,
        "batch_size": 2,
        "epochs": 2.0,
        "samples": 4096,
    },
}


def block_ap(
    *,
    steps: int | None = None,
    epochs: float | None = None,
    rate: float | None = None,
    range_rate: float = 2e-3,
    zero_rate: float = 1e-2,
    norm_rate: float = 0.0,
    relative: bool = True,
    search: bool = True,
    trim: float = 0.003,
    span: int = 3,
    holdout: int = 8,
    batch_size: int = 4,
    compile: bool | None = None,
) -> Recipe:
    """Weights, scales and zero points of a few blocks trained at once by AdamW.

    Equation: Q = clamp(round(W / s) + z, 0, 2^b - 1), W, s and z learned

    Args:
        steps: optimizer steps a span; by the epochs if not given.
        epochs: passes over the samples; if not given 2 where there are 1024 and more, up to 8 for fewer.
        rate: learning rate of W at step 0, in grid steps; 0.07 over the root of the steps if not given. It falls as
            half a cosine to a twentieth.
        range_rate: learning rate of s, in units of each matrix's mean |s|.
        zero_rate: learning rate of z, in levels; asymmetric schemes only.
        norm_rate: learning rate of the blocks' norms; 0 leaves them as they are.
        relative: False has both in the weight's own units, as published.
        search: start from the range that loses least; else from min/max, as published.
        trim: share of elements with the largest errors left out of the loss.
        span: consecutive blocks fitted together.
        holdout: samples held out to choose the state that is kept.
        batch_size: samples a step.
        compile: fuse the blocks' elementwise work by torch.compile; by the model's size if not given.
    """
    rates: dict[str, float | None] = {"weight": rate, "range.scale": range_rate, "range.zero": zero_rate}
    fit = Reconstruct(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        optimizer="adamw",
        schedule="cosine",
        trim=trim,
        holdout=holdout,
        span=span,
        rates=rates if norm_rate == 0 else {**rates, "norm": norm_rate},
        compile=compile,
    )
    stage = Stage(
        name="block_ap",
        weight=functools.partial(Free, relative=relative),
        range=functools.partial(Learned, search=search, relative=relative),
        fit=fit,
        importance=search,
        products=search,
    )
    return Recipe(name="block_ap", stages=(stage,))
