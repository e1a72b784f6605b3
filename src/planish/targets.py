"""Targets: who loads what. A table, and the checks that come from it.

A target is a program that serves or loads checkpoints. LOADERS says which formats, bits and grids each reads, how
it is called and where that was seen: run by us, or read in the source named, never guessed. `--target` takes its
format from here and refuses, before any work, a scheme that couldn't be loaded there. Knows nothing of methods.
"""

import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from planish.errors import PlanishError, UnsupportedScheme, nearest
from planish.formats import FORMATS, verify
from planish.scheme import BITS, Scheme

GGUF = "gguf"  # not one of FORMATS: a file of its own kind, see `gguf_file`
EVERY, BOTH = (2, 3, 4, 8), (True, False)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """What one target reads of one format.

    Args:
        bits, symmetric: the schemes. how: what to type; {path} is the folder. checked: version and how that is known.
        activations: bits to which it rounds them, by tokens, for weights of one scale a row; if empty they stay in 16.
    """

    target: str
    format: str
    bits: tuple[int, ...] = EVERY
    symmetric: tuple[bool, ...] = BOTH
    activations: tuple[int, ...] = ()
    how: str
    checked: str

    def takes(self, scheme: Scheme) -> bool:
        how = scheme.activations
        rounds = how is None and not self.activations
        if how is not None and self.activations:
            rounds = how.bits in self.activations and scheme.group_size is None
        return (rounds or self.format == "native") and scheme.bits in self.bits and scheme.symmetric in self.symmetric

    @property
    def grids(self) -> list[str]:
        """What it reads, for people."""
        each = itertools.product(self.bits, [f"a{bits}" for bits in self.activations] or [""], self.symmetric)
        return [f"w{bits}{rounded}{'' if even else ' asym'}" for bits, rounded, even in each]


_HUMMING = "pip install humming-kernels; vllm serve {path}"
_PIPED = 'AutoModelForCausalLM.from_pretrained("{path}")'

# by target, in the order of preference that --target takes
LOADERS = (
    Loader(target="vllm", format="compressed_tensors", bits=(4, 8), symmetric=(True, False),
           how="vllm serve {path}", checked="not run; vLLM's compressed_tensors_wNa16 scheme"),
    Loader(target="vllm", format="compressed_tensors", bits=(2, 3), symmetric=(True,),
           how=_HUMMING, checked="not run; vLLM PR #46389"),
    Loader(target="vllm", format="compressed_tensors_int", bits=(8,), symmetric=(True,), activations=(8,),
           how="vllm serve {path}", checked="not run; vLLM's compressed_tensors_w8a8_int8 scheme"),
    Loader(target="vllm", format="auto_round", symmetric=(True,), how=_HUMMING, checked="not run; vLLM PR #52890"),
    Loader(target="vllm", format="gptq", bits=(4, 8), symmetric=(True,),
           how="vllm serve {path}", checked="not run; vLLM's AutoGPTQConfig"),
    Loader(target="vllm", format="awq", bits=(4,), how="vllm serve {path}", checked="not run; vLLM's awq_marlin"),
    Loader(target="sglang", format="compressed_tensors", bits=(4, 8), symmetric=(True,),
           how="python -m sglang.launch_server --model-path {path}", checked="not run; SGLang's compressed_tensors"),
    Loader(target="sglang", format="gptq", bits=(4, 8), symmetric=(True,),
           how="python -m sglang.launch_server --model-path {path}", checked="not run; SGLang's gptq.py"),
    Loader(target="transformers", format="auto_round",
           how=f"pip install auto-round; {_PIPED}", checked="auto-round 0.16.1 with transformers 5.23, run"),
    Loader(target="transformers", format="gptq", symmetric=(True,),
           how=f"pip install optimum gptqmodel; {_PIPED}", checked="gptqmodel 7.7.0 with transformers 5.23, run"),
    Loader(target="transformers", format="gptq_v2",
           how=f"pip install optimum gptqmodel; {_PIPED}", checked="gptqmodel 7.7.0 with transformers 5.23, run"),
    Loader(target="transformers", format="compressed_tensors", symmetric=(True,),
           how=f"pip install compressed-tensors; {_PIPED}",
           checked="compressed-tensors 0.20.0 with transformers 5.23, run"),
    Loader(target="transformers", format="compressed_tensors", symmetric=(False,),
           how=f"pip install compressed-tensors; {_PIPED[:-1]}, quantization_config=CompressedTensorsConfig("
           "dequantize=True))", checked="compressed-tensors 0.20.0 with transformers 5.23, run"),
    Loader(target="transformers", format="compressed_tensors_int", bits=(4, 8), symmetric=(True,), activations=(4, 8),
           how=f"pip install compressed-tensors; {_PIPED}",
           checked="compressed-tensors 0.20.0 with transformers 5.23, run"),
    Loader(target="transformers", format="awq", bits=(4,),
           how=f"pip install optimum gptqmodel; {_PIPED}", checked="not run; transformers' AwqQuantizer"),
    Loader(target="transformers", format="native", bits=BITS,
           how=f"pip install planish; planish.register(); {_PIPED}", checked="transformers 5.23, run"),
    Loader(target="llama.cpp", format=GGUF, how="llama-cli -m {path}", checked="llama-cpp-python, run"),
)  # fmt: skip

