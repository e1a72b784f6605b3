"""Importance-weighted range search: the grid of each group that loses least.

    argmin over (s, z) of  sum_j m_j (s (Q_j - z) - w_j)^2,      m_j = mean of x_j^2 over calibration tokens

First a sweep over candidate ranges, then least squares for s with the codes held, a few times: the idea
of AutoRound's opt-RTN and of llama.cpp's importance matrix, with both signs tried and either end of an
asymmetric range shrunk by itself. No gradient, no model: one weight matrix at a time.
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


class Best:
    """Keeps, group by group, the grid of least weighted error seen so far."""

    def __init__(self, groups: Tensor, importance: Tensor, bits: int, scale: Tensor, zero: Tensor) -> None:
        self.groups, self.importance, self.bits = groups.float(), importance, bits
        self.scale, self.zero = scale, zero
        self.error = self._error(scale, zero)

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:
        codes = encode(self.groups, scale, zero, self.bits)
        return ((decode(codes, scale, zero) - self.groups).square() * self.importance).sum(-1, keepdim=True)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        scale = store(scale)
        error = self._error(scale, zero)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)

    def refit(self) -> None:
        """Least squares for the scale, codes and zero point held."""
        levels = encode(self.groups, self.scale, self.zero, self.bits) - self.zero
        weighted = levels * self.importance
        below = (weighted * levels).sum(-1, keepdim=True)
        above = (weighted * self.groups).sum(-1, keepdim=True)
        self.offer(torch.where(below > 0, above / below.clamp(min=1e-30), self.scale), self.zero)


@torch.no_grad()
def search_grid(
    groups: Tensor, scheme: Scheme, importance: Tensor | None, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of least weighted error, never worse than the ones given.

    Args:
        groups: weights [out, G, g].
        importance: fp32 [G, g], the mean square of each input, or None for equal weights.
        scale, zero: where to start, fp32 [out, G, 1].
    """
    weight = torch.ones_like(groups[:1], dtype=torch.float32) if importance is None else importance.unsqueeze(0)
    best = Best(groups, weight, scheme.bits, scale, zero)
    (_sweep_symmetric if scheme.symmetric else _sweep_asymmetric)(best, groups.float(), scheme.bits)
    for _ in range(REFITS):
        best.refit()
    return best.scale, best.zero


def _sweep_symmetric(best: Best, groups: Tensor, bits: int) -> None:
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / 2 ** (bits - 1)
    zero = best.zero
    for share in SYMMETRIC_SWEEP:
        best.offer(-peak / share, zero)
        best.offer(peak / share, zero)


def _sweep_asymmetric(best: Best, groups: Tensor, bits: int) -> None:
    levels = 2**bits - 1

    def offer(low: Tensor, high: Tensor) -> None:
        scale = store((high - low) / levels)
        best.offer(scale, (-low / scale).round().clamp(0, levels))

    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    for share in COMMON_SWEEP:
        offer(low * share, high * share)
    for end in (0, 1):
        low, high = -best.zero * best.scale, (levels - best.zero) * best.scale
        for share in SINGLE_SWEEP:
            offer(low * (share if end == 0 else 1), high * (share if end == 1 else 1))
