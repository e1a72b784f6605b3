"""Answers: greedy continuations of prompts of unequal length, many at a time.

    answers(model, prompts, new_tokens=256) -> the tokens of each answer, without what ended it

Prompts are padded before their first token and masked there, so that all go on at the same position. The loop is
transformers' own. Knows nothing of tasks and templates.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from planish.eval.batches import batches, device_of, padded

ROWS = {"cuda": 256, "cpu": 16}  # prompts at once, if not given


@torch.no_grad()
def answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch_size: int | None = None,
    stop: Sequence[str] = (),
    tokenizer: Any = None,
) -> list[list[int]]:
    """The model's greedy answer to each prompt.

    Args:
        prompts: token ids of each, not empty.
        new_tokens: at most so many.
        batch_size: prompts at once.
        stop: texts that end an answer, besides the model's own ends; needs the tokenizer.
    """
    model.eval()
    device = device_of(model)
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    fill = ends[0] if ends else 0
    how = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends or None, pad_token_id=fill,
        stop_strings=list(stop) or None,
    )  # fmt: skip
    found: list[list[int]] = [[] for _ in prompts]
    rows = batch_size or ROWS.get(device.type, ROWS["cpu"])
    for members in batches(list(map(len, prompts)), device, rows):
        ids, mask = padded([prompts[index] for index in members], left=True, fill=fill)
        out = model.generate(
            ids.to(device), attention_mask=mask.to(device), generation_config=how, tokenizer=tokenizer if stop else None
        )
        for index, tokens in zip(members, out[:, ids.shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            found[index] = tokens[:end]
    return found
