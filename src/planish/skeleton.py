"""Skeleton: a transformers model without its weights, and putting tensors into it one by one.

Parameters lie on the meta device; buffers (rotary frequencies and the like, which no checkpoint holds) are
real, as the model itself starts them. A configuration that would have more made than lies on disk is stopped
while that goes on. Knows nothing of files.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from planish.errors import PlanishError
from planish.experts import unfuse
from planish.guard import Stored, reading

# encoders that transformers makes language models of, filling tables of positions by loops of any length
_ENCODERS = ("marian", "pegasus", "roformer", "xlm")


class _Counted(TorchFunctionMode):
    """Stops what goes on inside after so many calls of torch: each layer takes some, however it came about."""

    def __init__(self, most: int, label: str) -> None:
        super().__init__()
        self.left, self.label = most, label

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise PlanishError(
                f"{self.label}: config.json makes a model of far more parts than there are tensors; "
                "get the checkpoint again"
            )
        return func(*args, **(kwargs or {}))


def build(
    config: PreTrainedConfig, dtype: torch.dtype, label: str, code: bool, stored: Stored | None = None
) -> PreTrainedModel:
    """The model, all of it on meta, fused experts taken apart: `start_buffers` is next.

    Args:
        stored: what its files hold, which bounds what is made.

    Raises:
        PlanishError: if transformers can't make a language model of it, or it would be out of all proportion.
    """
    if config.model_type in _ENCODERS:
        raise PlanishError(f"{label} is {config.model_type}, an encoder; give a decoder-only language model")
    with reading(f"{label}: transformers makes no language model of it", "check config.json"):
        refusals = []
        for auto in _classes(config):
            counted = nullcontext() if stored is None else _Counted(stored.calls, label)
            try:
                with torch.device("meta"), counted:
                    made = auto.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=code)
                    return unfuse(made)
            except PlanishError:
                raise
            except ValueError as error:
                refusals.append(error)
        raise refusals[0]


def start_buffers(model: PreTrainedModel, label: str, stored: Stored) -> None:
    """Put the buffers on the CPU, as the model itself starts them. Parameters must have been held against the disk:
    what a model computes at its start is no larger than those and its buffers.

    Raises:
        PlanishError: if the buffers are large beside what is stored, or can't be computed.
    """
    size = sum(buffer.nbytes for buffer in model.buffers() if buffer.is_meta)
    if size > stored.buffer_bytes:
        raise PlanishError(
            f"{label}: by config.json the model computes {size >> 20} MB of tables for itself, far more than "
            f"the {stored.bytes >> 20} MB that are stored; check its lengths and sizes"
        )
    for part in model.modules():
        missing = [(leaf, buffer) for leaf, buffer in part.named_buffers(recurse=False) if buffer.is_meta]
        for leaf, buffer in missing:
            setattr(part, leaf, torch.full_like(buffer, _poison(buffer.dtype), device="cpu"))
        # asks the model to start this module, and no other
        part._is_hf_initialized = not missing  # type: ignore[assignment]
    with reading(f"{label}: transformers can't start the model", "check config.json"):
        model.initialize_weights()


def _classes(config: PreTrainedConfig) -> tuple[Any, ...]:
    """Makers of models to try in turn: of a multimodal checkpoint the first makes its language model alone."""
    text, image = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    whole = image._model_mapping.get(type(config), None)
    return (image, text) if getattr(whole, "__name__", None) in (config.architectures or ()) else (text, image)


def _poison(dtype: torch.dtype) -> float | int:
    """A value no buffer holds, to see which ones the model didn't start."""
    if dtype.is_floating_point:
        return float("nan")
    return 0 if dtype == torch.bool else torch.iinfo(dtype).max


def is_unstarted(buffer: Tensor) -> bool:
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    return buffer.dtype != torch.bool and bool((buffer == _poison(buffer.dtype)).any())


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """In eval mode, without gradients and cache, with PyTorch's own attention where the model can."""
    model.eval().requires_grad_(False)
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    return model


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Name of every tied parameter -> all names of that parameter, the embedding's first."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}


def on_meta(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)
