"""LR-QAT (arXiv 2406.06385): factors of low rank in steps of the grid, on a frozen weight that is held in 8 bits.

Where L4Q's scale moves weights between codes, here only the factors do; the scale is what codes are multiplied by, as
in PEQA. The publication trains 10^4 steps of general text at rank 32. The defaults here hold the rate of the factors
in grid steps too, a larger one for fewer steps; `paper` is the publication's.
"""

from typing import Any

from planish.fit.whole import EndToEnd, Inside
from planish.recipes.recipe import Recipe

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"epochs": 1.0},
    "light": {"epochs": 2.0},
    "best": {"epochs": 8.0, "samples": 512},
    "paper": {
        "rate": 1e-3,
        "scale_rate": 1e-5,
        "rank": 32,
        "alpha": 1 / 32,
        "relative": False,
        "warmup": 0.1,
        "clip": 1.0,
        "batch_size": 32,
        "steps": 10000,
        "seqlen": 1024,
    },
}


def lrqat(
    *,
    rate: float = 1e-2,
    scale_rate: float = 2e-3,
    rank: int = 16,
    alpha: float = 1.0,
    start: str = "",
    search: bool = True,
    relative: bool = True,
    distill: float = 0.0,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    warmup: float = 0.1,
    clip: float = 1.0,
    holdout: int = 8,
) -> Recipe:
    """Factors of low rank in grid steps, on a frozen weight in 8 bits, trained end to end with the scales.

    Equation: Q = clamp(round(W0 / s0 + alpha B A) + z, 0, 2^b - 1), W_hat = s (Q - z), A, B and s learned

    Args:
        rate: peak learning rate of the factors: W0 / s0 + alpha B A moves by this share of a grid step.
        scale_rate: peak learning rate of s, in units of each matrix's mean |s|; 0 leaves it.
        rank: of the factors.
        alpha: what their product is multiplied by.
        start: a quantized folder of the same model to start from, such as one of block_ap or signround.
        search: else start from the range that loses least; or from one that clips nothing.
        relative: False has rates in the numbers' own units, as published.
        distill: share of distillation from the float model in the loss; 0 is cross-entropy alone.
        steps: optimizer steps; by the epochs if not given.
        epochs: passes over the samples; if not given 1 where there are 1024 and more, up to 8 for fewer.
        batch_size: samples a step.
        warmup: share of the steps in which the rate rises; then it falls as half a cosine.
        clip: largest norm of all gradients together.
        holdout: samples held out to choose the state that is kept.
    """
    stage = EndToEnd(
        name="lrqat",
        rates={"factors": rate} | ({"scale": scale_rate} if scale_rate != 0 else {}),
        inside=Inside(rank=rank, alpha=alpha, in_steps=True, search=search, start=start),
        relative=relative,
        distill=distill,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        warmup=warmup,
        clip=clip,
        holdout=holdout,
    )
    return Recipe(name="lrqat", stages=(stage,))
