"""AutoRound's format: what auto-round loads in transformers on any device, and vLLM if symmetric.

Tensors are GPTQ's (see `gptq`) without g_idx. How zero points are stored is said once for the model, by
`packing_format`: symmetric models are `auto_round:auto_gptq` (z - 1, as auto-round itself writes them and
vLLM expects), asymmetric ones `auto_round` (z as it is; z = 0 exists). So a model is all one or the other.

    "quantization_config": {"quant_method": "auto-round", "packing_format": ..., "bits", "group_size", "sym",
                            "data_type": "int", "block_name_to_quantize": "model.layers",
                            "extra_config": {"model.layers.0.mlp.down_proj": {"bits": 4, ...}}}

All linears whose name starts with `block_name_to_quantize` are quantized but for those of `extra_config`
with 16 bits; `extra_config` also holds mixed bits and layers outside of blocks. auto-round's loader has
no backend for groups that don't divide a row, or for rows and columns not in multiples of 32.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from planish.bitstream import Stream
from planish.errors import PlanishError, UnsupportedScheme
from planish.formats.format import Format
from planish.formats.gptq import check_layout, read_layout, scheme_from, scheme_of, write_layout
from planish.formats.layers import block_of, most_common
from planish.guard import Patterns
from planish.scheme import Scheme

NAME = "auto_round"
# packing_format by symmetry; the first is what we write, the others are its aliases
PACKING = {
    True: ("auto_round:auto_gptq", "auto_round:gptq"),
    False: ("auto_round", "auto_round:gptqmodel"),
}


def write(layer: str, q: Stream) -> dict[str, Tensor]:
    """Named tensors of one layer."""
    check_layout(NAME, layer, scheme_of(NAME, layer, q), q.shape)
    return write_layout(layer, q, shift=int(q.symmetric))


def read(layer: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Stream:
    """The stream of one layer."""
    check_layout(NAME, layer, scheme, shape)
    return read_layout(layer, tensors, scheme, shape, shift=int(scheme.symmetric))


def config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """`quantization_config`; refuses a model that is part symmetric, part not."""
    default = most_common(schemes)
    blocks = sorted({block for layer, scheme in schemes.items() if scheme and (block := block_of(layer))})
    extra = {}
    for layer, scheme in schemes.items():
        if scheme is None:
            if block_of(layer) in blocks:
                extra[layer] = {"bits": 16}
            continue
        if scheme.symmetric != default.symmetric:
            raise UnsupportedScheme(
                f"{layer}: {NAME} can't hold {scheme} beside {default}; "
                "make all layers symmetric or all asymmetric, or use --format native"
            )
        if scheme != default or block_of(layer) is None:
            extra[layer] = _entry(scheme)
    written = {
        "quant_method": "auto-round",
        "packing_format": PACKING[default.symmetric][0],
        **_entry(default),
        "block_name_to_quantize": blocks[0] if len(blocks) == 1 else blocks,
    }
    return written | ({"extra_config": extra} if extra else {})


def _entry(scheme: Scheme) -> dict[str, Any]:
    group = -1 if scheme.group_size is None else scheme.group_size
    return {"bits": scheme.bits, "group_size": group, "sym": scheme.symmetric, "data_type": "int"}


def schemes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Scheme]:
    """Scheme of every quantized linear.

    Raises:
        PlanishError: if the model has float types, quantized activations, or a packing that isn't GPTQ's.
    """
    blocks = config.get("block_name_to_quantize")
    starts = tuple(blocks.split(",")) if isinstance(blocks, str) else tuple(blocks or ())
    found, regexes = {}, Patterns()
    for layer in shapes:
        entry = _exception(config.get("extra_config") or {}, layer, shapes, regexes)
        in_block = layer.startswith(starts) if blocks is not None else block_of(layer) is not None
        merged = {**config, **(entry or {})}
        if (entry is None and not in_block) or int(merged.get("bits") or 16) >= 16:
            continue
        found[layer] = _readable(layer, merged, config.get("packing_format"))
    return found


def _exception(
    extra: Mapping[str, Mapping[str, Any]], layer: str, shapes: Mapping[str, tuple[int, int]], regexes: Patterns
) -> Mapping[str, Any] | None:
    """Entry of `extra_config` for a layer: its own name's, or the first that as a regex is found in it."""
    if layer in extra:
        return extra[layer]
    patterns = (key for key in extra if key not in shapes)
    return next((extra[key] for key in patterns if regexes.search(key, layer)), None)


def _readable(layer: str, entry: Mapping[str, Any], packing: str | None) -> Scheme:
    scheme = scheme_from(entry)
    if entry.get("data_type", "int") != "int" or int(entry.get("act_bits") or 16) < 16:
        raise PlanishError(f"{layer}: Planish reads only integer weights with 16-bit activations")
    if packing not in PACKING[scheme.symmetric]:
        known = " and ".join(PACKING[scheme.symmetric])
        raise PlanishError(f"{layer}: {scheme} is packed as {packing!r}; Planish reads only {known}")
    return scheme


def detect(config: Mapping[str, Any]) -> bool:
    """Is this configuration AutoRound's?"""
    return "auto-round" in str(config.get("quant_method"))


auto_round = Format(
    name=NAME,
    check=partial(check_layout, NAME),
    write=write,
    read=read,
    config=config,
    schemes=schemes,
    detect=detect,
)
