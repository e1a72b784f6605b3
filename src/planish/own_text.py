"""Own text: windows that a float model writes itself, to calibrate and distil on where there is no text at hand.

    token 0       any of the vocabulary, special ones aside
    tokens 1..4   the likeliest ones                                LLM-QAT, arXiv 2305.17888, section 3.1
    from there    drawn from softmax(logits), T = 1

A model writes what it was trained on, so that such text covers what it knows. A draw inverts the cumulative
distribution at a number that the seed gives to each window and place: how many windows are written at once changes
roundings only. A window goes on behind an end of text, as packed text does. The whole model is in memory meanwhile,
and nothing of it afterwards. Knows nothing of quantizers.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from planish.errors import PlanishError
from planish.log import Event, Progress
from planish.plan import gpu_memory, host_memory
from planish.source import Source

GREEDY = 4
MOST = 256  # windows written at once
CACHE_SHARE = 4  # the cache takes at most one part in so many of what memory is free


@torch.no_grad()
def own_windows(
    source: Source,
    tokenizer: Any,
    count: int,
    seqlen: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Windows int64 [count, seqlen] of the model's own text.

    Args:
        source: the float model. tokenizer: its own; it says what may come first. None allows every token.
        dtype: of its weights while it writes.

    Raises:
        PlanishError: if the whole model has no room on the device.
    """
    size = dtype.itemsize * sum(parameter.numel() for parameter in source.skeleton().parameters())
    free = (gpu_memory(device) if device.type == "cuda" else host_memory()) - size
    if free <= 0:
        raise PlanishError(
            f"data=self has {source.label} write text, which takes {size / 1e9:.1f} GB for the whole model, more than "
            "there is; give a text as data"
        )
    draws = torch.rand(count, seqlen, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first = _first(tokenizer, source.config.get_text_config().vocab_size)
    at_once = _at_once(source.config.get_text_config(), seqlen, dtype, free // CACHE_SHARE)
    found: list[Tensor] = []
    with source.lend([""], device, dtype) as model:
        for part in draws.split(at_once):
            if progress:
                note = f"the model writes its own text, windows {len(found) * at_once} to {count} of {seqlen} tokens"
                progress(Event(stage="data", index=0, total=0, note=note))
            found.append(_write(model, first, part.to(device)).cpu())
    return torch.cat(found)


def _write(model: PreTrainedModel, first: Tensor, draws: Tensor) -> Tensor:
    """Windows int64 [n, seqlen] of draws [n, seqlen], uniform in [0, 1)."""
    start = (draws[:, 0] * len(first)).long()
    ids = [first.to(draws.device)[start].unsqueeze(1)]
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = None
    for place in range(1, draws.shape[1]):
        out = model(input_ids=ids[-1], past_key_values=cache, use_cache=True, **last)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        ids.append(logits.argmax(-1, keepdim=True) if place <= GREEDY else drawn(logits, draws[:, place]))
    return torch.cat(ids, dim=1)


def drawn(logits: Tensor, draws: Tensor) -> Tensor:
    """Tokens int64 [n, 1] of logits [n, vocabulary] and draws [n], uniform in [0, 1)."""
    below = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
    places = torch.searchsorted(below, (draws * below[:, -1]).unsqueeze(1).to(below.dtype), right=True)
    return places.clamp(max=logits.shape[-1] - 1)


def _first(tokenizer: Any, vocabulary: int) -> Tensor:
    """Tokens that a window may begin with."""
    if tokenizer is None:
        return torch.arange(vocabulary)
    special = set(tokenizer.all_special_ids)
    return torch.tensor([token for token in range(min(len(tokenizer), vocabulary)) if token not in special])


def _at_once(config: Any, seqlen: int, dtype: torch.dtype, room: int) -> int:
    """How many windows are written at once, a power of two: as many as have their keys and values in `room` bytes."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_window = 2 * config.num_hidden_layers * heads * width * seqlen * dtype.itemsize
    most = max(1, min(MOST, room // of_window))
    return 1 << (most.bit_length() - 1)
