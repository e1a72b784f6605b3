"""Formats: pairs of pure functions between QTensors and named tensors on disk. The list is FORMATS.

native              holds everything: any group, offsets, mixed bits; what unfinished runs are kept in
auto_round          auto-round in transformers; vLLM if symmetric
gptq                GPTQ v1 (zero points stored as z - 1): GPTQModel, vLLM, SGLang; symmetric only
gptq_v2             GPTQ v2 (zero points as they are): GPTQModel
compressed_tensors  pack-quantized: vLLM, SGLang, compressed-tensors in transformers
compressed_tensors_int  int-quantized: the same with activations rounded, each token as it comes
awq                 read only

DIALECTS are spellings of these that others write and we only read.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planish.errors import PlanishError, UnsupportedScheme
from planish.formats.auto_round import PACKING, auto_round
from planish.formats.awq import awq
from planish.formats.compressed_tensors import compressed_tensors
from planish.formats.format import Format
from planish.formats.gptq import dialect, gptq, gptq_v2
from planish.formats.int_quantized import int_quantized
from planish.formats.native import native
from planish.scheme import Scheme

FORMATS = {
    "native": native,
    "auto_round": auto_round,
    "gptq": gptq,
    "gptq_v2": gptq_v2,
    "compressed_tensors": compressed_tensors,
    "compressed_tensors_int": int_quantized,
    "awq": awq,
}


def _auto_round_by(tensors: Format, packing: str) -> Format:
    """AutoRound's configuration, its tensors those of another format."""

    def schemes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Scheme]:
        return auto_round.schemes({**config, "packing_format": PACKING[bool(config.get("sym"))][0]}, shapes)

    def detect(config: Mapping[str, Any]) -> bool:
        symmetric = config.get("sym") and packing in PACKING[True]
        return auto_round.detect(config) and config.get("packing_format") == packing and not symmetric

    return replace(auto_round, read=tensors.read, schemes=schemes, detect=detect)


DIALECTS = (
    _auto_round_by(awq, "auto_round:auto_awq"),
    _auto_round_by(gptq, "auto_round:auto_gptq"),  # asymmetric; symmetric ones are auto_round itself
)


def detect(quantization_config: Mapping[str, Any]) -> Format:
    """The format of a checkpoint.

    Args:
        quantization_config: of its config.json.

    Raises:
        PlanishError: if it is none of FORMATS.
    """
    for known in (*DIALECTS, *FORMATS.values()):
        if known.detect(quantization_config):
            return known
    method = quantization_config.get("quant_method")
    found = f"{method} of dialect {dialect(quantization_config)}" if method == "gptq" else method
    raise PlanishError(f"the model is quantized by {found!r}; Planish reads only {', '.join(FORMATS)}")


def choose(schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> Format:
    """The format for `--format auto`: auto_round if it can hold every layer, else native."""
    try:
        verify(auto_round, schemes, shapes)
    except UnsupportedScheme:
        return native
    return auto_round


def verify(format: Format, schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse before any work what a format can't hold: each layer by itself, then all of them together.

    Raises:
        UnsupportedScheme: naming the layer, the reason and the mend.
    """
    for layer, scheme in schemes.items():
        if scheme is not None:
            _refuse_activations(format, layer, scheme)
            format.check(layer, scheme, shapes[layer])
    format.config(schemes)


def _refuse_activations(format: Format, layer: str, scheme: Scheme) -> None:
    """What only the native format can say."""
    if scheme.activations is not None and not format.activations:
        raise UnsupportedScheme(
            f"{layer}: {format.name} can't say that activations are rounded ({scheme}); use --format "
            + ("compressed_tensors_int or native" if format.name == "compressed_tensors" else "native")
        )
    if scheme.bits not in format.bits:
        raise UnsupportedScheme(f"{layer}: {format.name} has no codes of {scheme.bits} bits; use --format native")
