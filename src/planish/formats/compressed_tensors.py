"""compressed-tensors, `pack-quantized`: what vLLM and SGLang load, and transformers with compressed-tensors.

Tensors of a layer X with weight [out, in] and G groups a row (bit streams as in `pack`):

    X.weight_packed      int32 [out, ceil(in * bits / 32)]   codes, packed along `in`
    X.weight_scale       fp16  [out, G]
    X.weight_zero_point  int32 [ceil(out * bits / 32), G]    only if asymmetric; packed along `out`
    X.weight_shape       int64 [2]                           out, in

Its words speak of signed codes and zero points, Q - 2^(bits-1), and store them with 2^(bits-1) added: our own
unsigned ones. All groups have the same length. Before its version 0.18 codes of 3 bits lay ten in a word; that
layout has no name of its own, is known by its width, and is refused.

    "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
                            "quantization_status": "compressed", "ignore": [...],
                            "config_groups": {"group_0": {"targets": [...], "weights": {...}}}}

A target is a layer's name, a regex after "re:", or a class. We write names: no class can say which linears of a
vision tower stay in 16 bits, and vLLM compares a layer's class before the parts of a fused layer.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from planish.bitstream import Stream, pack, unpack, words_for
from planish.errors import PlanishError
from planish.formats.format import Format
from planish.formats.gptq import check_groups, in_order, read_order, scheme_of, take_scale
from planish.formats.layers import most_common, take
from planish.guard import Patterns
from planish.scheme import Activations, Scheme

NAME = "compressed_tensors"
METHOD, PACKED, INT = "compressed-tensors", "pack-quantized", "int-quantized"
HEAD, CLASS = "re:.*lm_head$", "Linear"


def check(layer: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    """Raise UnsupportedScheme if the groups of a row aren't of one length."""
    check_groups(NAME, layer, scheme, shape[1])