TARGETS = tuple(dict.fromkeys(loader.target for loader in LOADERS))

# linears that servers join into one, whose schemes must then be equal
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
# linears that tensor parallelism cuts along their outputs; all others are cut along their inputs
CUT_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Does a target load a checkpoint, how, and how is that known? `reason` says why it doesn't."""

    target: str
    loads: bool
    how: str
    checked: str
    reason: str = ""


def verdicts(format: str, schemes: Collection[Scheme]) -> list[Verdict]:
    """What each target makes of a format that holds these schemes; one line a target."""
    found = []
    for target in TARGETS:
        of_format = [loader for loader in LOADERS if (loader.target, loader.format) == (target, format)]
        refused = [scheme for scheme in schemes if not any(loader.takes(scheme) for loader in of_format)]
        # the most particular one of those that are needed says how
        needed = [loader for loader in of_format if any(loader.takes(scheme) for scheme in schemes)]
        if refused or not needed:
            reason = f"doesn't read {refused[0]} in {format}" if of_format and refused else f"doesn't read {format}"
            found.append(Verdict(target=target, loads=False, how="", checked="", reason=reason))
        else:
            how, checked = needed[-1].how, needed[-1].checked
            found.append(Verdict(target=target, loads=True, how=how, checked=checked))
    return found


def formats_of(target: str) -> list[str]:
    """Formats that a target reads and we write, the preferred one first.

    Raises:
        PlanishError: if there is no such target.
    """
    if target not in TARGETS:
        raise PlanishError(f"no target {target!r}: {nearest(target, TARGETS)}")
    names = dict.fromkeys(loader.format for loader in LOADERS if loader.target == target)
    return [name for name in names if name == GGUF or name in FORMATS]


def choose_for(
    target: str,
    schemes: Mapping[str, Scheme | None],
    shapes: Mapping[str, tuple[int, int]],
    *,
    format: str = "auto",
    tp: int = 1,
) -> str:
    """The format in which a target loads these layers: the one asked for, or the first that does.

    Args:
        schemes: of every linear of the blocks; None is one left in 16 bits. shapes: (out, in) of them.
        tp: GPUs that the server will spread each layer over.

    Raises:
        PlanishError: naming the layer, what the target can't do with it, and the mend.
    """
    candidates = formats_of(target)
    if format != "auto" and format not in candidates:
        raise PlanishError(f"{target} doesn't read {format}; use --format {candidates[0]}, or another --target")
    refusals = []
    for name in candidates if format == "auto" else [format]:
        try:
            _check(target, name, schemes, shapes)
        except PlanishError as error:
            refusals.append(error)
            continue
        if target in ("vllm", "sglang"):
            _check_fused(target, schemes)
            _check_shards(target, schemes, shapes, tp)
        return name
    raise refusals[0]


def _check(
    target: str, format: str, schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]
) -> None:
    loaders = [loader for loader in LOADERS if (loader.target, loader.format) == (target, format)]
    for layer, scheme in schemes.items():
        if scheme is not None and not any(loader.takes(scheme) for loader in loaders):
            grids = sorted({grid for loader in loaders for grid in loader.grids})
            raise UnsupportedScheme(
                f"{layer}: {target} can't load {scheme} as {format}; of that it reads {', '.join(grids)}"
            )
    if format != GGUF:
        verify(FORMATS[format], schemes, shapes)


def _check_fused(target: str, schemes: Mapping[str, Scheme | None]) -> None:
    """Linears that are joined in the server have one scheme; so have all experts of a block."""
    first: dict[str, tuple[str, Scheme | None]] = {}
    for layer, scheme in schemes.items():
        other, its_scheme = first.setdefault(joined(layer), (layer, scheme))
        if its_scheme != scheme:
            raise UnsupportedScheme(
                f"{layer} ({scheme or '16-bit'}) and {other} ({its_scheme or '16-bit'}) are one matrix in {target}; "
                "give them the same scheme"
            )


def joined(layer: str) -> str:
    """What servers make one matrix of has one such name: fused linears, and all experts of a block."""
    owner, _, leaf = layer.rpartition(".")
    first = next((group[0] for group in FUSED if leaf in group), leaf)
    return re.sub(r"\.experts\.\d+", ".experts", f"{owner}.{first}" if owner else first)


def _check_shards(
    target: str, schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]], tp: int
) -> None:
    """Cut over `tp` GPUs, no group is split."""
    if tp < 1:
        raise PlanishError(f"--tp {tp}; at least 1 GPU is needed")
    for layer, scheme in schemes.items():
        out_features, in_features = shapes[layer]
        by_output = layer.rpartition(".")[2] in CUT_BY_OUTPUT
        if (out_features if by_output else in_features) % tp:
            raise UnsupportedScheme(
                f"{layer}: its {out_features if by_output else in_features} {'out' if by_output else 'in'}puts can't "
                f"be cut over {tp} GPUs; use another --tp"
            )
        if scheme is None or by_output or tp == 1 or scheme.group_size is None:
            continue
        if in_features // tp % scheme.group_size:
            raise UnsupportedScheme(
                f"{layer}: cut over {tp} GPUs in {target}, {in_features // tp} inputs each, groups of "
                f"{scheme.group_size} are split; use a group that divides {in_features // tp}, or another --tp"
            )
