"""The native format: holds every QTensor, and is what unfinished runs are kept in.

Tensors of a layer X with weight [out, in] and G groups a row, named as QTensor names them:

    X.codes    int32 [out, ceil(in * bits / 32)]   bit stream along each row (see `pack`)
    X.scale    fp16  [out, G]
    X.zero     int32 [out, ceil(G * bits / 32)]    only if asymmetric; bit stream along each row
    X.offset   fp32  [out, G]                      only if the layer has one
    X.order    int32 [in]                          only if columns have an order of their own

    "quantization_config": {"quant_method": "planish", "format_version": 1, "scheme": "w2g64",
                            "layers": {"model.layers.0.mlp.down_proj": "w4g64", "lm_head": "w4pc"}}

`scheme` is that of every linear in a numbered block, `layers` names those that differ (null: left in 16
bits). Groups needn't divide a row.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from planish.bitstream import Stream, pack, unpack, words_for
from planish.errors import PlanishError
from planish.formats.format import Format
from planish.formats.layers import block_of, most_common, take
from planish.scheme import BITS, Scheme

METHOD = "planish"
VERSION = 1


def check(layer: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    """Everything fits."""


def write(layer: str, q: Stream) -> dict[str, Tensor]:
    """Named tensors of one layer."""
    tensors = {f"{layer}.codes": q.codes, f"{layer}.scale": q.scale.contiguous()}
    if q.zero is not None:
        tensors[f"{layer}.zero"] = pack(q.zero, q.bits, 1)
    if q.offset is not None:
        tensors[f"{layer}.offset"] = q.offset.contiguous()
    if q.order is not None:
        tensors[f"{layer}.order"] = q.order.contiguous()
    return tensors


def read(layer: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Stream:
    """The stream that `write` was given.

    Raises:
        PlanishError: if a tensor is missing or isn't what the scheme and shape promise.
    """
    out_features, in_features = shape
    bits, grid = scheme.bits, (out_features, scheme.groups_in(in_features))
    words = take(tensors, f"{layer}.codes", (out_features, words_for(in_features, bits)), torch.int32)
    zero = None
    if not scheme.symmetric:
        packed = take(tensors, f"{layer}.zero", (out_features, words_for(grid[1], bits)), torch.int32)
        zero = unpack(packed, bits, 1, grid[1])
    has_offset = f"{layer}.offset" in tensors
    order = take(tensors, f"{layer}.order", (in_features,), torch.int32) if f"{layer}.order" in tensors else None
    every = torch.arange(in_features, dtype=torch.int32)
    if order is not None and not torch.equal(order.sort().values.cpu(), every):
        raise PlanishError(f"{layer}.order doesn't name each column once; the checkpoint is damaged")
    return Stream(
        codes=words,
        scale=take(tensors, f"{layer}.scale", grid, torch.float16),
        zero=zero,
        offset=take(tensors, f"{layer}.offset", grid, torch.float32) if has_offset else None,
        bits=bits,
        group_size=scheme.group_in(in_features),
        in_features=in_features,
        order=order,
    )


def config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """`quantization_config`: one scheme and the layers that differ from it."""
    default = most_common(schemes)
    layers = {
        layer: None if scheme is None else str(scheme)
        for layer, scheme in schemes.items()
        if scheme != (default if block_of(layer) else None)
    }
    return {"quant_method": METHOD, "format_version": VERSION, "scheme": str(default), "layers": layers}


def schemes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Scheme]:
    """Scheme of every quantized linear.

    Raises:
        PlanishError: if the configuration is of a later version or names a layer that the model hasn't.
    """
    if config.get("format_version") != VERSION or "scheme" not in config:
        raise PlanishError(
            f"quantization_config has format_version {config.get('format_version')!r} and this Planish reads "
            f"{VERSION}; upgrade Planish"
        )
    layers = config.get("layers", {})
    for layer in layers:
        if layer not in shapes:
            raise PlanishError(f"quantization_config names {layer!r}, but the model has none")
    texts = {layer: layers.get(layer, config["scheme"] if block_of(layer) else None) for layer in shapes}
    return {layer: Scheme.parse(text) for layer, text in texts.items() if text is not None}


def detect(config: Mapping[str, Any]) -> bool:
    """Is this configuration the native format's?"""
    return config.get("quant_method") == METHOD


native = Format(
    name="native", check=check, write=write, read=read, config=config, schemes=schemes, detect=detect,
    bits=BITS, activations=True,
)  # fmt: skip
