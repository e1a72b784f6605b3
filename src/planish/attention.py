"""Attention whose query, key and value are rounded, each head of a token by its own range (a KV cache of few bits).

Registered with transformers under a name of its own, planish_kv4, beside its own functions, which stay as they are;
a model takes it by its configuration, as it takes sdpa. Rounding comes after rotary embeddings, and what lies in a
cache is what came in: a token's values are the same however it came there. While blocks are fitted it is taken for
as long as they are. Turned by one Hadamard matrix, query and key keep their products and lose outliers (R3 of
QuaRot, arXiv 2404.00456). Knows nothing of weights.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planish.errors import PlanishError
from planish.quant.activation import fake_quantize_tokens
from planish.scheme import Activations, Scheme


def heads_of(schemes: Mapping[str, Scheme]) -> Activations | None:
    """How heads are rounded (turned: query and key only); None if they aren't.

    Raises:
        PlanishError: if not alike in all layers.
    """
    found = {
        Activations(bits=how.kv_bits, symmetric=how.symmetric, turned=how.kv_turned)
        for scheme in schemes.values()
        if (how := scheme.activations) and how.kv_bits < 16
    }
    if len(found) > 1:
        raise PlanishError("query, key and value are rounded alike in all layers; give one kv in all schemes")
    return next(iter(found), None)


def check_heads(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> None:
    """Refuse a model whose attention can't be another one.

    Raises:
        PlanishError: if it can't, or schemes don't agree.
    """
    if heads_of(schemes) and not model._can_set_attn_implementation():
        raise PlanishError(
            f"{type(model).__name__} has an attention of its own, whose query, key and value can't be rounded; "
            "drop the kv of the scheme"
        )


def name_of(how: Activations) -> str:
    """The name of the attention that rounds heads so, registered by now."""
    name = f"planish_kv{how.bits}{'s' * how.symmetric}{'h' * how.turned}"
    plain = dataclasses.replace(how, turned=False)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        # values are turned in their weights, if at all: see `transform.rotate`
        ways = ((query, how), (key, how), (value, plain))
        rounded: Any = [fake_quantize_tokens(heads, way) for heads, way in ways]
        return sdpa_attention_forward(module, *rounded, *args, **kwargs)

    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    return name


def install(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> None:
    """Let a model round its heads, if schemes say so."""
    if how := heads_of(schemes):
        check_heads(model, schemes)
        model.set_attn_implementation(name_of(how))


@contextmanager
def rounded_heads(blocks: Iterable[nn.Module], schemes: Mapping[str, Scheme]) -> Iterator[None]:
    """Blocks round their heads, if schemes say so, for as long as it lasts."""
    how = heads_of(schemes)
    with attending(configs_of(*blocks), name_of(how)) if how else nullcontext():
        yield


def configs_of(*modules: nn.Module) -> list[Any]:
    """Each configuration that a part of these goes by, once."""
    parts: list[Any] = [part for module in modules for part in module.modules() if hasattr(part, "config")]
    return [*{id(part.config): part.config for part in parts}.values()]


@contextmanager
def attending(configs: Sequence[Any], name: str) -> Iterator[None]:
    """What goes by these takes the attention of that name, for as long as it lasts."""
    kept = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, was in zip(configs, kept, strict=True):
            config._attn_implementation = was
