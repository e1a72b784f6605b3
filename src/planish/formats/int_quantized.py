"""compressed-tensors, `int-quantized`: what vLLM loads where activations are rounded too, each token as it comes.

Tensors of a layer X with weight [out, in] and G groups a row:

    X.weight             int8 [out, in]   codes, a byte each whatever their bits: Q - 2^(bits-1)
    X.weight_scale       fp16 [out, G]
    X.weight_zero_point  int8 [out, G]    only if asymmetric; z - 2^(bits-1)

The configuration is that of `pack-quantized`, and says how inputs are rounded:

    "input_activations": {"num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true}

Readers differ in a token's scale by a share of a step: symmetric ones of 8 bits divide its largest value by 127, as
we do, or by 127.5.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from planish.bitstream import Stream, pack, unpack
from planish.errors import PlanishError, UnsupportedScheme
from planish.formats.compressed_tensors import INT, METHOD, compressed_tensors, schemes_of_format
from planish.formats.format import Format
from planish.formats.gptq import check_groups, scheme_of, take_scale
from planish.formats.layers import take
from planish.qtensor import midpoint
from planish.scheme import Activations, Scheme

NAME = "compressed_tensors_int"


def check(layer: str, scheme: Scheme, shape: tuple[int, int]) -> None:
    """Raise UnsupportedScheme if groups aren't of one length, inputs are turned, or heads rounded."""
    check_groups(NAME, layer, scheme, shape[1])
    how = scheme.activations
    for what, there in (("inputs are turned", how and how.turned), ("heads are rounded", how and how.kv_bits < 16)):
        if there:
            raise UnsupportedScheme(f"{layer}: {NAME} can't say that {what} ({scheme}); use --format native")


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - midpoint(bits)).to(torch.int8)


def _unsigned(layer: str, tensor: Tensor, bits: int) -> Tensor:
    codes = tensor.to(torch.int16) + midpoint(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise PlanishError(f"{layer} has codes that {bits} bits don't hold; the checkpoint is damaged")
    return codes.to(torch.uint8)


def write(layer: str, q: Stream) -> dict[str, Tensor]:
    """Named tensors of one layer."""
    check(layer, scheme_of(NAME, layer, q), q.shape)
    tensors = {
        f"{layer}.weight": _signed(unpack(q.codes, q.bits, 1, q.in_features), q.bits),
        f"{layer}.weight_scale": q.scale.contiguous(),
    }
    if q.zero is not None:
        tensors[f"{layer}.weight_zero_point"] = _signed(q.zero, q.bits).contiguous()
    return tensors


def read(layer: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Stream:
    """The stream of one layer.

    Raises:
        PlanishError: if a tensor is missing or isn't what the scheme and shape promise, or a scale has no fp16.
    """
    check(layer, scheme, shape)
    bits, grid = scheme.bits, (shape[0], scheme.groups_in(shape[1]))
    codes = _unsigned(layer, take(tensors, f"{layer}.weight", shape, torch.int8), bits)
    zero = None
    if not scheme.symmetric:
        zero = _unsigned(layer, take(tensors, f"{layer}.weight_zero_point", grid, torch.int8), bits)
    return Stream(
        codes=pack(codes, bits, 1),
        scale=take_scale(tensors, f"{layer}.weight_scale", grid),
        zero=zero,
        bits=bits,
        group_size=scheme.group_in(shape[1]),
        order=None,
        in_features=shape[1],
    )


def config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """`quantization_config`: that of `pack-quantized`, with how inputs are rounded."""
    words = compressed_tensors.config(schemes)
    for group in words["config_groups"].values():
        how = schemes[group["targets"][0]].activations  # type: ignore[union-attr]
        group |= {"format": INT, "input_activations": None if how is None else _said(how)}
    return words | {"format": INT}


def _said(how: Activations) -> dict[str, Any]:
    return {"num_bits": how.bits, "type": "int", "symmetric": how.symmetric, "strategy": "token", "dynamic": True}


def schemes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Scheme]:
    """Scheme of every quantized linear, as `pack-quantized` has it.

    Raises:
        PlanishError: for inputs whose ranges are stored, and what `pack-quantized` refuses.
    """
    return schemes_of_format(config, shapes, INT, _activations)


def _activations(layer: str, group: Mapping[str, Any]) -> Activations | None:
    how = group.get("input_activations")
    if how is None and "output_activations" not in group:
        return None
    dynamic = how and how.get("dynamic") is True and how.get("strategy") == "token" and how.get("type", "int") == "int"
    if not dynamic or "output_activations" in group:
        raise PlanishError(
            f"{layer} has activations whose ranges are stored, or aren't of tokens ({METHOD}); "
            "Planish reads only integers with a range for each token as it comes"
        )
    assert how is not None
    return Activations(bits=how.get("num_bits", 8), symmetric=how.get("symmetric", True))


def detect(config: Mapping[str, Any]) -> bool:
    """Is this configuration compressed-tensors' with a byte a weight?"""
    return config.get("quant_method") == METHOD and config.get("format") == INT


int_quantized = Format(
    name=NAME, check=check, write=write, read=read, config=config, schemes=schemes, detect=detect, activations=True
)
