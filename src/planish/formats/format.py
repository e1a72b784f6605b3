"""Format: a pair of pure functions between QTensors and named tensors on disk, and the words around them.

A format knows nothing of models, methods or files: `encode` gives named tensors, `checkpoint` writes them. What it
moves are bit streams, which need no unpacking where a format keeps them as they are or transposes their words.
`check` runs before any work, so that what can't be held is refused early and by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from planish.bitstream import Stream
from planish.qtensor import QTensor
from planish.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Format:
    """One on-disk format.

    Args:
        name: as `--format` takes it.
        check: (layer, scheme, (out, in)) -> None; raises UnsupportedScheme naming the layer and why.
        write: (layer, Stream) -> tensors by full name ("model.layers.0.mlp.up_proj.qweight").
        read: (layer, tensors by full name, scheme, (out, in)) -> Stream; the exact inverse of write.
        config: {layer: Scheme, or None for a linear left in 16 bits} -> `quantization_config` of config.json;
            raises UnsupportedScheme if the format can't hold these layers beside each other.
        schemes: (`quantization_config`, {layer: (out, in)} of every linear) -> {layer: Scheme} of those that
            are quantized.
        detect: `quantization_config` -> is it this format's?
        bits: of codes. activations: whether it can say how those are rounded.
    """

    name: str
    check: Callable[[str, Scheme, tuple[int, int]], None]
    write: Callable[[str, Stream], dict[str, Tensor]]
    read: Callable[[str, Mapping[str, Tensor], Scheme, tuple[int, int]], Stream]
    config: Callable[[Mapping[str, Scheme | None]], dict[str, Any]]
    schemes: Callable[[Mapping[str, Any], Mapping[str, tuple[int, int]]], dict[str, Scheme]]
    detect: Callable[[Mapping[str, Any]], bool]
    bits: tuple[int, ...] = (2, 3, 4, 8)
    activations: bool = False

    def encode(self, layer: str, q: QTensor) -> dict[str, Tensor]:
        """Named tensors of one layer."""
        return self.write(layer, Stream.of(q))

    def decode(self, layer: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QTensor:
        """The QTensor that `encode` was given."""
        return self.read(layer, tensors, scheme, shape).qtensor()
