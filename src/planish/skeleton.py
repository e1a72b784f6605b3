"""Skeleton: a transformers model without its weights, and putting tensors into it one by one.

Parameters lie on the meta device; buffers (rotary frequencies and the like, which no checkpoint holds) are
real, as the model itself starts them. Knows nothing of files.
"""

import copy
from collections import defaultdict
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from planish.errors import PlanishError, first_line


def build(config: PreTrainedConfig, dtype: torch.dtype, label: str, code: bool) -> PreTrainedModel:
    """The model on meta; then its buffers again on the CPU, as the model itself starts them."""
    autos = _classes(config)
    for auto in autos:
        try:
            with torch.device("meta"):
                model = auto.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=code)
            break
        except ValueError as error:
            if auto is autos[-1]:
                raise PlanishError(
                    f"{label}: transformers makes no language model of it ({first_line(error)})"
                ) from error
    for part in model.modules():
        for leaf, buffer in list(part.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(part, leaf, torch.full_like(buffer, _poison(buffer.dtype), device="cpu"))
                part._is_hf_initialized = False  # asks the model to start this module, and no other, again
    model.initialize_weights()
    return model


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
