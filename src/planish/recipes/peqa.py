"""PEQA (arXiv 2305.14152): a model is rounded, and then only the scales learn a task; its codes stay.

Rounding to nearest, then the whole-model stage of `e2e_qp` on the task's data. To start from a model that another
recipe quantized, train that folder with `e2e_qp`: it is the same stage. The defaults hold the rate in units of each
matrix's mean scale and start at the searched range; `paper` starts at min/max.
"""

from typing import Any

from planish.fit.spans import Stage
from planish.quant import MinMax, Searched
from planish.recipes.e2e_qp import e2e_qp
from planish.recipes.recipe import Recipe

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"epochs": 1.0},
    "light": {"epochs": 2.0},
    "best": {"epochs": 8.0, "samples": 512},
    "paper": {"search": False, "epochs": 3.0, "batch_size": 128},
}


def peqa(
    *,
    rate: float = 2e-3,
    search: bool = True,
    distill: float = 0.0,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    warmup: float = 0.03,
    clip: float = 0.3,
    holdout: int = 8,
) -> Recipe:
    """A float model rounded to nearest, whose scales then learn a task.

    Equation: W_hat = s * (Q - z), s learned

    Args:
        rate: peak learning rate of s, in units of each matrix's mean |s|.
        search: round on the range that loses least; else on min/max, as published.
        distill: share of distillation from the float model in the loss; 0 is cross-entropy alone.
        steps: optimizer steps; by the epochs if not given.
        epochs: passes over the samples; if not given 1 where there are 1024 and more, up to 8 for fewer.
        batch_size: samples a step.
        warmup: share of the steps in which the rate rises; then it falls as half a cosine.
        clip: largest norm of all gradients together.
        holdout: samples held out to choose the state that is kept.
    """
    rounded = Stage(name="peqa", range=Searched if search else MinMax, importance=search, products=search)
    (tuned,) = e2e_qp(
        rate=rate, distill=distill, steps=steps, epochs=epochs, batch_size=batch_size, warmup=warmup, clip=clip,
        holdout=holdout,
    ).stages  # fmt: skip
    return Recipe(name="peqa", stages=(rounded, tuned))
