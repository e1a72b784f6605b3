"""Windowed: attention that reaches back a few tokens only, chunk by chunk, for as long as a model is trained.

    chunk c, as long as the window, sees chunks c - 1 and c;  all chunks at once, as rows of a batch

Under a mask torch's fused attention goes through all keys: fitting Gemma 3's blocks on rows of 2048 tokens takes more
than twice as long. So these are plain products and a softmax, whose scores, in fp32, take room. A training row holds
one text and no padding before it, so that the window says all that the mask does.
Knows nothing of quantizers.
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
OTHERS = ("softcap", "position_bias", "s_aux")  # what some models add to their scores


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
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Of query [batch, heads, tokens, dim], key and value [batch, kv heads, tokens, dim]: [batch, tokens, heads, dim].

    Args:
        sliding_window: how many tokens one sees, itself among them; with none it is torch's attention, under the mask.
    """
    length, heads = query.shape[2], key.shape[1]
    width = sliding_window or length
    asked = kwargs.get("is_causal")
    causal = (getattr(module, "is_causal", True) if asked is None else asked) and key.shape[2] == length
    if width >= length or not causal or dropout > 0 or any(kwargs.get(name) is not None for name in OTHERS):
        how = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    count = -(-length // width)
    queries = _chunks(query, count, width).unflatten(1, (heads, -1)).movedim(3, 2).flatten(3, 4)
    keys, values = (_with_last(_chunks(part, count, width)) for part in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # [batch, kv heads, count, queries of all heads that share keys, keys]
    scores = (queries.float() * scaling) @ keys.float().transpose(-1, -2)
    seen = _mask(count, width, query.device).unsqueeze(1)
    shares = scores.unflatten(3, (-1, width)).masked_fill(~seen, float("-inf")).softmax(-1).to(value.dtype)
    output = (shares.flatten(3, 4) @ values).unflatten(3, (-1, width))
    return output.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)[:, :length].contiguous(), None


def _chunks(heads: Tensor, count: int, width: int) -> Tensor:
    """[batch, heads, tokens, dim] -> [batch, heads, count, width, dim], with zeros behind, which no token sees."""
    return functional.pad(heads, (0, 0, 0, count * width - heads.shape[2])).unflatten(2, (count, width))


def _with_last(chunks: Tensor) -> Tensor:
    """Each chunk behind the one before it: [batch, heads, count, 2 * width, dim]."""
    before = functional.pad(chunks[:, :, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat([before, chunks], dim=3)


def _mask(count: int, width: int, device: torch.device) -> Tensor:
    """Which of two chunks' keys each query of the second sees: bool [count, width, 2 * width]."""
    key = torch.arange(2 * width, device=device)
    back = torch.arange(width, 2 * width, device=device).unsqueeze(1) - key
    seen = (back >= 0) & (back < width)
    return torch.cat([(seen & (key >= width)).unsqueeze(0), seen.expand(count - 1, -1, -1)])
