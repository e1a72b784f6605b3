"""Naming: what a tensor is called on disk and what the module that holds it is called in transformers.

    on disk    language_model.model.layers.0.self_attn.q_proj.weight      LLaVA
    in memory  model.language_model.layers.0.self_attn.q_proj.weight

Multimodal models above all are spelled otherwise on disk. Both ways go through transformers' own conversion
map, so that what we write is named as save_pretrained() names it. A base-model prefix ("model.") that a file
lacks or adds is mapped too. Tensors that transformers computes from several on disk aren't known here: they
keep the names they have.
"""

from collections.abc import Callable, Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key


def module_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Name on disk -> name in the model, of tensors of the model and of other tensors of its modules (the codes
    of a quantized nn.Linear); what belongs to no module keeps its name.

    The renamings that were used stay with the model, where from_pretrained() leaves them too: files written
    from it (ours, and save_pretrained()'s) are spelled as those it came from.
    """
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    found = {}
    for key in sorted(keys):
        renamed, _ = rename_source_key(key, renamings, [])
        spellings = [form for name in (renamed, key) for form in (name, prefix + name, name.removeprefix(prefix))]
        known = (name for name in spellings if _is_tensor(modules, name))
        owned = (name for name in spellings if _owner(name) in modules)
        found[key] = next(known, next(owned, key))
    model._weight_conversions = [step for step in renamings if step.was_used()]  # type: ignore[assignment]
    return found


def disk_speller(model: PreTrainedModel) -> Callable[[str], str]:
    """A function that gives the name on disk for a name in the model, of a tensor or a module: the way back of
    `module_names`. A name that belongs to no module stays as it is."""
    steps = getattr(model, "_weight_conversions", None)
    if steps is None:  # made, not loaded: which optional prefixes its files have isn't known, so none
        steps = [s for s in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(s, PrefixChange)]
    back = [step.reverse_transform() for step in reversed(steps) if isinstance(step, WeightRenaming)]
    modules = {name for name, _ in model.named_modules()}

    def spell(name: str) -> str:
        if name not in modules and _owner(name) not in modules:
            return name
        return rename_source_key(name, back, [], reverse=True)[0]  # type: ignore[arg-type]

    return spell


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _is_tensor(modules: dict[str, nn.Module], name: str) -> bool:
    """Is it a parameter or a buffer of one of the modules?"""
    owner, _, leaf = name.rpartition(".")
    return owner in modules and (leaf in modules[owner]._parameters or leaf in modules[owner]._buffers)
