"""Arch: where a language model keeps its decoder blocks, its embedding and its head, as plain names.

It is found by structure, not by family: a stack is an nn.ModuleList whose children share a class and hold
nn.Linear, and the blocks are the stack that is next of kin to the token embedding: the smallest module that
holds the embedding and a stack holds it, and it lies in no part that reads pixels or sound instead of tokens;
of several the one with the most parameters. A vision tower, however large, is farther off. What lies outside
the blocks stays in 16 bits.

This file knows nothing of quantizers, files or devices; a model on the meta device will do.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.conv import _ConvNd

from planish.errors import PlanishError
from planish.experts import gates

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Names of a model's parts, each as `model.get_submodule` takes it.

    Args:
        blocks: the nn.ModuleList of decoder blocks, e.g. "model.layers".
        num_blocks: how many blocks it holds.
        embedding: the token embedding, e.g. "model.embed_tokens".
        head: the output projection, e.g. "lm_head"; None if the model has none.
        outside: the largest modules that share nothing with the blocks, in order: together with the
            blocks they are the whole model, e.g. ("model.embed_tokens", "model.norm", ..., "lm_head").
    """

    blocks: str
    num_blocks: int
    embedding: str
    head: str | None
    outside: tuple[str, ...]

    def block(self, index: int) -> str:
        """Full name of a block, e.g. "model.layers.3"."""
        return f"{self.blocks}.{index}"

    @property
    def decoder(self) -> str:
        """The module that takes token ids through the blocks, e.g. "model" or "model.language_model"."""
        return self.blocks.rpartition(".")[0]

    @property
    def around(self) -> tuple[str, ...]:
        """Those of `outside` that lie in the decoder: all that text needs but for the blocks and the head."""
        return tuple(name for name in self.outside if name.startswith(f"{self.decoder}."))


Classes = type[nn.Module] | tuple[type[nn.Module], ...]


def discover(model: "PreTrainedModel", packed: Classes = ()) -> Arch:
    """Find the parts of a transformers language model.

    Args:
        model: its parameters may be on meta.
        packed: classes of the layers that stand for an nn.Linear in a quantized model; with `in_features`
            and `out_features`.

    Raises:
        PlanishError: if it has no recognisable blocks, or experts that can't be taken apart.
    """
    kind = type(model).__name__
    lists = {name: module for name, module in model.named_modules() if _is_stack(module, packed)}
    if not lists:
        raise PlanishError(
            f"{kind} has no recognisable blocks (an nn.ModuleList of one class with nn.Linear in it); "
            "give a decoder-only language model"
        )
    embedding = _name_of(model, model.get_input_embeddings())
    if embedding is None:
        raise PlanishError(f"{kind} has no token embedding; give a decoder-only language model")
    blocks = max(lists, key=lambda name: (*_kinship(model, name, embedding), _size(lists[name], packed)))
    _refuse_fused_experts(lists[blocks], blocks, packed)
    head = _name_of(model, model.get_output_embeddings())
    outside = tuple(_outside(model, "", blocks))
    return Arch(blocks=blocks, num_blocks=len(lists[blocks]), embedding=embedding, head=head, outside=outside)


def linears(arch: Arch, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Full name -> (out_features, in_features) of every nn.Linear of the blocks, in the model's order, but for the
    gates of experts, which stay as they are."""
    part = model.get_submodule(arch.blocks)
    kept = {f"{arch.blocks}.{name}" for name in gates(part)}
    return {
        name: (module.out_features, module.in_features)
        for name, module in part.named_modules(prefix=arch.blocks)
        if isinstance(module, nn.Linear) and name not in kept
    }


def _is_stack(module: nn.Module, packed: Classes) -> bool:
    """Is it an nn.ModuleList of one class whose children hold nn.Linear, or what stands for it?"""
    if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1:
        return False
    return all(any(isinstance(part, (nn.Linear, packed)) for part in child.modules()) for child in module)


def _kinship(model: nn.Module, stack: str, embedding: str) -> tuple[int, bool]:
    """How deep the smallest module lies that holds both, and whether the way from there to the stack is one of
    tokens: transformers' encoders of other things say so by their `main_input_name`."""
    parts = stack.split(".")
    shared = len(os.path.commonprefix([parts, embedding.split(".")]))
    between = (model.get_submodule(".".join(parts[:i])) for i in range(shared + 1, len(parts)))
    return shared, all(getattr(part, "main_input_name", "input_ids") == "input_ids" for part in between)


def _size(module: nn.Module, packed: Classes) -> int:
    layers = (part for part in module.modules() if isinstance(part, packed))
    standing = sum(layer.in_features * layer.out_features for layer in layers)  # type: ignore[operator, misc]
    return standing + sum(parameter.numel() for parameter in module.parameters())


def _refuse_fused_experts(blocks: nn.Module, prefix: str, packed: Classes) -> None:
    modules = dict(blocks.named_modules(prefix=prefix))
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, packed))
    for name, module in modules.items():
        # a short convolution's kernel has three dimensions too, and so have the grids of a quantizer
        if isinstance(module, _ConvNd) or name.startswith(inside):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                raise PlanishError(
                    f"{name}.{leaf} {list(parameter.shape)} are fused experts that can't be taken apart "
                    "(transposed, with biases, or under no names that transformers knows); give another model"
                )


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _outside(module: nn.Module, prefix: str, blocks: str) -> Iterator[str]:
    """Children of the blocks' ancestors that aren't ancestors themselves."""
    for leaf, child in module.named_children():
        name = f"{prefix}.{leaf}" if prefix else leaf
        if name == blocks:
            continue
        if blocks.startswith(f"{name}."):
            yield from _outside(child, name, blocks)
        else:
            yield name
