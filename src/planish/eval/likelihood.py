"""Likelihoods: how probable answers are after their contexts.

    likelihoods(model, [(context, answer), ...]) -> [(sum of ln p(token), whether each token is the likeliest), ...]

What the model reads is context and answer without its last token: requests in which that is equal (yes and no;
A, B, C and D) share a row. The head runs on the positions that predict answers only, in float32 from there on.
This is all that multiple-choice tasks need; what a task is, this file doesn't know.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from planish.eval.batches import device_of, in_batches, longest_of
from planish.eval.perplexity import LOGIT_ROWS, parts

Request = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of an answer, neither empty


def rows_of(requests: Sequence[Request], longest: int) -> dict[tuple[int, ...], list[int]]:
    """What the model reads -> which requests it answers; contexts lose their start where all is too long."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, (context, answer) in enumerate(requests):
        assert context and answer
        rows.setdefault((*context, *answer)[-longest - 1 : -1], []).append(index)
    return rows


@torch.no_grad()
def likelihoods(
    model: nn.Module, requests: Sequence[Request], *, batch_size: int | None = None
) -> list[tuple[float, bool]]:
    """Of each answer after its context the sum of log-probabilities, and whether it is the greedy one.

    Args:
        model: a causal language model of transformers.
        requests: token ids of each context and answer.
        batch_size: rows at once; by their tokens if not given.
    """
    if not requests:
        return []
    model.eval()
    rows, device = rows_of(requests, longest_of(model)), device_of(model)
    read = list(rows)
    decoder, head = parts(model, torch.tensor(read[0][:8]))
    order: list[int] = []
    found: list[Tensor] = []
    for members, hidden in in_batches(decoder, read, device, batch_size):
        places: list[tuple[int, int, int, int]] = []  # row, position, token that it predicts, request
        first = len(order)
        for row, index in enumerate(members):
            for request in rows[read[index]]:
                answer = requests[request][1][-len(read[index]) :]
                start = len(read[index]) - len(answer)
                places += [(row, start + step, token, len(order) - first) for step, token in enumerate(answer)]
                order.append(request)
        found.append(_sums(head, hidden, torch.tensor(places, device=device), len(order) - first))
    values = torch.cat(found, dim=1).tolist()
    by_request = {request: (total, wrong == 0) for request, total, wrong in zip(order, *values, strict=True)}
    return [by_request[index] for index in range(len(requests))]


def _sums(head: nn.Module, hidden: Tensor, places: Tensor, count: int) -> Tensor:
    """float64 [2, count]: by request the sum of log-probabilities and how many tokens aren't the likeliest."""
    sums = torch.zeros(2, count, dtype=torch.float64, device=hidden.device)
    for part in places.split(LOGIT_ROWS):
        row, position, token, request = part.unbind(1)
        logits = head(hidden[row, position]).float()
        chances = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        sums[0].index_add_(0, request, chances.double())
        sums[1].index_add_(0, request, (logits.argmax(-1) != token).double())
    return sums
