"""OmniQuant (arXiv 2308.13137): learned clipping (LWC) and learned equivalent transforms (LET), block by block.

Nothing of the weights themselves is trained: each group has a factor on either end of its range, each channel
between two layers a scale (and a shift), and all move by AdamW, so that the quantized block gives what the float one
gives. The publication starts clipping at 0.982 of the range and goes through samples one by one; the defaults here
depart from it where it paid on validation text: the range starts searched, a step takes several samples, six
blocks are fitted together, and weights bear more of what activations can't. Presets w4a16 to w4a4 are the
publication's own, by what its scripts say.
"""

import functools
from typing import Any

from planish.fit.reconstruct import Reconstruct
from planish.fit.spans import Stage
from planish.quant import Clip
from planish.recipes.recipe import Recipe
from planish.transform import Smooth

_PAPER: dict[str, Any] = {"search": False, "trim": 0.0, "span": 1, "batch_size": 1, "schedule": "constant",
                          "clip_rate": 1e-2, "let": False}  # fmt: skip
_LET: dict[str, Any] = {**_PAPER, "let": True, "let_rate": 5e-3, "alpha": 0.5}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"epochs": 4.0},
    "light": {"epochs": 10.0},
    "best": {"epochs": 40.0},
    "w4a16": _PAPER,
    "w3a16": _PAPER,
    "w2a16": {**_PAPER, "epochs": 40.0, "augment": True},
    "w6a6": _LET,
    "w4a4": {**_LET, "let_rate": 1e-3, "alpha": 0.75},
    "w4a4-llama1": {**_LET, "augment": True},
    "opt-w4a16": _LET,
    "opt-w2a16": {**_LET, "epochs": 40.0},
    "opt-w4a4": {**_LET, "alpha": 0.75},
}


def omniquant(
    *,
    epochs: float = 20.0,
    steps: int | None = None,
    clip_rate: float = 1e-2,
    let: bool | None = None,
    let_rate: float = 5e-3,
    alpha: float = 0.75,
    shift: bool = True,
    fallback: bool = False,
    augment: bool = False,
    search: bool = True,
    trim: float = 0.003,
    span: int = 6,
    holdout: int = 8,
    batch_size: int = 4,
    schedule: str = "cosine",
    compile: bool | None = None,
) -> Recipe:
    """Learned clipping of ranges and learned scales of channels, by AdamW.

    Equation: Q = clamp(round(W * t / s) + z, 0, 2^b - 1), from sigmoid(a) min(W t) to sigmoid(c) max(W t); x / t

    Args:
        epochs: passes over the samples.
        steps: optimizer steps a span; by the epochs if not given.
        clip_rate: learning rate of a and c at step 0.
        let: scale channels between layers too; if not given, where activations are quantized.
        let_rate: learning rate of the logarithm of t (and of shifts) at step 0.
        alpha: share of the activations in the start of t; SmoothQuant's is 0.5.
        shift: channels are shifted too, where norm and linears have a bias.
        fallback: a block whose channels can't be scaled has its ranges clipped only; else it is refused.
        augment: the float block on the quantized prefix is a target too; published at 2 bits.
        search: start from the range that loses least; else at 0.982 of min/max, as published.
        trim: share of elements with the largest errors left out of the loss.
        span: consecutive blocks fitted together; fewer take less memory.
        holdout: samples held out to choose the state that is kept.
        batch_size: samples a step.
        schedule: the rates fall as a "cosine" or "linear", or stay "constant", as published.
        compile: fuse the blocks' elementwise work by torch.compile; by the model's size if not given.
    """
    fit = Reconstruct(
        steps=steps, epochs=epochs, batch_size=batch_size, optimizer="adamw", schedule=schedule, trim=trim,
        target="both" if augment else "float", holdout=holdout, checks=10, span=span, compile=compile,
        rates={"range": clip_rate, "transform": let_rate},
    )  # fmt: skip
    smooth = Smooth(alpha=alpha, shift=shift, always=bool(let), strict=not fallback)
    stage = Stage(
        name="omniquant",
        range=functools.partial(Clip, search=search),
        smooth=None if let is False else smooth,
        fit=fit,
        importance=search,
        products=search,
    )
    return Recipe(name="omniquant", stages=(stage,))
