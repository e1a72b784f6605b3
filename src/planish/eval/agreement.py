"""Agreement: how near a model's answers are to another's, token by token, without a label.

    KL = mean over the answers' tokens of sum_v p(v) ln(p(v) / q(v))        p the float model, q the other, in nats
    top-1 = share of those tokens whose likeliest choice is the same

    said = reference(float_model, "chats.jsonl")      answers, and what predicts them: small, kept on the host
    agreement(model, said)                            the float model needn't be in memory any more

Prompts go through the chat template. Where a conversation has answers, those are read; one that ends with a question
is answered by the float model itself, greedily. Tokens of a prompt aren't independent: standard errors are of the
ratio of two sums over prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish import data
from planish.data import Chat, Conversation
from planish.errors import PlanishError
from planish.eval.answers import answers
from planish.eval.batches import device_of, in_batches, longest_of
from planish.eval.perplexity import LOGIT_ROWS, parts
from planish.eval.prompts import PROMPTS
from planish.folder import tokenizer_of
from planish.instruct import NO_LOSS, label

DEFAULT = "embedded-prompts"
TOKENS = 1024  # of a conversation, about, to know how much of a hub data set to read
LIMIT = 256  # conversations, where nobody says


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a float model says on prompts.

    Args:
        name: of the prompts.
        ids: token ids of each prompt with its answer.
        places: of each the positions that predict the answer's tokens, int64 [n].
        hidden: of each what the head is given there, [n, hidden] on the host.
        head: hidden states -> logits, on the float model's device.
        vocabulary: logits of a token.
    """

    name: str
    ids: list[list[int]]
    places: list[Tensor]
    hidden: list[Tensor]
    head: nn.Module
    vocabulary: int


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """KL in nats a token and top-1 agreement, each with its standard error over prompts."""

    kl: float
    kl_stderr: float
    top1: float
    top1_stderr: float
    tokens: int
    prompts: int


@torch.no_grad()
def reference(
    model: Any,
    prompts: str | Path | None = None,
    *,
    tokenizer: Any = None,
    limit: int = LIMIT,
    new_tokens: int = 128,
    batch_size: int | None = None,
) -> Reference:
    """What the float model says, for `agreement`.

    Args:
        prompts: a file or hub data set of conversations as `planish.data` reads them; 32 of our own if not given.
        tokenizer: with a chat template; the model's own if not given.
        limit: the first so many conversations.
        new_tokens: of an answer that the model gives itself, at most.

    Raises:
        PlanishError: if there is no such text, it holds no conversations, or they can't be rendered.
    """
    tokenizer = tokenizer or tokenizer_of(model)
    if tokenizer is None:
        raise PlanishError(f"no tokenizer in {model.config.name_or_path!r}; pass tokenizer=")
    model.eval()
    name = DEFAULT if prompts is None else str(prompts)
    longest = longest_of(model)
    asked, answered = _read(tokenizer, name, limit)
    asked = [ids for ids in asked if len(ids) + 1 < longest]
    own = answers(model, asked, new_tokens=min(new_tokens, longest - max(map(len, asked), default=0)),
                  batch_size=batch_size)  # fmt: skip
    pieces = answered + [([*q, *a], [NO_LOSS] * len(q) + a) for q, a in zip(asked, own, strict=True)]
    kept = [(piece[:longest], where) for piece, labels in pieces if len(where := _predicting(labels[:longest]))]
    if not kept:
        raise PlanishError(f"{name}: no answer has a token; give other prompts")
    ids, places = [piece for piece, _ in kept], [where for _, where in kept]
    decoder, head = parts(model, torch.tensor(ids[0][:8]))
    hidden: list[Tensor] = [torch.empty(0)] * len(ids)
    for members, states in in_batches(decoder, ids, device_of(model), batch_size):
        for row, index in enumerate(members):
            hidden[index] = states[row, places[index].to(states.device)].cpu()
    size = model.config.get_text_config().vocab_size
    return Reference(name=name, ids=ids, places=places, hidden=hidden, head=head, vocabulary=size)


@torch.no_grad()
def agreement(model: Any, said: Reference, *, batch_size: int | None = None) -> Agreement:
    """How near a model is to a reference.

    Raises:
        PlanishError: if the models' vocabularies differ.
    """
    size = model.config.get_text_config().vocab_size
    if size != said.vocabulary:
        raise PlanishError(f"the model has a vocabulary of {size}, the float one of {said.vocabulary}; give its own")
    model.eval()
    decoder, head = parts(model, torch.tensor(said.ids[0][:8]))
    sums = torch.zeros(len(said.ids), 2, dtype=torch.float64)
    device = device_of(model)
    for members, states in in_batches(decoder, said.ids, device, batch_size):
        for row, index in enumerate(members):
            mine = states[row, said.places[index].to(states.device)]
            sums[index] = _compared(said.head, said.hidden[index].to(device), head, mine)
    counts = torch.tensor([len(places) for places in said.places], dtype=torch.float64)
    (kl, kl_stderr), (top1, top1_stderr) = (_ratio(total, counts) for total in sums.unbind(1))
    return Agreement(kl=kl, kl_stderr=kl_stderr, top1=top1, top1_stderr=top1_stderr,
                     tokens=int(counts.sum()), prompts=len(counts))  # fmt: skip


def _read(tokenizer: Any, name: str, limit: int) -> tuple[list[list[int]], list[tuple[list[int], list[int]]]]:
    """(prompts without an answer, (ids, labels) of conversations that have answers)."""
    if limit < 1:
        raise PlanishError(f"the first {limit} prompts are none; give at least 1")
    if name == DEFAULT:
        found: Sequence[Any] = [Conversation([{"role": "user", "content": text}], name) for text in PROMPTS]
    else:
        found = list(islice(data.documents(name, limit * TOKENS), limit))
    chat, asked, answered = Chat(tokenizer, name), [], []
    for conversation in found[:limit]:
        if not isinstance(conversation, Conversation):
            raise PlanishError(f"{name} holds text, no conversations; give rows of messages or instructions")
        if conversation.messages[-1]["role"] == "assistant":
            answered += label(chat, conversation)
        else:
            asked.append(data.encode(tokenizer, chat.render(conversation, add_generation_prompt=True)))
    return asked, answered


def _predicting(labels: list[int]) -> Tensor:
    """Positions whose next token has a label, int64 [n]."""
    return (torch.tensor(labels[1:]) != NO_LOSS).nonzero()[:, 0]


def _compared(head: nn.Module, theirs: Tensor, own_head: nn.Module, mine: Tensor) -> Tensor:
    """float64 [2]: the sum of KL over tokens, and how many have the same likeliest choice."""
    total = torch.zeros(2, dtype=torch.float64, device=mine.device)
    for one, other in zip(theirs.split(LOGIT_ROWS), mine.split(LOGIT_ROWS), strict=True):
        p, q = head(one).float().log_softmax(-1), own_head(other).float().log_softmax(-1)
        total[0] += (p.exp() * (p - q)).sum(-1).double().sum()
        total[1] += (p.argmax(-1) == q.argmax(-1)).sum()
    return total.cpu()


def _ratio(totals: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean over tokens of what is summed by prompt, and its standard error: prompts are the sample, not tokens."""
    mean, n = totals.sum() / counts.sum(), len(counts)
    spread = ((totals - mean * counts) ** 2).sum() * n / max(n - 1, 1)
    return float(mean), float(spread.sqrt() / counts.sum())
