"""Seven zero-shot tasks by the field's customary prompts: the share of questions whose likeliest answer is right.

    scores(model, tokenizer, folder, limit=None) -> {"arc_easy": 0.61, ..., "mean": 0.47}

The folder has one subfolder a task with a .jsonl file. Likelihoods are compared as lm-eval's `acc` has them, not
normalised by length. lambada counts a last word that is the likeliest token by token.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Question = tuple[list[tuple[str, str]], int]  # (context, answer) pairs, and which is right


def _arc(row: dict[str, Any]) -> Question:
    choices = row["choices"]
    context = f"Question: {row['question']}\nAnswer:"
    return [(context, f" {text}") for text in choices["text"]], choices["label"].index(row["answerKey"])


def _boolq(row: dict[str, Any]) -> Question:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return [(context, " no"), (context, " yes")], int(row["label"] if "label" in row else row["answer"])


def _hellaswag(row: dict[str, Any]) -> Question:
    context = f"{row['activity_label']}: {row['ctx']}"
    return [(context, f" {text}") for text in row["endings"]], int(row["label"])


def _piqa(row: dict[str, Any]) -> Question:
    context = f"Question: {row['goal']}\nAnswer:"
    return [(context, f" {row['sol1']}"), (context, f" {row['sol2']}")], int(row["label"])


def _winogrande(row: dict[str, Any]) -> Question:
    before, after = row["sentence"].split("_", 1)
    return [(before + row[option], f" {after.strip()}") for option in ("option1", "option2")], int(row["answer"]) - 1


def _lambada(row: dict[str, Any]) -> Question:
    before, _, last = row["text"].rpartition(" ")
    return [(before, f" {last}")], 0


TASKS: dict[str, Callable[[dict[str, Any]], Question]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "lambada_openai": _lambada,
    "piqa": _piqa,
    "winogrande": _winogrande,
}


@torch.no_grad()
def _likelihoods(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], batch: int) -> list[tuple[float, bool]]:
    """Of each answer after its context: the sum of log-probabilities, and whether each token is the likeliest."""
    encoded = []
    for context, answer in pairs:
        start = tokenizer(context, add_special_tokens=False)["input_ids"]
        encoded.append((tokenizer(context + answer, add_special_tokens=False)["input_ids"][-2047:], len(start)))
    order = sorted(range(len(pairs)), key=lambda i: -len(encoded[i][0]))
    found: list[Any] = [None] * len(pairs)
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        longest = len(encoded[part[0]][0])
        ids = torch.zeros(len(part), longest, dtype=torch.int64)
        for row, index in enumerate(part):
            ids[row, : len(encoded[index][0])] = torch.tensor(encoded[index][0])  # what is padded lies behind
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        for row, index in enumerate(part):
            tokens, start = encoded[index]
            found[index] = _of_answer(logits[row], tokens, min(start, len(tokens) - 1))
    return found


def _of_answer(logits: Tensor, tokens: list[int], start: int) -> tuple[float, bool]:
    wanted = torch.tensor(tokens[start:], device=logits.device)
    chances = logits[start - 1 : len(tokens) - 1].float().log_softmax(-1)
    total = chances.gather(1, wanted.unsqueeze(1)).sum()
    return float(total), bool((chances.argmax(-1) == wanted).all())


def scores(model: Any, tokenizer: Any, folder: Path, limit: int | None = None, batch: int = 32) -> dict[str, float]:
    """Accuracy by task, and their mean.

    Args:
        limit: questions of each task, all if not given.
    """
    found = {}
    for name, read in TASKS.items():
        (file,) = sorted((folder / name).glob("*.jsonl"))
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:limit]]
        questions = [read(row) for row in rows]
        pairs = [pair for pairs, _ in questions for pair in pairs]
        values, at, right = _likelihoods(model, tokenizer, pairs, batch), 0, 0
        for answers, label in questions:
            mine = values[at : at + len(answers)]
            at += len(answers)
            right += mine[0][1] if len(answers) == 1 else max(range(len(mine)), key=lambda i: mine[i][0]) == label  # noqa: B023
        found[name] = round(right / len(questions), 4)
    return {**found, "mean": round(sum(found.values()) / len(found), 4)}
