"""GPTQ's format: what GPTQModel, vLLM, SGLang and, with optimum, transformers load.

Tensors of a layer X with weight [out, in], groups of g and G = in / g (bit streams as in `pack`):

    X.qweight  int32 [in * bits / 32, out]   codes, packed along `in`
    X.qzeros   int32 [G, out * bits / 32]    zero points, packed along `out`
    X.scales   fp16  [G, out]
    X.g_idx    int32 [in]                    group of each column: i // g but for others' act-order models

Two dialects: `gptq` (v1) stores z - 1 and its readers add 1; `gptq_v2` stores z. Where a z is 0, v1's writers
differ (the borrow goes into the next field, or it doesn't, or z becomes 1) and so do its readers. Any z may occur
in an asymmetric layer and only its scheme is known before the work, so we write symmetric layers only in v1.
We read what GPTQModel writes: it subtracts from whole words, all but 3 bits, and adding undoes that exactly.
One scheme for all layers: transformers ignores GPTQModel's per-layer overrides and would read garbage.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from planish.bitstream import WORD, Stream, pack, unpack
from planish.errors import PlanishError, UnsupportedScheme
from planish.formats.format import Format
from planish.formats.layers import block_of, most_common, take, within_block
from planish.guard import Patterns
from planish.qtensor import midpoint, own_columns
from planish.scheme import Scheme


def check_layout(name: str, layer: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    """Raise UnsupportedScheme if the tensors above can't hold this layer in format `name`."""
    out_features, in_features = shape
    if out_features % WORD or in_features % WORD:
        raise UnsupportedScheme(
            f"{layer}: {name} needs outputs and inputs in multiples of {WORD}, "
            f"not {out_features} x {in_features}; use --format native"
        )
    check_groups(name, layer, scheme, in_features)


def check_groups(name: str, layer: str, scheme: Scheme, in_features: int) -> None:
    """Raise UnsupportedScheme if the last group of a row would be shorter."""
    group = scheme.group_in(in_features)
    if in_features % group:
        divides = next(
            (f"a group that divides them, such as {g}" for g in (128, 64, 32, 8) if in_features % g == 0), "pc"
        )
        raise UnsupportedScheme(
            f"{layer}: {name} can't hold groups of {group} that don't divide its {in_features} inputs; "
            f"use --format native, or {divides}"
        )


def write_layout(layer: str, q: Stream, shift: int) -> dict[str, Tensor]:
    """qweight, qzeros and scales of one layer, columns in the weight's own order; of a zero point z, z - shift."""
    zero = torch.full_like(q.scale, midpoint(q.bits), dtype=torch.uint8) if q.zero is None else q.zero
    words = q.codes
    if q.order is not None:
        words = pack(own_columns(unpack(words, q.bits, 1, q.in_features), q.order), q.bits, 1)
    return {
        f"{layer}.qweight": words.T.contiguous(),
        f"{layer}.qzeros": pack((zero - shift).T, q.bits, 1),
        f"{layer}.scales": q.scale.T.contiguous(),
    }


