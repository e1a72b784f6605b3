"""Bits by linear under a budget: which linears get how many, so that the sum of what each loses is least.

    min sum_u loss(u, b_u)   so that   sum_u size_u * b_u <= average * sum_u size_u

Exact, by dynamic programming over the bits to spare above the fewest ones, in units of the sizes' greatest common
divisor. Ties go to fewer bits, then to the unit that comes first. A unit is one linear, or several that a server
joins into one matrix and that have one scheme. Knows nothing of models, nor of how a loss is measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from planish.errors import PlanishError
from planish.scheme import Average, Scheme

COLUMNS = 100_000  # of the table at most; sizes without a common divisor are counted in coarser units, rounded up


def allocate(sizes: Sequence[int], bits: Sequence[int], losses: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Index into `bits` for each unit.

    Args:
        sizes: weights of each unit. bits: the widths on offer, ascending.
        losses: of each unit at each width. budget: bits in all; at least those of the narrowest width everywhere.
    """
    spare = math.floor(budget + 1e-6) - bits[0] * sum(sizes)
    assert spare >= 0 and list(bits) == sorted(bits)
    unit = max(math.gcd(*sizes), spare // COLUMNS + 1 if spare // math.gcd(*sizes) > COLUMNS else 1)
    columns = spare // unit + 1
    best = torch.zeros(columns, dtype=torch.float64)  # least loss with at most so many units spent
    taken = []
    for size, loss in zip(sizes, losses, strict=True):
        found = best + loss[0]
        choice = torch.zeros(columns, dtype=torch.uint8)
        for index, width in enumerate(bits[1:], start=1):
            cost = -(-size * (width - bits[0]) // unit)
            if cost >= columns:
                continue
            offered = best[: columns - cost] + loss[index]
            better = offered < found[cost:]
            found[cost:] = torch.where(better, offered, found[cost:])
            choice[cost:] = torch.where(better, index, choice[cost:]).to(torch.uint8)
        best = found
        taken.append(choice)
    chosen, left = [], columns - 1
    for size, choice in zip(reversed(sizes), reversed(taken), strict=True):
        index = int(choice[left])
        chosen.append(index)
        left -= -(-size * (bits[index] - bits[0]) // unit)
    return chosen[::-1]


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Linears whose bits are to be chosen, and among what.

    Args:
        average: bits of a code, over all weights of these linears.
        units: names of linears that share a scheme. shapes: (out, in) of each linear.
        candidates: schemes on offer, in the order of their bits.
    """

    average: Average
    units: tuple[tuple[str, ...], ...]
    shapes: Mapping[str, tuple[int, int]]
    candidates: tuple[Scheme, ...]

    def __post_init__(self) -> None:
        low, high = self.candidates[0].bits, self.candidates[-1].bits
        if not low <= self.average.bits <= high:
            only = ", ".join(map(str, self.candidates))
            raise PlanishError(f"no average of {self.average.bits:g} bits of {only}; ask for {low} to {high}")

    @property
    def sizes(self) -> list[int]:
        """Weights of each unit."""
        return [sum(math.prod(self.shapes[name]) for name in unit) for unit in self.units]

    def choose(self, losses: Mapping[str, Sequence[float]]) -> dict[str, Scheme]:
        """Scheme of each linear.

        Args:
            losses: by linear what it costs at each candidate, added up over those of a unit.
        """
        sums = [[math.fsum(losses[name][i] for name in unit) for i in range(len(self.candidates))]
                for unit in self.units]  # fmt: skip
        bits = [scheme.bits for scheme in self.candidates]
        chosen = allocate(self.sizes, bits, sums, self.average.bits * sum(self.sizes))
        found = {name: self.candidates[i] for unit, i in zip(self.units, chosen, strict=True) for name in unit}
        return {name: found[name] for name in self.shapes}

    def even(self) -> dict[str, Scheme]:
        """The choice if all weights were alike, before anything is measured: an error falls fourfold with a bit."""
        return self.choose({name: [out * inside / 4**scheme.bits for scheme in self.candidates]
                            for name, (out, inside) in self.shapes.items()})  # fmt: skip

    def every(self) -> dict[str, Scheme]:
        """All candidates beside one another, for a format to say whether it can hold them."""
        count = len(self.candidates)
        return {name: self.candidates[i % count] for i, unit in enumerate(self.units) for name in unit}

    def summary(self, schemes: Mapping[str, Scheme]) -> str:
        """'2.49 bits of a code on average, 2.74 with scales: 150 x w2g64, 60 x w3g64'."""
        count = sum(self.sizes)
        codes = sum(math.prod(self.shapes[name]) * schemes[name].bits for name in self.shapes) / count
        whole = sum(
            math.prod(shape) * schemes[name].bits_per_weight(shape[1]) for name, shape in self.shapes.items()
        ) / count  # fmt: skip
        kinds = {scheme: sum(schemes[name] == scheme for name in self.shapes) for scheme in self.candidates}
        listed = ", ".join(f"{n} x {scheme}" for scheme, n in kinds.items() if n)
        return f"{codes:.3f} bits of a code on average, {whole:.3f} with scales: {listed}"
