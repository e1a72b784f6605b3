"""EfficientQAT (arXiv 2407.11062): Block-AP, then E2E-QP, one after the other on the same windows."""

from typing import Any

from planish.recipes.block_ap import PRESETS as BLOCK_AP
from planish.recipes.block_ap import block_ap
from planish.recipes.e2e_qp import e2e_qp
from planish.recipes.recipe import Recipe

_PAPER = BLOCK_AP["paper"]
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"epochs": 1.0, "e2e_epochs": 1.0},
    "light": {"epochs": 2.0, "e2e_epochs": 2.0},
    "best": {"epochs": 8.0, "e2e_epochs": 8.0, "samples": 512},
    "paper": {**_PAPER, "e2e_rate": 2e-5, "e2e_batch_size": 32, "e2e_epochs": 1.0, "distill": 0.0},
}


def efficientqat(
    *,
    epochs: float | None = None,
    rate: float | None = None,
    range_rate: float = 2e-3,
    zero_rate: float = 1e-2,
    norm_rate: float = 0.0,
    relative: bool = True,
    search: bool = True,
    trim: float = 0.003,
    span: int = 3,
    batch_size: int = 4,
    e2e_epochs: float | None = None,
    e2e_rate: float = 2e-3,
    e2e_zero_rate: float = 0.0,
    e2e_batch_size: int = 8,
    distill: float = 1.0,
) -> Recipe:
    """Block-AP (weights, scales, zero points, block by block), then E2E-QP (scales, end to end).

    Equation: Q = clamp(round(W / s) + z, 0, 2^b - 1), W, s, z learned; then W_hat = s * (Q - z), s learned

    Args:
        epochs: passes over the samples in Block-AP; by their number if not given.
        rate: learning rate of W at step 0, in grid steps; by the number of steps if not given.
        range_rate: learning rate of s, in units of each matrix's mean |s|.
        zero_rate: learning rate of z, in levels; asymmetric schemes only.
        norm_rate: learning rate of the blocks' norms; 0 leaves them as they are.
        relative: False has the rates of W and s in the weights' own units, as published.
        search: start from the range that loses least; else from min/max, as published.
        trim: share of elements with the largest errors left out of Block-AP's loss.
        span: consecutive blocks fitted together.
        batch_size: samples a step in Block-AP.
        e2e_epochs: passes over the samples in E2E-QP; by their number if not given.
        e2e_rate: peak learning rate of s in E2E-QP, in units of each matrix's mean |s|.
        e2e_zero_rate: peak learning rate of z in E2E-QP, in levels; 0 leaves it as it is.
        e2e_batch_size: samples a step in E2E-QP.
        distill: share of distillation from the float model in E2E-QP's loss; 0 is cross-entropy alone.
    """
    first = block_ap(
        epochs=epochs,
        rate=rate,
        range_rate=range_rate,
        zero_rate=zero_rate,
        norm_rate=norm_rate,
        relative=relative,
        search=search,
        trim=trim,
        span=span,
        batch_size=batch_size,
    )
    second = e2e_qp(
        rate=e2e_rate,
        zero_rate=e2e_zero_rate,
        relative=relative,
        epochs=e2e_epochs,
        batch_size=e2e_batch_size,
        distill=distill,
    )
    return Recipe(name="efficientqat", stages=(*first.stages, *second.stages))
