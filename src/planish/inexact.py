"""Inexact: what a format or a target can't hold is rounded to nearest once more, on a grid that it holds.

    format, again = mended(schemes, shapes, format="gptq")    which layers, and to what; refused before any work if none
    Rounding(schemes=again).round(layer, stream)              and what that loses

A grid of as many bits or more, with groups as large or smaller. It is asked for by name (`--inexact`), and what it
loses is said layer by layer. Knows nothing of files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from planish.bitstream import Stream
from planish.errors import PlanishError
from planish.formats import FORMATS, verify
from planish.formats.gguf import candidates
from planish.quant import Quantizer
from planish.scheme import Scheme
from planish.targets import GGUF, choose_for, formats_of

Schemes = Mapping[str, Scheme | None]
Shapes = Mapping[str, tuple[int, int]]


def mended(
    schemes: Schemes, shapes: Shapes, *, format: str, target: str | None = None, tp: int = 1
) -> tuple[str, dict[str, Scheme]]:
    """A format, and what those layers are to be rounded to that it, or the target, can't hold.

    Args:
        schemes: of every linear; None is one left in 16 bits. shapes: (out, in) of them.
        format: the one asked for, or 'auto' for the target's first that holds all, as it is or else rounded.
        tp: GPUs that the target will cut each layer for.

    Raises:
        PlanishError: as the format or target does, if rounding layer by layer doesn't help.
    """
    names = [format] if target is None or format != "auto" else formats_of(target)
    refusals = []
    for mends in (False, True):
        for name in names:
            again = {
                layer: mend
                for layer, scheme in schemes.items()
                if mends and scheme and (mend := _mend(name, target, tp, layer, scheme, shapes[layer]))
            }
            try:
                _accept(name, target, tp, {**schemes, **again}, shapes)
            except PlanishError as refusal:
                refusals.append(refusal)
            else:
                return name, again
    raise refusals[len(names)]


def _mend(
    format: str, target: str | None, tp: int, layer: str, scheme: Scheme, shape: tuple[int, int]
) -> Scheme | None:
    """The nearest scheme that can be held: as many bits or more, a group of 32 at least; None if there's no need, or
    none. How activations are rounded isn't given up."""

    def held(choice: Scheme) -> bool:
        try:
            _accept(format, target, tp, {layer: choice}, {layer: shape})
        except PlanishError:
            return False
        return True

    if scheme.activations is not None or held(scheme):
        return None
    # in a GGUF 2 and 3 bits that no type of theirs holds take as much room as 4
    least = max(scheme.bits, 4) if format == GGUF else scheme.bits
    choices = (
        Scheme(bits=bits, group_size=group, symmetric=symmetric)
        for bits in (2, 3, 4, 8)
        for group in (scheme.group_size, 128, 64, 32)
        for symmetric in (scheme.symmetric, not scheme.symmetric)
        if bits >= least and group is not None and group <= min(scheme.group_in(shape[1]), shape[1]) | 32
    )
    return next(filter(held, choices), None)


def _accept(format: str, target: str | None, tp: int, schemes: Schemes, shapes: Shapes) -> None:
    """Raise PlanishError if a format can't hold these layers, or the target can't load them."""
    if target is not None:
        choose_for(target, schemes, shapes, format=format, tp=tp)
    if format != GGUF:
        verify(FORMATS[format], schemes, shapes)
    for layer, scheme in schemes.items() if format == GGUF else ():
        if scheme is not None:
            candidates(layer, scheme, shapes[layer])


@dataclass(kw_only=True)
class Rounding:
    """Layers to round once more, and what that loses.

    Args:
        schemes: by layer. tell: called with what was lost, line by line, in the end.

    Attributes:
        errors: by layer the squared error over the weight's square; filled by `round`, by several threads.
    """

    schemes: Mapping[str, Scheme]
    tell: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self.errors = dict.fromkeys(self.schemes, 0.0)

    def round(self, layer: str, stream: Stream) -> Stream:
        """A weight rounded to nearest once more."""
        weight = stream.qtensor().dequantize()
        q = Quantizer(weight, self.schemes[layer]).quantize(weight)
        lost = (q.dequantize().double() - weight).square().sum() / weight.double().square().sum().clamp(min=1e-30)
        self.errors[layer] = float(lost)
        return Stream.of(q)

    def say(self) -> None:
        """Tell the errors."""
        if self.tell is None or not self.errors:
            return
        for layer, error in self.errors.items():
            self.tell(f"{layer}: rounded once more, to {self.schemes[layer]}; relative squared error {error:.3g}")
        mean, worst = sum(self.errors.values()) / len(self.errors), max(self.errors.values())
        self.tell(f"{len(self.errors)} layers were rounded once more: {mean:.3g} in the mean, {worst:.3g} at most")
