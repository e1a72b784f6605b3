"""Losses between a block's output and its target, both [batch, tokens, hidden]; computed in fp32.

`squared` is the mean squared error; `trimmed` leaves out the share of elements with the largest errors,
which at 2 bits belong to a few massive activations and drown the rest (arXiv 2512.04746).
"""

import torch
from torch import Tensor

# every 211th element estimates the threshold; a prime, so that it isn't always the same channel
STRIDE = 211


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().mean()


def trimmed(output: Tensor, target: Tensor, share: float) -> Tensor:
    """Mean squared error without the `share` of largest errors.

    The threshold is read off a fixed subsample: exact order statistics of 10 million elements would cost
    more than the block.
    """
    error = (output.float() - target.float()).square()
    sample = error.detach().flatten()[::STRIDE]
    count = max(1, round(len(sample) * share))
    threshold = torch.topk(sample, count, sorted=True).values[-1]
    return (error * (error <= threshold)).mean()
