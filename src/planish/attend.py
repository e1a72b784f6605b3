"""A model's attention while a step of decoding runs: one query a row, over all that a static cache holds.

Registered with transformers under a name of its own, and taken by a model's configuration for as long as a step lasts.
Blocks are then given their layer of the cache as `room`, which they hand on to the attention; the new token's key and
value are written by the kernel that reads the cache (kernels/cuda_attend.py), and no mask is built. Where a model asks
for a mask that isn't plainly causal, it gets that one and torch's attention. Knows nothing of graphs and weights.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planish.attention import attending, configs_of
from planish.kernels.cuda_attend import attend_one, supports

NAME = "planish_one"


class Room:
    """A layer of a static cache as a block sees it, whatever number it asks for, which would be compiled in.

    Args:
        layer: of a StaticCache.
    Attributes:
        waits: whether what is new is left to the attention to write, and to whoever runs the step to count.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.waits = layer, False

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return (keys, values) if self.waits else self.layer.update(keys, values, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.layer.get_seq_length()


def takes(model: PreTrainedModel, blocks: nn.ModuleList, layer: Any) -> bool:
    """Whether a model's blocks can have this attention: they take sdpa by name, hand on what they are given, and the
    kernel reads their cache, of which `layer` is one that has been filled."""
    if type(layer) is not StaticLayer or not model._supports_attention_backend:
        return False
    configs = configs_of(blocks)
    named = all(getattr(config, "_attn_implementation", None) == "sdpa" for config in configs)
    causal = all(getattr(config, "is_causal", True) for config in configs)
    handing = all(_hands_on(part) for block in blocks for part in (block, *_configured(block)) if _attends(part))
    known = supports(layer.device, layer.dtype, layer.k_head_dim, layer.v_head_dim)
    return bool(configs) and named and causal and handing and known


@contextmanager
def one_query(model: PreTrainedModel) -> Iterator[None]:
    """For as long as it lasts, the model's attention is this one."""
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
    with attending(configs_of(model), NAME):
        yield


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    room: Room,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Of query [batch, heads, 1, dim], with key and value of the new token alone: [batch, 1, heads, dim]."""
    layer = room.layer
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        return attend_one(query, key, value, layer.keys, layer.values, layer.cumulative_length, scaling), None
    place = layer.cumulative_length.view(1)
    keys, values = layer.keys.index_copy_(2, place, key), layer.values.index_copy_(2, place, value)
    return sdpa_attention_forward(module, query, keys, values, attention_mask, scaling=scaling, **kwargs)


def _mask(*, mask_function: Any, attention_mask: Tensor | None = None, **asked: Any) -> Tensor | None:
    """None where it is plainly causal: a cache has nothing else than what comes before the one query."""
    if mask_function is causal_mask_function and attention_mask is None:
        return None
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **asked)


def _configured(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if hasattr(part, "config")]


def _attends(part: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(part.forward).parameters


def _hands_on(part: nn.Module) -> bool:
    return any(given.kind is given.VAR_KEYWORD for given in inspect.signature(part.forward).parameters.values())
