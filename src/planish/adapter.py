"""Adapter: a LoRA folder that is there already, merged into the float weights as they are read.

    W' = W + c B A        c = alpha / r, or alpha / sqrt(r) if rank-stabilised (arXiv 2106.09685, 2312.03732)

The folder is peft's (adapter_config.json, adapter_model.safetensors), read here, without peft. The sum is computed in
fp32 and rounded once to the weight's dtype. The result is a Source: nothing behind it knows. What can't be a sum on a
linear's weight (DoRA, biases, embeddings, whole modules, bases that were changed first) is refused by name.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from planish.errors import PlanishError
from planish.guard import read_json, reading
from planish.source import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# settings of peft's LoRA under which an adapter is more than c B A on linears
_BEYOND = ("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
           "layer_replication", "target_parameters", "alora_invocation_tokens")  # fmt: skip
# starts that leave the base as it is; others (pissa, olora, corda, loftq) subtract from it first
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Low:
    """One layer's factors: A [rank, in], B [out, rank] in fp32, and c."""

    a: Tensor
    b: Tensor
    factor: float

    def added(self, weight: Tensor) -> Tensor:
        """The weight [out, in] with the product, in the weight's dtype."""
        device = weight.device
        product = self.factor * (self.b.to(device) @ self.a.to(device))
        return (weight.float() + product).to(weight.dtype)


class AdaptedSource(Source):
    """A source whose linears have an adapter's product added as they are read.

    Raises:
        PlanishError: if the adapter is of another base, or can't be merged so.
    """

    def __init__(self, base: Source, folder: Path) -> None:
        self.base, self.adapter = base, folder
        self.low = read_adapter(folder)
        model = base.skeleton()
        there = set(base.names())
        for name, low in self.low.items():
            _check(model, there, name, low, base.label, folder)
        super().__init__(model, base.config, f"{base.label} with adapter {folder.name}", base.folder)

    def names(self) -> list[str]:
        return self.base.names()

    def files(self) -> list[Path]:
        return [*self.base.files(), self.adapter / CONFIG, self.adapter / WEIGHTS]

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.base.tokenizer()

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.base._read(names):
            low = self.low.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            yield name, tensor if low is None else low.added(tensor)


def read_adapter(folder: Path) -> dict[str, Low]:
    """The factors of each layer, by its name in the model.

    Raises:
        PlanishError: if the folder holds no such adapter, or one that isn't a sum on linears' weights.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise PlanishError(f"{folder} is no adapter: it needs {CONFIG} and {WEIGHTS}, as peft saves them")
    config = read_json(folder / CONFIG)
    _check_kind(config, folder)
    with reading(f"{folder / WEIGHTS} can't be read", "save the adapter again"):
        tensors = load_file(folder / WEIGHTS)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _FACTOR.fullmatch(key.removeprefix(_PREFIX))
        if found is None or tensor.dim() != 2 or not tensor.is_floating_point():
            raise PlanishError(f"{folder}: {key} is no factor of a linear's weight; only plain LoRA can be merged")
        if not tensor.isfinite().all():
            raise PlanishError(f"{folder}: {key} holds NaN or infinity; get the adapter again")
        # its own memory: what `load_file` gives is a view of the file, which may be written again
        sides.setdefault(found["layer"], {})[found["side"]] = tensor.to(torch.float32, copy=True)
    for layer, factors in sides.items():
        if len(factors) < 2 or len(factors["A"]) != factors["B"].shape[1]:
            raise PlanishError(f"{folder}: the factors of {layer} don't fit each other; get the adapter again")
    return {layer: Low(f["A"], f["B"], _factor(config, layer, len(f["A"]), folder)) for layer, f in sides.items()}


def _check_kind(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise PlanishError(f"{folder} is an adapter of kind {kind}; only LoRA can be merged here")
    beyond = [name for name in _BEYOND if config.get(name)]
    beyond += ["bias"] if config.get("bias", "none") != "none" else []
    if beyond:
        raise PlanishError(f"{folder}: LoRA with {', '.join(beyond)} isn't a sum on linears' weights; merge it by peft")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise PlanishError(
            f"{folder}: init_lora_weights={start!r} changes the base first; save it by peft as plain LoRA "
            "(path_initial_model_for_weight_conversion)"
        )


def _factor(config: Mapping[str, Any], layer: str, rank: int, folder: Path) -> float:
    """c of a layer; peft's patterns name layers by the ends of their names."""

    def of(pattern: str, default: str) -> Any:
        known = config.get(pattern) or {}
        with reading(f"{folder / CONFIG}: {pattern} can't be read", "check it"):
            hits = (key for key in known if re.match(rf"(.*\.)?({key})$", layer))
            return known.get(next(hits, None), config.get(default))

    alpha, said = of("alpha_pattern", "lora_alpha"), of("rank_pattern", "r")
    if not isinstance(alpha, int | float) or said != rank:
        raise PlanishError(f"{folder}: {layer} has rank {rank}, and {CONFIG} says r={said}, lora_alpha={alpha}")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _check(model: nn.Module, there: set[str], name: str, low: Low, label: str, folder: Path) -> None:
    """Refuse what isn't a linear of this model, or not of this shape."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise PlanishError(f"{folder} is of another base: {label} has no linear {name}")
    if f"{name}.weight" not in there:
        raise PlanishError(f"{folder} changes {name}, which {label} has tied to another tensor; untie it first")
    wanted, rank = (linear.out_features, linear.in_features), len(low.a)
    if rank > min(wanted):
        raise PlanishError(f"{folder}: rank {rank} is above the width of {name}, which is {list(wanted)}")
    if (len(low.b), low.a.shape[1]) != wanted:
        raise PlanishError(
            f"{folder} is of another base: its {name} is {[len(low.b), low.a.shape[1]]}, that of {label} {list(wanted)}"
        )


def adapted(source: Source, folder: str | os.PathLike[str] | None) -> Source:
    """The source with an adapter merged; itself without one."""
    return source if folder is None else AdaptedSource(source, Path(folder).expanduser())
