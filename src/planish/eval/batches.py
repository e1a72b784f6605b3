"""Batches: many sequences of unequal length through a model, longest first, with little padding.

    for members, hidden in in_batches(decoder, sequences, device):      hidden[i] belongs to sequences[members[i]]

Padding lies behind, where causal attention never looks, so that no mask is needed. A batch holds about as many
tokens as any other. Knows nothing of what is made of the hidden states.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

TOKENS = {"cuda": 16384, "cpu": 2048}  # of a batch
LONGEST = 4096  # tokens of a sequence, where a model doesn't say


def longest_of(model: Any) -> int:
    """Tokens that a model has positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else LONGEST


def device_of(model: Any) -> torch.device:
    """Where a model wants its tokens."""
    return model.get_input_embeddings().weight.device


def batches(lengths: Sequence[int], device: torch.device, batch_size: int | None = None) -> Iterator[list[int]]:
    """Indices by batch, longest first.

    Args:
        lengths: tokens of each sequence.
        batch_size: sequences of a batch; by their tokens if not given.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = batch_size or max(TOKENS.get(device.type, TOKENS["cpu"]) // max(lengths[order[0]], 1), 1)
        yield order[:count]
        order = order[count:]


def padded(sequences: Sequence[Sequence[int]], left: bool = False, fill: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask), both int64 [n, longest]; the mask is 0 on padding, which lies behind, or before if `left`."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if left else slice(len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return ids, mask


def in_batches(
    decoder: Callable[[Tensor], Tensor],
    sequences: Sequence[Sequence[int]],
    device: torch.device,
    batch_size: int | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, what the decoder makes of them: [n, longest of them, ...]), batch by batch."""
    for members in batches(list(map(len, sequences)), device, batch_size):
        ids, _ = padded([sequences[index] for index in members])
        yield members, decoder(ids.to(device))
