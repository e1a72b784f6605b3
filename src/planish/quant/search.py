"""Importance-weighted range search: the grid of each group that loses least.

    argmin over (s, z) of  e^T H e,      e = s (Q - z) - w

H says how much the group's inputs matter: the diagonal of their mean squares (AutoRound's opt-RTN, llama.cpp's
importance matrix), or all their mean products x x^T, so that e^T H e is the group's own share of the output's
squared error, errors that cancel included. First a sweep over candidate ranges, both signs tried, either end of
an asymmetric range shrunk by itself; then least squares for s with the codes held, a few times. No gradient, no
model: one weight matrix at a time.
"""

import torch
from torch import Tensor

from planish.qtensor import decode, encode, store
from planish.scheme import Scheme

# k of s = -peak / k, in units of 2^(bits-1): below 1 the peak has levels to spare, above 1 it is clipped
SYMMETRIC_SWEEP = torch.linspace(0.5, 1.9, 29).tolist()
COMMON_SWEEP = torch.linspace(1.0, 0.25, 31).tolist()
SINGLE_SWEEP = torch.linspace(1.15, 0.7, 16).tolist()
REFITS = 3
CPU_PART, GPU_PART = 2**18, 2**26  # weights at a time
# ... times candidates for each: on a GPU one candidate is little work and many launches
CPU_TRIED, GPU_TRIED = 2**18, 2**24


class Best:
    """Keeps, group by group, the grid of least weighted error seen so far."""

    def __init__(self, groups: Tensor, importance: Tensor, bits: int, scale: Tensor, zero: Tensor) -> None:
        self.groups, self.importance, self.bits = groups.float(), importance, bits
        self.scale, self.zero = scale, zero
        self.error = self._error(scale, zero)

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:
        lost = decode(encode(self.groups, scale, zero, self.bits), scale, zero) - self.groups
        return (self._weigh(lost) * lost).sum(-1, keepdim=True)

    def _weigh(self, values: Tensor) -> Tensor:
        """H v for each group: [..., out, G, g]."""
        if self.importance.ndim == 2:
            return values * self.importance
        weighed = values.flatten(0, -3).transpose(0, 1) @ self.importance
        return weighed.transpose(0, 1).view_as(values)

    def offer(self, scales: list[Tensor], zeros: list[Tensor]) -> None:
        """Candidates [out, G, 1], some tried together; of those that lose the same the first is kept."""
        together = max(1, (CPU_TRIED if _on_cpu(self.groups) else GPU_TRIED) // self.groups.numel())
        for start in range(0, len(scales), together):
            part = slice(start, start + together)
            self._offer(store(torch.stack(scales[part])), torch.stack(zeros[part]))

    def _offer(self, scales: Tensor, zeros: Tensor) -> None:
        errors = self._error(scales, zeros)
        least = errors.argmin(0, keepdim=True)
        error, scale, zero = (part.gather(0, least)[0] for part in (errors, scales, zeros))
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)

    def refit(self) -> None:
        """Least squares for the scale, codes and zero point held."""
        levels = encode(self.groups, self.scale, self.zero, self.bits) - self.zero
        weighted = self._weigh(levels)
        below = (weighted * levels).sum(-1, keepdim=True)
        above = (weighted * self.groups).sum(-1, keepdim=True)
        self.offer([torch.where(below > 0, above / below.clamp(min=1e-30), self.scale)], [self.zero])


def _on_cpu(groups: Tensor) -> bool:
    return groups.device.type == "cpu"


@torch.no_grad()
def search_grid(
    groups: Tensor, scheme: Scheme, importance: Tensor | None, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of least weighted error, never worse than the ones given.

    Args:
        groups: weights [out, G, g].
        importance: fp32 [G, g], the mean square of each input; or [G, g, g], the mean products of a group's
            inputs; or None for equal weights.
        scale, zero: where to start, fp32 [out, G, 1].
    """
    if importance is None:
        importance = torch.ones_like(groups[0], dtype=torch.float32)
    sweep = _sweep_symmetric if scheme.symmetric else _sweep_asymmetric
    # rows don't see one another: a few at a time stay in a CPU's cache, and bound a GPU's memory
    rows = max(1, (CPU_PART if _on_cpu(groups) else GPU_PART) // groups[0].numel())
    found = []
    for part, part_scale, part_zero in zip(groups.split(rows), scale.split(rows), zero.split(rows), strict=True):
        best = Best(part, importance, scheme.bits, part_scale, part_zero)
        sweep(best, part.float(), scheme.bits)
        for _ in range(REFITS):
            best.refit()
        found.append((best.scale, best.zero))
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _sweep_symmetric(best: Best, groups: Tensor, bits: int) -> None:
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / 2 ** (bits - 1)
    scales = [sign * peak / share for share in SYMMETRIC_SWEEP for sign in (-1, 1)]
    best.offer(scales, [best.zero] * len(scales))


def _sweep_asymmetric(best: Best, groups: Tensor, bits: int) -> None:
    levels = 2**bits - 1

    def offer(ends: list[tuple[Tensor, Tensor]]) -> None:
        scales = [store((high - low) / levels) for low, high in ends]
        zeros = [(-low / scale).round().clamp(0, levels) for (low, _), scale in zip(ends, scales, strict=True)]
        best.offer(scales, zeros)

    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    offer([(low * share, high * share) for share in COMMON_SWEEP])
    for end in (0, 1):
        low, high = -best.zero * best.scale, (levels - best.zero) * best.scale
        offer([(low * (share if end == 0 else 1), high * (share if end == 1 else 1)) for share in SINGLE_SWEEP])
