"""Format: a pair of pure functions between QTensors and named tensors on disk, and the words around them.

A format knows nothing of models, methods or files: `encode` gives named tensors, `checkpoint` writes them.
`check` runs before any work, so that what can't be held is refused early and by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from planish.qtensor import QTensor
from planish.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Format:
    """One on-disk format.

    Args:
        name: as `--format` takes it.
        check: (layer, scheme, (out, in)) -> None; raises UnsupportedScheme naming the layer and why.
        encode: (layer, QTensor) -> tensors by full name ("model.layers.0.mlp.up_proj.qweight").
        decode: (layer, tensors by full name, scheme, (out, in)) -> QTensor; the exact inverse of encode.
        config: {layer: Scheme, or None for a linear left in 16 bits} -> `quantization_config` of config.json;
            raises UnsupportedScheme if the format can't hold these layers beside each other.
        schemes: (`quantization_config`, {layer: (out, in)} of every linear) -> {layer: Scheme} of those that
            are quantized.
        detect: `quantization_config` -> is it this format's?
    """

    name: str
    check: Callable[[str, Scheme, tuple[int, int]], None]
    encode: Callable[[str, QTensor], dict[str, Tensor]]
    decode: Callable[[str, Mapping[str, Tensor], Scheme, tuple[int, int]], QTensor]
    config: Callable[[Mapping[str, Scheme | None]], dict[str, Any]]
    schemes: Callable[[Mapping[str, Any], Mapping[str, tuple[int, int]]], dict[str, Scheme]]
    detect: Callable[[Mapping[str, Any]], bool]
