"""What a configuration says of layers: one scheme for the linears of numbered blocks, and the exceptions.

Every format writes its scheme once and then names what differs. A linear lies in a block if a part of its
name is a number: model.layers.7.mlp.up_proj in a block of model.layers, lm_head in none. Knows nothing of
models: only names.
"""

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.scheme import Scheme


def block_of(layer: str) -> str | None:
    """'model.layers' for 'model.layers.7.mlp.up_proj', None for 'lm_head'."""
    match = re.match(r"(.+?)\.\d+\.", layer)
    return match[1] if match else None


def within_block(layer: str) -> str:
    """'mlp.up_proj' for 'model.layers.7.mlp.up_proj', the name itself for 'lm_head'."""
    return re.sub(r"^.+?\.\d+\.", "", layer)


def most_common(schemes: Mapping[str, Scheme | None]) -> Scheme:
    """The scheme of most layers, preferring those in blocks.

    Raises:
        PlanishError: if no layer is quantized.
    """
    in_blocks = [scheme for layer, scheme in schemes.items() if scheme and block_of(layer)]
    counted = Counter(in_blocks or [scheme for scheme in schemes.values() if scheme])
    if not counted:
        raise PlanishError("no layer is quantized; there is nothing to write a quantization_config for")
    return counted.most_common(1)[0][0]


def take(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One tensor of a checkpoint.

    Raises:
        PlanishError: if it is missing or has another shape or dtype.
    """
    if name not in tensors:
        raise PlanishError(f"{name} is missing; the checkpoint is incomplete or has another's config.json")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise PlanishError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}; "
            "the checkpoint is damaged or has another's config.json"
        )
    return tensor