def read_layout(
    layer: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], shift: int
) -> Stream:
    """One layer whose stored zero points are z - shift.

    Raises:
        PlanishError: if a tensor is missing or isn't what the scheme and shape promise, or a scale has no fp16.
    """
    out_features, in_features = shape
    bits, group = scheme.bits, scheme.group_in(in_features)
    groups = in_features // group
    qweight = take(tensors, f"{layer}.qweight", (in_features * bits // WORD, out_features), torch.int32)
    qzeros = take(tensors, f"{layer}.qzeros", (groups, out_features * bits // WORD), torch.int32)
    scales = take_scale(tensors, f"{layer}.scales", (groups, out_features))
    if shift and WORD % bits == 0:
        qzeros, shift = qzeros + sum(1 << low for low in range(0, WORD, bits)), 0
    zero = unpack(qzeros, bits, 1, out_features).T.to(torch.int16) + shift
    if int(zero.max()) >= 2**bits or (scheme.symmetric and not bool((zero == midpoint(bits)).all())):
        raise PlanishError(f"{layer}.qzeros holds zero points that {scheme} can't have; check config.json")
    order = read_order(tensors, f"{layer}.g_idx", in_features, group)
    words = qweight.T.contiguous()
    return Stream(
        codes=words if order is None else in_order(words, bits, in_features, order),
        scale=scales.T.contiguous(),
        zero=None if scheme.symmetric else zero.to(torch.uint8).contiguous(),
        bits=bits,
        group_size=group,
        order=order,
        in_features=in_features,
    )


def in_order(words: Tensor, bits: int, in_features: int, order: Tensor) -> Tensor:
    """A stream [out, ...] with its columns put in an order."""
    return pack(unpack(words, bits, 1, in_features).index_select(1, order), bits, 1)


def read_order(tensors: Mapping[str, Tensor], name: str, in_features: int, group: int) -> Tensor | None:
    """The order of columns, int32 [in], by each one's group; None if they lie in order or there is no such tensor.

    Raises:
        PlanishError: if the groups don't have `group` columns each.
    """
    if name not in tensors:
        return None
    g_idx = take(tensors, name, (in_features,), torch.int32)
    plain = torch.arange(in_features, device=g_idx.device) // group
    if torch.equal(g_idx, plain):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], plain):
        raise PlanishError(f"{name} has groups that aren't of {group} columns; check group_size in config.json")
    return order.int()


def group_index(name: str, layer: str, q: Stream) -> Tensor:
    """g_idx int32 [in]; refuses an order that `read_order` wouldn't find again."""
    plain = torch.arange(q.shape[1], dtype=torch.int32, device=q.codes.device) // q.group_size
    if q.order is None:
        return plain
    g_idx = plain[torch.argsort(q.order)]
    found = read_order({"g_idx": g_idx}, "g_idx", q.shape[1], q.group_size)
    if found is None or not torch.equal(found, q.order):
        raise UnsupportedScheme(f"{layer}: {name} can't hold this order of columns; use --format native")
    return g_idx


def take_scale(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """A scale of a checkpoint as fp16; bf16 and fp32 are read where every value has an fp16.

    Raises:
        PlanishError: if it is missing, has another shape or dtype, or a value without an fp16.
    """
    found = tensors[name].dtype if name in tensors else torch.float16
    wide = found in (torch.bfloat16, torch.float32)
    scale = take(tensors, name, shape, found if wide else torch.float16)
    if not torch.equal(scale.half().to(found), scale):
        raise PlanishError(f"{name} has {found} values that fp16 can't hold; quantize the 16-bit original instead")
    return scale.half()


def scheme_of(name: str, layer: str, q: Stream, *, ordered: bool = False) -> Scheme:
    """The Scheme of a layer; refuses an offset, which only the native format holds, and unless `ordered` an order
    of columns."""
    if q.order is not None and not ordered:
        raise UnsupportedScheme(f"{layer}: {name} can't hold columns in another order; use --format native")
    if q.offset is not None:
        raise UnsupportedScheme(f"{layer}: {name} can't hold offsets in weight units; use --format native")
    return q.scheme


def check(name: str, layer: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    """Raise UnsupportedScheme if dialect `name` can't hold the layer."""
    check_layout(name, layer, scheme, shape)
    if block_of(layer) is None:
        raise UnsupportedScheme(
            f"{layer}: {name} holds only linears of numbered blocks; use --format auto_round, or --ignore it"
        )
    if name == "gptq" and not scheme.symmetric:
        raise UnsupportedScheme(
            f"{layer}: {scheme} may have the zero point 0, which gptq lacks; use gptq_v2 or auto_round"
        )


def write(name: str, shift: int, layer: str, q: Stream) -> dict[str, Tensor]:
    """Named tensors of one layer."""
    check(name, layer, scheme_of(name, layer, q, ordered=True), q.shape)
    return write_layout(layer, q, shift) | {f"{layer}.g_idx": group_index(name, layer, q)}


def read(
    name: str, shift: int, layer: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
) -> Stream:
    """The stream of one layer, its columns sorted by their groups."""
    check_layout(name, layer, scheme, shape)
    return read_layout(layer, tensors, scheme, shape, shift)


def config(name: str, schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """`quantization_config`; a linear left in 16 bits must be so in every block."""
    default = most_common(schemes)
    for layer, scheme in schemes.items():
        if scheme not in (None, default):
            raise UnsupportedScheme(f"{layer}: {name} can't hold {scheme} beside {default}; use --format auto_round")
    written: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": default.bits,
        "group_size": -1 if default.group_size is None else default.group_size,
        "sym": default.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "checkpoint_format": name,
        "format": name,
    }
    in_blocks = {layer: scheme for layer, scheme in schemes.items() if block_of(layer)}
    kept = list(dict.fromkeys(within_block(layer) for layer, scheme in in_blocks.items() if scheme))
    skipped = list(dict.fromkeys(within_block(layer) for layer, scheme in in_blocks.items() if not scheme))
    for layer, scheme in in_blocks.items():
        if scheme is None and within_block(layer) in kept:
            raise UnsupportedScheme(
                f"{layer}: {name} quantizes a linear in all blocks or in none; use --format auto_round"
            )
    if skipped:
        # transformers and vLLM read the first, GPTQModel the second
        written["modules_in_block_to_quantize"] = [kept]
        written["dynamic"] = {rf"-:.*\.{re.escape(part)}$": {} for part in skipped}
    return written


def schemes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Scheme]:
    """Scheme of every quantized linear; heeds `modules_in_block_to_quantize`, `dynamic` and `lm_head`."""
    kept = [part for parts in config.get("modules_in_block_to_quantize") or [] for part in parts]
    found, regexes = {}, Patterns()
    for layer in shapes:
        in_block = block_of(layer) is not None and (not kept or layer.endswith(tuple(kept)))
        override = _override(config.get("dynamic") or {}, layer, regexes)
        if override is not None and (in_block or (config.get("lm_head") and layer.endswith("lm_head"))):
            found[layer] = scheme_from({**config, **override})
    return found


def _override(dynamic: Mapping[str, Mapping[str, Any]], layer: str, regexes: Patterns) -> Mapping[str, Any] | None:
    """What `dynamic` changes for a layer; None if it leaves the layer in 16 bits."""
    for pattern, changes in dynamic.items():
        if regexes.match(pattern.removeprefix("+:").removeprefix("-:"), layer):
            return None if pattern.startswith("-:") else changes
    return {}


def scheme_from(entry: Mapping[str, Any]) -> Scheme:
    """Scheme of GPTQ's and AutoRound's words: bits, group_size (-1 is the row), sym."""
    missing = [key for key in ("bits", "group_size", "sym") if key not in entry]
    if missing:
        raise PlanishError(f"quantization_config has no {missing[0]!r}; add it, or convert the model anew")
    group = None if entry["group_size"] == -1 else int(entry["group_size"])
    return Scheme(bits=int(entry["bits"]), group_size=group, symmetric=bool(entry["sym"]))


def detect(name: str, config: Mapping[str, Any]) -> bool:
    """Is this configuration of dialect `name`?"""
    return config.get("quant_method") == "gptq" and dialect(config) == name


def dialect(config: Mapping[str, Any]) -> str:
    """'gptq', 'gptq_v2' or what else the configuration of a GPTQ model says."""
    return str(config.get("checkpoint_format") or config.get("format") or "gptq")


def _format(name: str, shift: int) -> Format:
    return Format(
        name=name,
        check=partial(check, name),
        write=partial(write, name, shift),
        read=partial(read, name, shift),
        config=partial(config, name),
        schemes=schemes,
        detect=partial(detect, name),
    )


gptq = _format("gptq", 1)
gptq_v2 = _format("gptq_v2", 0)
