"""Windowed: attention that reaches back a few tokens only, chunk by chunk, for as long as a model is trained.

    chunk c, as long as the window, sees chunks c - 1 and c;  all chunks at once, as rows of a batch

Given a mask, torch's attention goes through all keys, and where it shall add in a fixed order (fit/repeat.py), through
those of a head one after the other. A training row holds one text and no padding before it, so that the window says all
that the mask does. Knows nothing of quantizers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planish.attention import attending, configs_of

NAME = "planish_windowed"


@contextmanager
def windowed(model: nn.Module) -> Iterator[None]:
    """For as long as it lasts, a model or a block that asks for torch's attention takes its windows chunk by chunk."""
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    plain = [config for config in configs_of(model) if getattr(config, "_attn_implementation", None) == "sdpa"]
    with attending(plain, NAME):
        yield


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Of query [batch, heads, tokens, dim], key and value [batch, kv heads, tokens, dim]: [batch, tokens, heads, dim].

    Args:
        sliding_window: how many tokens one sees, itself among them; with none it is torch's attention, under the mask.
    """
    rows, _, length, _ = query.shape
    width = sliding_window or length
    if width >= length or key.shape[2] != length or not getattr(module, "is_causal", True):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    count = -(-length // width)
    queries = _as_rows(_chunks(query, count, width))
    keys, values = (_as_rows(_with_last(_chunks(part, count, width))) for part in (key, value))
    mask = _mask(count, width, query.device).repeat(rows, 1, 1).unsqueeze(1)
    output, _ = sdpa_attention_forward(module, queries, keys, values, mask, **kwargs)
    return output.unflatten(0, (rows, count)).flatten(1, 2)[:, :length], None


def _chunks(heads: Tensor, count: int, width: int) -> Tensor:
    """[batch, heads, tokens, dim] -> [batch, heads, count, width, dim], with zeros behind, which no token sees."""
    return functional.pad(heads, (0, 0, 0, count * width - heads.shape[2])).unflatten(2, (count, width))


def _with_last(chunks: Tensor) -> Tensor:
    """Each chunk behind the one before it: [batch, heads, count, 2 * width, dim]."""
    before = functional.pad(chunks[:, :, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat([before, chunks], dim=3)


def _as_rows(chunks: Tensor) -> Tensor:
    return chunks.transpose(1, 2).flatten(0, 1)


def _mask(count: int, width: int, device: torch.device) -> Tensor:
    """Which of two chunks' keys each query of the second sees: bool [count, width, 2 * width]."""
    key = torch.arange(2 * width, device=device)
    back = torch.arange(width, 2 * width, device=device).unsqueeze(1) - key
    seen = (back >= 0) & (back < width)
    return torch.cat([(seen & (key >= width)).unsqueeze(0), seen.expand(count - 1, -1, -1)])
