"""Planish's own recipe: what other recipes' stages give together, for the least loss a minute. The default.

    range that loses least, input by input  ->  a few blocks at a time learn what their float selves give
    ->  the whole quantized model learns the float model's predictions, token by token; its codes too, where memory has
        room for that

The last stage distils: what it learns is to be like the float model, not to know the text better. With a share of
cross-entropy the perplexity on text of that kind falls below the float model's own, which is teaching it the text.
Presets leave out stages from the end: `light` the last one, `fast` both that train.
"""

import dataclasses
from typing import Any

from planish.errors import PlanishError, nearest
from planish.fit.spans import Stage
from planish.recipes.block_ap import block_ap
from planish.recipes.e2e_qp import e2e_qp
from planish.recipes.recipe import Recipe
from planish.recipes.rtn import rtn
from planish.recipes.signround import signround

PRESETS: dict[str, dict[str, Any]] = {
    "default": {"samples": 512},
    "fast": {"fit": "none", "end_to_end": False, "samples": 16, "seqlen": 512},
    "light": {"fit": "rounding", "end_to_end": False},
    "best": {"epochs": 8.0, "e2e_epochs": 16.0, "samples": 512},
}
# windows that are passed over where epochs aren't given: a step of the last stage gains more than one of the blocks'
BLOCKS, WHOLE = 1536, 4096
FITS = ("weights", "rounding", "none")


def planish(
    *,
    fit: str = "weights",
    steps: int | None = None,
    epochs: float | None = None,
    rate: float | None = None,
    norm_rate: float = 0.0,
    trim: float = 0.003,
    span: int = 3,
    batch_size: int | None = None,
    end_to_end: bool = True,
    distill: float = 1.0,
    e2e_epochs: float | None = None,
    e2e_rate: float = 2e-3,
    e2e_zero_rate: float = 0.0,
    e2e_norm_rate: float = 1e-3,
    e2e_weight_rate: float = 3e-3,
    e2e_batch_size: int = 8,
) -> Recipe:
    """Searched ranges, blocks fitted, then the whole model distilled from the float one.

    Equation: Q = clamp(round(W / s) + z, 0, 2^b - 1), W, s, z learned; then W_hat = s * (Q - z), s and Q learned

    Args:
        fit: what a block learns: its "weights", scales and zero points (by AdamW, as `block_ap`), the "rounding" of
            each weight and the ranges (by sign-SGD, as `signround`), or "none": the searched range is the result.
        steps: optimizer steps a span; by the epochs where weights learn, 200 where rounding does, if not given.
        epochs: passes over the samples where weights learn; by their number if not given.
        rate: learning rate of weights or rounding, in grid steps; by the number of steps if not given.
        norm_rate: learning rate of the blocks' norms where weights learn; 0 leaves them as they are.
        trim: share of elements with the largest errors left out of a block's loss.
        span: consecutive blocks fitted together.
        batch_size: samples a step of the block fit; 4 where weights learn, 8 where rounding does, if not given.
        end_to_end: train the whole model behind the blocks; where memory is too short it is left out, and said.
        distill: share of distillation in the last stage's loss; the rest is cross-entropy with the text.
        e2e_epochs: passes over the samples in the last stage; by their number if not given.
        e2e_rate: peak learning rate of s in the last stage, in units of each matrix's mean |s|.
        e2e_zero_rate: that of z, in levels; 0 leaves it as it is.
        e2e_norm_rate: that of the blocks' norms, in units of each one's mean size; 0 leaves them.
        e2e_weight_rate: that of weights, in steps of the grid (10/3 of it at 4 bits and more), so that codes move too;
            0 leaves them, and so does a run whose memory has no room for 16 bytes a weight.
        e2e_batch_size: samples a step in the last stage.
    """
    blocks = _blocks(fit, steps, epochs, rate, norm_rate, trim, span, batch_size)
    if not end_to_end:
        return Recipe(name="planish", stages=(blocks,))
    last = e2e_qp(
        rate=e2e_rate, zero_rate=e2e_zero_rate, norm_rate=e2e_norm_rate, weight_rate=e2e_weight_rate, distill=distill,
        epochs=e2e_epochs, batch_size=e2e_batch_size,
    ).whole  # fmt: skip
    assert last is not None
    room = tuple(slot for slot in last.rates if slot == "weight")
    last = dataclasses.replace(last, name="end_to_end", optional=True, if_room=room, passed=WHOLE)
    return Recipe(name="planish", stages=(blocks, last))


def _blocks(
    fit: str,
    steps: int | None,
    epochs: float | None,
    rate: float | None,
    norm_rate: float,
    trim: float,
    span: int,
    batch_size: int | None,
) -> Stage:
    """The stage that goes through the blocks."""
    if fit not in FITS:
        raise PlanishError(f"fit={fit!r}: {nearest(fit, FITS)}")
    if fit != "weights" and (epochs is not None or norm_rate != 0):
        raise PlanishError(f"epochs and norm_rate are of fit=weights, and this is fit={fit}; drop them")
    shared: dict[str, Any] = {"rate": rate, "trim": trim, "span": span}
    if fit == "weights":
        made = block_ap(steps=steps, epochs=epochs, norm_rate=norm_rate, batch_size=batch_size or 4, **shared)
    elif fit == "rounding":
        made = signround(steps=200 if steps is None else steps, batch_size=batch_size or 8, **shared)
    else:
        made = rtn(search=True, products=False)  # products lose a little less, and take a CPU four times as long
    stage = dataclasses.replace(made.blocks[0], name="planish")
    if fit != "weights":
        return stage
    assert stage.fit is not None
    return dataclasses.replace(stage, fit=dataclasses.replace(stage.fit, passed=BLOCKS))
