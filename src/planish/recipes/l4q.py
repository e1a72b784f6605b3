"""L4Q (arXiv 2402.04902): factors of low rank inside the quantizer, so that what is finetuned is what is deployed.

A LoRA is merged into the weight before that is rounded, at each step, and the grid learns with it; what comes out has
codes and scales only. The publication starts at a grid that clips nothing, trains half an epoch of Alpaca, and has an
offset in weight units, which hardly anything loads. The defaults start at the searched grid, hold rates in steps of
the grid, and keep an offset on integer zero points, where the scheme has these; `paper` is the publication's.
"""

from typing import Any

from planish.errors import PlanishError, nearest
from planish.fit.whole import EndToEnd, Inside
from planish.recipes.recipe import Recipe

OFFSETS = ("integer", "float")
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"epochs": 1.0},
    "light": {"epochs": 2.0},
    "best": {"epochs": 8.0, "samples": 512},
    "paper": {
        "rate": 2e-4,
        "scale_rate": 2e-4,
        "zero_rate": 2e-4,
        "rank": 4,
        "relative": False,
        "search": False,
        "offset": "float",
        "warmup": 0.1,
        "batch_size": 128,
        "epochs": 0.5,
        "seqlen": 2048,
    },
}


def l4q(
    *,
    rate: float = 1e-2,
    scale_rate: float = 2e-3,
    zero_rate: float = 1e-2,
    rank: int = 16,
    alpha: float = 1.0,
    offset: str = "integer",
    start: str = "",
    search: bool = True,
    base: str = "auto",
    relative: bool = True,
    distill: float = 0.0,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    warmup: float = 0.1,
    clip: float = 1.0,
    weight_decay: float = 0.01,
    holdout: int = 8,
) -> Recipe:
    """Factors of low rank inside the quantizer of a float model, trained end to end with its grid.

    Equation: Q = clamp(round((W0 + alpha B A) / s) + z, 0, 2^b - 1), A, B, s (and z) learned

    Args:
        rate: peak learning rate of the factors: W0 + alpha B A moves by this share of a grid step.
        scale_rate: peak learning rate of s, in units of each matrix's mean |s|; 0 leaves it.
        zero_rate: peak learning rate of z, or of a float offset, in levels; 0 leaves it, as does a symmetric scheme's.
        rank: of the factors.
        alpha: what their product is multiplied by; a LoRA's alpha is this times the rank.
        offset: integer has zero points, if the scheme has; float, as published, is kept in the native format only.
        start: a quantized folder of the same model to start from, such as block_ap's.
        search: else start from the range that loses least; or, as published, from the one that clips nothing.
        base: 16 or int8, what frozen weights are held in; auto takes int8 where memory is short.
        relative: False has rates in the numbers' own units, as published.
        distill: share of distillation from the float model in the loss; 0 is cross-entropy alone.
        steps: optimizer steps; by the epochs if not given.
        epochs: passes over the samples; if not given 1 where there are 1024 and more, up to 8 for fewer.
        batch_size: samples a step.
        warmup: share of the steps in which the rate rises; then it falls as half a cosine.
        clip: largest norm of all gradients together.
        weight_decay: of the factors, as AdamW has it.
        holdout: samples held out to choose the state that is kept.
    """
    if offset not in OFFSETS:
        raise PlanishError(f"offset={offset!r}: {nearest(offset, OFFSETS)}")
    grid = {"scale": scale_rate, "offset" if offset == "float" else "zero": zero_rate}
    stage = EndToEnd(
        name="l4q",
        rates={"factors": rate} | {slot: value for slot, value in grid.items() if value != 0},
        inside=Inside(rank=rank, alpha=alpha, base=base, search=search, start=start, offset=offset == "float"),
        relative=relative,
        distill=distill, steps=steps, epochs=epochs, batch_size=batch_size, warmup=warmup, clip=clip,
        weight_decay=weight_decay, holdout=holdout,
    )  # fmt: skip
    return Recipe(name="l4q", stages=(stage,))