def write(layer: str, q: Stream) -> dict[str, Tensor]:
    """Named tensors of one layer."""
    check(layer, scheme_of(NAME, layer, q), q.shape)
    tensors = {
        f"{layer}.weight_packed": q.codes,
        f"{layer}.weight_scale": q.scale.contiguous(),
        f"{layer}.weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero is not None:
        tensors[f"{layer}.weight_zero_point"] = pack(q.zero, q.bits, 0)
    return tensors


def read(layer: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Stream:
    """The stream of one layer.

    Raises:
        PlanishError: if a tensor is missing or isn't what the scheme and shape promise, a scale has no fp16, or
            codes lie in the padded layout.
    """
    check(layer, scheme, shape)
    (out_features, in_features), bits = shape, scheme.bits
    group, grid = scheme.group_in(in_features), (out_features, scheme.groups_in(in_features))
    _refuse_padded(layer, tensors, bits, in_features)
    words = take(tensors, f"{layer}.weight_packed", (out_features, words_for(in_features, bits)), torch.int32)
    said = take(tensors, f"{layer}.weight_shape", (2,), torch.int64).tolist()
    if said != [out_features, in_features]:
        raise PlanishError(f"{layer}.weight_shape says {said}, not {list(shape)}; the checkpoint is damaged")
    zero = None
    if not scheme.symmetric:
        packed_grid = words_for(out_features, bits), grid[1]
        zero = unpack(take(tensors, f"{layer}.weight_zero_point", packed_grid, torch.int32), bits, 0, out_features)
    order = read_order(tensors, f"{layer}.weight_g_idx", in_features, group)
    return Stream(
        codes=words if order is None else in_order(words, bits, in_features, order),
        scale=take_scale(tensors, f"{layer}.weight_scale", grid),
        zero=zero,
        bits=bits,
        group_size=group,
        order=order,
        in_features=in_features,
    )


def _refuse_padded(layer: str, tensors: Mapping[str, Tensor], bits: int, in_features: int) -> None:
    """Refuse the layout that leaves the bits of a word unused that don't make a whole code."""
    found, padded = tensors.get(f"{layer}.weight_packed"), -(-in_features // (32 // bits))
    if found is not None and found.shape[-1] == padded != words_for(in_features, bits):
        raise PlanishError(
            f"{layer}.weight_packed holds {32 // bits} codes of {bits} bits a word, as {METHOD} wrote them "
            "before 0.18; quantize the model with a newer one"
        )


def config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """`quantization_config`: a group for each scheme, its layers by name."""
    most_common(schemes)  # refuses a model without any
    layers_of: dict[Scheme, list[str]] = {}
    for layer, scheme in schemes.items():
        if scheme is not None:
            layers_of.setdefault(scheme, []).append(layer)
    ignored = [layer for layer, scheme in schemes.items() if scheme is None]
    head = [] if any(re.match(HEAD[3:], layer) for layer in schemes) else [HEAD]
    return {
        "quant_method": METHOD,
        "format": PACKED,
        "quantization_status": "compressed",
        "ignore": ignored + head,
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{index}": _entry(scheme, layers) for index, (scheme, layers) in enumerate(layers_of.items())
        },
    }


def _entry(scheme: Scheme, layers: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": layers,
        "format": PACKED,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


def schemes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Scheme]:
    """Scheme of every quantized linear. A name goes before a regex, and that before a class.

    Raises:
        PlanishError: for another format than `pack-quantized`, quantized activations or KV cache, sparse or
            rotated weights, or anything else that isn't integer codes in groups or channels.
    """
    return schemes_of_format(config, shapes, PACKED, _no_activations)


def schemes_of_format(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    format: str,
    activations: Callable[[str, Mapping[str, Any]], Activations | None],
) -> dict[str, Scheme]:
    """The same for any of compressed-tensors' formats of integers; `activations` reads how a group's are rounded."""
    _refuse_more(config)
    groups = {target: group for group in config.get("config_groups", {}).values() for target in _targets(group)}
    ignore = config.get("ignore") or ()
    found, regexes = {}, Patterns()
    for layer in shapes:
        target = None if _match(layer, ignore, regexes) else _match(layer, groups, regexes)
        if target is not None:
            group = {"format": config.get("format"), **_said(groups[target])}
            found[layer] = dataclasses.replace(_readable(layer, group, format), activations=activations(layer, group))
    return found


def _targets(group: Any) -> list[str]:
    if not isinstance(group, Mapping) or "weights" not in group:
        raise PlanishError("a group of quantization_config's config_groups has no weights; write them out")
    return group["targets"]


def _said(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if value is not None}


def _match(layer: str, targets: Mapping[str, Any] | list[str] | tuple[str, ...], regexes: Patterns) -> str | None:
    """The target that a linear's name is, or the first regex that matches it from its start, or its class."""
    if layer in targets:
        return layer
    found = next((t for t in targets if t.startswith("re:") and regexes.match(t[3:], layer)), None)
    return CLASS if found is None and CLASS in targets else found


def _refuse_more(config: Mapping[str, Any]) -> None:
    """What concerns the model as a whole and would change what its layers compute."""
    status = config.get("quantization_status") or "compressed"
    refused = {
        f"weights of status {status!r}": status != "compressed",
        "a quantized KV cache": config.get("kv_cache_scheme"),
        "sparse weights": (config.get("sparsity_config") or {}).get("format") not in (None, "dense"),
        "transformed weights": (config.get("transform_config") or {}).get("config_groups"),
    }
    for what, there in refused.items():
        if there:
            raise PlanishError(f"the model has {what} ({METHOD}), which Planish doesn't read; quantize the original")


def _readable(layer: str, group: Mapping[str, Any], format: str) -> Scheme:
    weights = _said(group["weights"])
    bits, size, kind = weights.get("num_bits", 8), weights.get("group_size"), weights.get("type", "int")
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
    if group["format"] != format or kind != "int" or strategy not in ("group", "channel"):
        raise PlanishError(
            f"{layer} is stored as {group['format']!r} ({bits}-bit {kind}, a scale for each {strategy}); of {METHOD} "
            f"Planish reads only {format!r} integers in groups or channels"
        )
    return Scheme(bits=bits, group_size=size if strategy == "group" else None, symmetric=weights.get("symmetric", True))


def _no_activations(layer: str, group: Mapping[str, Any]) -> None:
    if "input_activations" in group or "output_activations" in group:
        raise PlanishError(
            f"{layer} has quantized activations beside packed weights ({METHOD}); Planish reads only 16-bit ones there"
        )


def detect(config: Mapping[str, Any]) -> bool:
    """Is this configuration compressed-tensors', and none of `int_quantized`?"""
    return config.get("quant_method") == METHOD and config.get("format") != INT


compressed_tensors = Format(
    name=NAME, check=check, write=write, read=read, config=config, schemes=schemes, detect=detect
)
