"""E2E-QP, the second half of EfficientQAT (arXiv 2407.11062): the codes are frozen, scales learn end to end.

It starts from any quantized model. The publication trains on 4096 windows of 4096 tokens by cross-entropy, at 2e-5
for 2 bits. The defaults here hold rates in units of each matrix's mean scale and may distil from the float model,
which needs fewer tokens; `paper` is the publication's.
"""

from typing import Any

from planish.fit.whole import EndToEnd
from planish.recipes.recipe import Recipe

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"epochs": 1.0},
    "light": {"epochs": 2.0},
    "best": {"epochs": 8.0, "samples": 512},
    "paper": {
        "rate": 2e-5,
        "relative": False,
        "batch_size": 32,
        "epochs": 1.0,
        "samples": 4096,
        "seqlen": 4096,
    },
}


def e2e_qp(
    *,
    rate: float = 2e-3,
    zero_rate: float = 0.0,
    norm_rate: float = 0.0,
    weight_rate: float = 0.0,
    relative: bool = True,
    distill: float = 0.0,
    temperature: float = 1.0,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    warmup: float = 0.03,
    clip: float = 0.3,
    holdout: int = 8,
) -> Recipe:
    """Scales of a quantized model trained end to end, its codes frozen.

    Equation: W_hat = s * (Q - z), s (and z) learned

    Args:
        rate: peak learning rate of s, in units of each matrix's mean |s|.
        zero_rate: peak learning rate of z, in levels; 0 leaves it as it is.
        norm_rate: peak learning rate of the blocks' norms, in units of each one's mean size; 0 leaves them.
        weight_rate: peak learning rate of weights, in steps of the grid (10/3 of it at 4 bits and more); then codes
            move too, which takes 16 bytes a weight. 0 leaves them.
        relative: False has rates in the numbers' own units, as published.
        distill: share of distillation from the float model in the loss; 0 is cross-entropy alone.
        temperature: of the distillation.
        steps: optimizer steps; by the epochs if not given.
        epochs: passes over the samples; if not given 1 where there are 1024 and more, up to 8 for fewer.
        batch_size: samples a step.
        warmup: share of the steps in which the rate rises; then it falls as half a cosine.
        clip: largest norm of all gradients together.
        holdout: samples held out to choose the state that is kept.
    """
    more = {"zero": zero_rate, "norm": norm_rate, "weight": weight_rate}
    stage = EndToEnd(
        name="e2e_qp",
        rates={"scale": rate} | {slot: value for slot, value in more.items() if value != 0},
        relative=relative,
        distill=distill,
        temperature=temperature,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        warmup=warmup,
        clip=clip,
        holdout=holdout,
    )
    return Recipe(name="e2e_qp", stages=(stage,))
