"""Bits by layer: an average is asked for, what each linear loses is measured, and the bits go where they save most.

It stands between a request and its run: it reads a few of the run's calibration windows, measures every linear that
no rule of the request names, and gives the request its schemes. Recipes don't know of it.
"""

import dataclasses
import math

from torch import Tensor, nn

from planish.errors import PlanishError
from planish.fit.sensitivity import drawn_gradient, sensitivities
from planish.log import Event
from planish.request import Resolved
from planish.run import Run
from planish.scheme import Scheme
from planish.stream import BlockStream

WINDOWS, TOKENS = 8, 512


def settle_bits(resolved: Resolved, run: Run) -> Resolved:
    """The request with its bits chosen, for the run too; as it is if every linear's scheme is given.

    Raises:
        PlanishError: if there is no text to measure on.
    """
    widths = resolved.widths
    if widths is None:
        return resolved
    losses = measured(run, run.some(WINDOWS)[:, :TOKENS], {name: widths.candidates for name in widths.shapes})
    if bad := [name for name, values in losses.items() if not all(map(math.isfinite, values))]:
        raise PlanishError(f"{bad[0]}: its loss isn't finite, so that no bits can be chosen by it; give a whole number")
    schemes = resolved.schemes | widths.choose(losses)
    run.schemes = dict(schemes)
    run.notes.append(widths.summary(schemes))
    return dataclasses.replace(resolved, schemes=schemes)


def measured(run: Run, ids: Tensor, candidates: dict[str, tuple[Scheme, ...]]) -> dict[str, list[float]]:
    """Loss of each linear at each candidate, in nats a token, see `fit.sensitivity`."""
    arch, head = run.arch, () if run.arch.head is None else (run.arch.head,)
    if run.progress:
        run.progress(Event(stage="bits", index=0, total=arch.num_blocks, note="measuring what each linear loses"))
    with run.source.lend((*arch.around, *head), run.device, run.dtype) as model:
        blocks = model.get_submodule(arch.blocks)
        assert isinstance(blocks, nn.ModuleList)
        stream = BlockStream(
            model.get_submodule(arch.decoder), blocks, ids, device=run.device, micro_batch=1, quantized=False
        )
        return sensitivities(run, stream, candidates, drawn_gradient(model, blocks, ids, run.seed))
