"""Instruct: windows of tokens to train on, and which of them carry loss.

    conversation = prompt_1 answer_1 prompt_2 answer_2 ...        as the tokenizer's chat template renders it
    labels       = ids on the answers, each with the token that ends its turn; -100 elsewhere

Labels are aligned with ids, not shifted: models shift them themselves. Whole conversations are packed several
to a window; what is left of a window is padded at the right, which needs no attention mask: under causal
attention no token sees what comes after it. Plain text carries loss everywhere.
This file knows templates only through `planish.data.Chat`, and nothing of models and training.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish import data
from planish.data import Chat, Conversation
from planish.errors import PlanishError

# what losses of torch and transformers skip
NO_LOSS = -100

# so many windows have a chance to be filled up: with one, a quarter of them would be padding
OPEN = 16

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# token ids of a conversation and their labels, equally long
Piece = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Examples:
    """Windows to train on: ids int64 [n, seqlen], labels int64 [n, seqlen] (-100: no loss), and a note for the
    user ("" if there is nothing to say)."""

    ids: Tensor
    labels: Tensor
    note: str


def load_examples(tokenizer: Any, source: str | Path | Tensor, samples: int, seqlen: int, seed: int = 0) -> Examples:
    """`examples` of a source whose first row is a conversation, `text_examples` of any other.

    Args, Returns, Raises: theirs.
    """
    data.check_size(samples, seqlen)
    if isinstance(source, Tensor) or not data.holds_conversations(source):
        return text_examples(tokenizer, source, samples, seqlen, seed)
    return examples(tokenizer, source, samples, seqlen, seed)


def text_examples(tokenizer: Any, source: str | Path | Tensor, samples: int, seqlen: int, seed: int = 0) -> Examples:
    """Windows of `planish.data.windows` with loss on every token; its arguments and errors."""
    ids, note = data.windows(tokenizer, source, samples, seqlen, seed)
    return Examples(ids, ids.clone(), note)


def examples(tokenizer: Any, source: str | Path, samples: int, seqlen: int, seed: int = 0) -> Examples:
    """Conversations, whole, in a shuffled order, packed into windows, with loss on the answers only.

    A conversation longer than a window has one for itself and is cut at the right. Ones without an answer, or
    whose answers are all cut off, are left out. The note counts these.

    Args:
        tokenizer: of transformers, with a chat template.
        source: rows of conversations, see `planish.data`.
        samples: windows at most.
        seqlen: tokens of a window.
        seed: of the shuffle.

    Raises:
        PlanishError: if the source holds no conversations, a row is malformed, the tokenizer has no chat
            template or one that refuses a conversation or hides where answers are, or no answer is left.
    """
    data.check_size(samples, seqlen)
    conversations = _conversations(source, samples * seqlen * data.CHOICE)
    if not any(_answers(conversation) for conversation in conversations):
        raise PlanishError(f"{source} holds no answer to a question: this would be a loss over nothing")
    chat = Chat(tokenizer, source)
    order = torch.randperm(len(conversations), generator=torch.Generator().manual_seed(seed)).tolist()
    tally: Counter[str] = Counter()
    pieces = (piece for index in order for piece in label(chat, conversations[index]))
    filled = _fill(_fitting(pieces, seqlen, tally), samples, seqlen)
    if not filled:
        raise PlanishError(
            f"{source} has no answer within the first {seqlen} tokens of a conversation: this would be a loss over "
            f"nothing; give a larger --seqlen"
        )
    padding = next((i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), 0)
    return Examples(
        torch.tensor([ids + [padding] * (seqlen - len(ids)) for ids, _ in filled]),
        torch.tensor([labels + [NO_LOSS] * (seqlen - len(labels)) for _, labels in filled]),
        _note(str(source), tally, len(filled), samples, seqlen),
    )


def label(chat: Chat, conversation: Conversation) -> list[Piece]:
    """Token ids of a conversation and their labels.

    A template with {% generation %} says itself what the answers are. With any other, an answer is what
    the text up to it, the generation prompt included, lacks of the text through it. Most templates render a
    conversation by appending to it: it is one piece. Some (those that drop the reasoning of past turns) render
    past answers differently: then each answer is a piece of its own, after what the template shows at that time.
    An answer that opens a conversation answers nothing and carries no loss.

    Returns:
        Pieces (ids, labels); one without labels if there is no answer.

    Raises:
        PlanishError: if an answer as rendered doesn't begin with the generation prompt.
    """
    if _GENERATION.search(chat.template) and chat.tokenizer.is_fast:
        return [_as_marked(chat, conversation)]
    borders = []
    for turn in _answers(conversation):
        prompt = chat.render(conversation, turn, add_generation_prompt=True)
        through = chat.render(conversation, turn + 1)
        if not through.startswith(prompt):
            raise PlanishError(
                f"{conversation.where}: the chat template of {chat.name} renders an answer otherwise than after its "
                f"generation prompt; give it one that does, or that marks answers by {{% generation %}}"
            )
        borders.append((prompt, through))
    whole = chat.render(conversation)
    if all(whole.startswith(through) for _, through in borders):
        return [_labelled(chat, whole, borders)]
    return [_labelled(chat, through, [(prompt, through)]) for prompt, through in borders]


def _conversations(source: str | Path, at_most: int) -> list[Conversation]:
    found = []
    for document in data.documents(source, at_most):
        if not isinstance(document, Conversation):
            raise PlanishError(
                f"{source} holds text, no conversations; rows of them have messages, conversations, instruction and "
                f"output, or prompt and completion"
            )
        found.append(document)
    return found


def _answers(conversation: Conversation) -> list[int]:
    """Which turns answer something."""
    return [index for index, turn in enumerate(conversation.messages) if index and turn["role"] == "assistant"]


def _as_marked(chat: Chat, conversation: Conversation) -> Piece:
    settings = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = chat.render(conversation, tokenizer_kwargs={"verbose": False}, **settings)
    ids = list(out["input_ids"])
    return ids, [token if marked else NO_LOSS for token, marked in zip(ids, out["assistant_masks"], strict=True)]


def _labelled(chat: Chat, text: str, borders: list[tuple[str, str]]) -> Piece:
    """Ids of a text and their labels; borders are its beginnings up to and through each answer.

    A beginning may end within a token of the whole text (a newline merged with the next one). A token that
    only begins in the prompt belongs to the answer, and one that only begins in an answer doesn't.
    """
    ids = data.encode(chat.tokenizer, text)
    labels = [NO_LOSS] * len(ids)
    for prompt, through in borders:
        start = _shared(ids, data.encode(chat.tokenizer, prompt))
        end = _shared(ids, data.encode(chat.tokenizer, through))
        # models stop at the token that ends the turn: the line end that templates write after it is no answer
        last = max((index for index in range(start, end) if ids[index] in chat.special), default=end - 1) + 1
        if not chat.tokenizer.decode(ids[last:end]).strip():
            end = last
        labels[start:end] = ids[start:end]
    return ids, labels


def _shared(ids: list[int], others: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _fitting(pieces: Iterable[Piece], seqlen: int, tally: Counter[str]) -> Iterator[Piece]:
    """Pieces cut to a window, without those that have no loss then."""
    for ids, labels in pieces:
        # nothing predicts the first token
        if all(token == NO_LOSS for token in labels[1:seqlen]):
            tally["left out"] += 1
            continue
        tally["cut"] += len(ids) > seqlen
        yield ids[:seqlen], labels[:seqlen]


def _fill(pieces: Iterable[Piece], samples: int, seqlen: int) -> list[Piece]:
    """Pieces put one after the other into windows: each into the first of the latest ones that has room."""
    filled: list[Piece] = []
    for ids, labels in pieces:
        window = next((window for window in filled[-OPEN:] if len(window[0]) + len(ids) <= seqlen), None)
        if window is None:
            if len(filled) == samples:
                break
            filled.append(window := ([], []))
        window[0].extend(ids)
        window[1].extend(labels)
    return filled


def _note(name: str, tally: Counter[str], windows: int, samples: int, seqlen: int) -> str:
    notes = []
    if tally["cut"]:
        notes.append(f"{tally['cut']} longer than {seqlen} tokens are cut")
    if tally["left out"]:
        notes.append(f"{tally['left out']} without an answer in their first {seqlen} tokens are left out")
    if windows < samples:
        notes.append(f"they fill {windows} windows of {seqlen} tokens, not {samples}: using {windows}")
    return f"conversations of {name}: {'; '.join(notes)}" if notes else ""
