"""Experts: a mixture's feed-forward networks as modules of their own, each with three nn.Linear.

    y = sum over the chosen e of  p_e W_down,e (act(W_gate,e x) * W_up,e x)

transformers holds all experts of a block in two tensors of three dimensions; on disk each is a matrix with a name,
`experts.3.gate_proj.weight`. `unfuse` takes them apart into what lies on disk, under the names that transformers' own
conversion map gives, so that all that knows nn.Linear knows experts. Which tokens go where is still decided by the
model's own router, which stays as it is. Knows nothing of quantizers.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.moe import _default_apply_gate

FUSED = ("gate_up_proj", "down_proj")
EACH = ".experts.*."  # in a pattern of the conversion map, where the number of an expert stands


class Expert(nn.Module):
    """One expert.

    Args:
        weights: by name as on disk: gate and up [inner, hidden], down [hidden, inner].
        activation: of the gate.
    """

    def __init__(self, weights: dict[str, Tensor], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.names, self.activation = tuple(weights), activation
        for name, weight in weights.items():
            self.add_module(name, _linear(weight))

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.activation(gate(x)) * up(x))


class Experts(nn.Module):
    """Experts by their numbers; in place of a fused module of transformers.

    Args:
        fused: with weights [experts, 2 inner, hidden] and [experts, hidden, inner], of which each expert has a view.
        names: of gate, up and down on disk.
    """

    def __init__(self, fused: nn.Module, names: tuple[str, str, str]) -> None:
        super().__init__()
        activation: Any = fused.act_fn
        for number, (wide, down) in enumerate(zip(*(fused.get_parameter(leaf) for leaf in FUSED), strict=True)):
            weights = dict(zip(names, (*wide.detach().chunk(2), down.detach()), strict=True))
            self.add_module(str(number), Expert(weights, activation))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each token through the experts chosen for it; no expert sees another token.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], the experts. top_k_weights: [tokens, k], their shares.
        """
        experts, chosen = list(self.children()), top_k_index.shape[-1]
        given = torch.zeros_like(hidden_states)
        for expert, places in zip(experts, _places(top_k_index.flatten(), len(experts)), strict=True):
            if len(places):
                tokens = places // chosen
                made = expert(hidden_states[tokens]) * top_k_weights.flatten()[places, None]
                given.index_add_(0, tokens, made.to(given.dtype))
        return given


def _places(chosen: Tensor, experts: int) -> Iterator[Tensor]:
    """For each expert where in `chosen` it stands; without numbers all are chosen equally often."""
    if chosen.is_meta or isinstance(chosen, FakeTensor):
        count = -(-len(chosen) // experts)
        return (torch.arange(count, device=chosen.device) for _ in range(experts))
    counts = torch.bincount(chosen, minlength=experts).tolist()
    return iter(chosen.argsort(stable=True).split(counts)[:experts])


def unfuse(model: PreTrainedModel) -> PreTrainedModel:
    """Take fused experts apart, in place; those that can't be are left. Weights are views of what they were.

    Returns:
        The same model.
    """
    fused = {name: module for name, module in model.named_modules() if _is_fused(module)}
    steps = get_model_conversion_mapping(model) if fused else []
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    for name, module in fused.items():
        wide, down = (_names_on_disk(converters, f"{name}.{leaf}") for leaf in FUSED)
        if len(wide) == 2 and len(down) == 1:
            model.set_submodule(name, Experts(module, (*wide, *down)))  # type: ignore[arg-type]
    return model


def is_merge(step: Any) -> bool:
    """Is this step of a conversion map one that makes fused experts of what lies on disk?"""
    kinds = [type(operation) for operation in getattr(step, "operations", ())]
    return kinds in ([MergeModulelist, Concatenate], [MergeModulelist])


def gates(model: nn.Module) -> list[str]:
    """Names of what decides how much of which expert a token gets: routers, and gates of shared experts. Such a
    module stands beside Experts and has a matrix."""
    beside = [(name, module) for name, module in model.named_modules() if has_experts(module, deep=False)]
    return [
        f"{name}.{leaf}".strip(".")
        for name, module in beside
        for leaf, child in module.named_children()
        if getattr(child._parameters.get("weight"), "ndim", 0) == 2
    ]


def has_experts(module: nn.Module, deep: bool = True) -> bool:
    """Are there Experts in it, or among its children, if not `deep`?"""
    return any(isinstance(part, Experts) for part in (module.modules() if deep else module.children()))


def everywhere(module: Experts, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook before `forward` that sends every token through every expert."""
    hidden = args[0]
    count = len(list(module.children()))
    index = torch.arange(count, device=hidden.device).expand(len(hidden), count)
    return hidden, index, torch.ones_like(index, dtype=hidden.dtype)


def _is_fused(module: nn.Module) -> bool:
    """Has it the two tensors and nothing else, laid out as `Experts` reads them, and gated as all are?"""
    if set(module._parameters) != set(FUSED) or not dict(module.named_children()).keys() <= {"act_fn"}:
        return False
    as_usual = not getattr(module, "is_transposed", True) and getattr(module, "is_concatenated", False)
    gated = getattr(type(module), "_apply_gate", None) is _default_apply_gate
    return as_usual and gated and all(module.get_parameter(leaf).ndim == 3 for leaf in FUSED)


def _names_on_disk(converters: list[WeightConverter], fused: str) -> tuple[str, ...]:
    """What of each expert goes into a fused tensor, such as ("gate_proj", "up_proj"); () if that isn't known."""
    for step in converters:
        targets, sources = step._original_target_patterns, step._original_source_patterns
        each = all(EACH in f".{source}" and source.endswith(".weight") for source in sources)
        if is_merge(step) and each and len(targets) == 1 and fused.endswith(targets[0]):
            return tuple(source.rpartition("*.")[2].removesuffix(".weight") for source in sources)
    return ()


def _linear(weight: Tensor) -> nn.Linear:
    """An nn.Linear with this weight [out, in] and no bias; its making costs nothing."""
    rows, columns = weight.shape
    with torch.device("meta"):
        made = nn.Linear(columns, rows, bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made
