"""AWQ's format (version `gemm`), read only: 4-bit models of others. What it would hold, other formats hold too.

Tensors of a layer X with weight [out, in], groups of g and G = in / g:

    X.qweight  int32 [in, out / 8]   codes, 8 outputs in a word
    X.qzeros   int32 [G, out / 8]    zero points as they are, 8 outputs in a word
    X.scales   fp16  [G, out]

Nibble i of a word, from the lowest, belongs to output INTERLEAVE[i] of its eight.

    "quantization_config": {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128,
                            "zero_point": true, "modules_to_not_convert": ["visual"]}
"""

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from planish.bitstream import Stream, unpack
from planish.errors import PlanishError, UnsupportedScheme
from planish.formats.format import Format
from planish.formats.gptq import check_layout, scheme_from, take_scale
from planish.formats.layers import block_of, most_common, take
from planish.qtensor import QTensor, midpoint
from planish.scheme import Scheme

NAME, BITS = "awq", 4
INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)


def check(layer: str, scheme: Scheme, shape: tuple[int, int]) -> NoReturn:
    """Raise UnsupportedScheme: nothing is written in this format."""
    raise UnsupportedScheme(f"{layer}: {NAME} is read only; use --format compressed_tensors, auto_round or native")


def write(layer: str, q: Stream) -> NoReturn:
    """Raise UnsupportedScheme: nothing is written in this format."""
    check(layer, q.scheme, q.shape)


def read(layer: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Stream:
    """The stream of one layer.

    Raises:
        PlanishError: if a tensor is missing or isn't what the scheme and shape promise, or a scale has no fp16.
    """
    check_layout(NAME, layer, scheme, shape)
    out_features, in_features = shape
    grid = scheme.groups_in(in_features), out_features
    codes = take(tensors, f"{layer}.qweight", (in_features, out_features // 8), torch.int32)
    zero = _outputs(take(tensors, f"{layer}.qzeros", (grid[0], out_features // 8), torch.int32))
    if scheme.symmetric and not bool((zero == midpoint(BITS)).all()):
        raise PlanishError(f"{layer}.qzeros holds zero points that {scheme} can't have; check config.json")
    q = QTensor(
        codes=_outputs(codes),
        scale=take_scale(tensors, f"{layer}.scales", grid).T.contiguous(),
        zero=None if scheme.symmetric else zero,
        bits=BITS,
        group_size=scheme.group_in(in_features),
    )
    return Stream.of(q)


def _outputs(words: Tensor) -> Tensor:
    """int32 [n, out / 8] -> uint8 [out, n]."""
    nibbles = unpack(words, BITS, 1, words.shape[1] * 8).unflatten(1, (-1, 8))
    place = sorted(range(8), key=INTERLEAVE.__getitem__)
    return nibbles[..., place].flatten(1).T.contiguous()


def config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """Raise UnsupportedScheme: nothing is written in this format."""
    most_common(schemes)  # refuses a model without any
    check(*next((layer, scheme, (0, 0)) for layer, scheme in schemes.items() if scheme))


def schemes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Scheme]:
    """Scheme of every quantized linear: those of blocks whose name has no part of `modules_to_not_convert` in it.

    Raises:
        PlanishError: for other bits or another version.
    """
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", BITS)
    if version != "gemm" or bits != BITS:
        raise PlanishError(f"the model is AWQ of version {version!r} with {bits} bits; Planish reads only 4-bit 'gemm'")
    kept = config.get("modules_to_not_convert") or ()
    scheme = scheme_from({"group_size": 128, **config, "bits": bits, "sym": not config.get("zero_point", True)})
    return {layer: scheme for layer in shapes if block_of(layer) and not any(part in layer for part in kept)}


def detect(config: Mapping[str, Any]) -> bool:
    """Is this configuration AWQ's?"""
    return config.get("quant_method") == NAME


awq = Format(name=NAME, check=check, write=write, read=read, config=config, schemes=schemes, detect=detect)
