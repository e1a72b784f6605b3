"""Tables: the token embedding, and a head that isn't tied to it, in 8 or 4 bits.

Two thirds of a small model at 2 bits are its embedding. It is rounded when a checkpoint is written, in groups of 32
as GGUF's types have them: to nearest from min/max at 8 bits, from searched ranges at 4. No method trains it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planish.arch import Arch, discover
from planish.errors import PlanishError, UnsupportedScheme
from planish.kernels.embedding import PackedEmbedding, PackedHead
from planish.kernels.linear import PackedLinear
from planish.kernels.pack import Packed
from planish.qtensor import QTensor
from planish.quant import Fixed, MinMax, Nearest, Quantizer, Searched
from planish.scheme import Scheme

BITS, GROUP = (4, 8, 16), 32


def table_shapes(arch: Arch, model: nn.Module) -> dict[str, tuple[int, int]]:
    """(vocabulary, hidden) of the embedding and, if it is a linear of its own, of the head."""
    embedding: Any = model.get_submodule(arch.embedding)
    shapes = {arch.embedding: (embedding.num_embeddings, embedding.embedding_dim)}
    head = None if arch.head is None else model.get_submodule(arch.head)
    if arch.head is not None and isinstance(head, nn.Linear) and head.weight is not embedding.weight:
        shapes[arch.head] = head.out_features, head.in_features
    return shapes


def table_schemes(bits: int, shapes: Mapping[str, tuple[int, int]], format: str) -> dict[str, Scheme]:
    """Scheme of each table; none at 16 bits.

    Raises:
        PlanishError: for another number of bits, or a format without quantized embeddings.
    """
    if bits not in BITS:
        raise PlanishError(f"embeddings of {bits} bits; use one of {', '.join(map(str, BITS))}")
    if bits == 16:
        return {}
    if format != "native":
        raise UnsupportedScheme(
            f"{next(iter(shapes))}: {format} holds embeddings in 16 bits only; use --format native or gguf"
        )
    return {name: Scheme(bits=bits, group_size=GROUP) for name in shapes}


@torch.no_grad()
def quantize_table(weight: Tensor, scheme: Scheme) -> QTensor:
    """A table [vocabulary, hidden] rounded to nearest."""
    ranges = MinMax if scheme.bits == 8 else Searched
    quantizer = Quantizer(weight, scheme, weight_slot=Fixed, range_slot=ranges, rounding_slot=Nearest)
    return quantizer.quantize(weight)


def put_table(model: PreTrainedModel, arch: Arch, table: Packed, dtype: torch.dtype) -> None:
    """Put a packed embedding in the place of the model's own; a tied head then multiplies by the same codes."""
    embedding = model.get_submodule(arch.embedding)
    assert isinstance(embedding, nn.Embedding)
    multiplier = float(getattr(embedding, "scalar_embed_scale", 1.0))
    packed = PackedEmbedding(table, multiplier, dtype)
    head = None if arch.head is None else model.get_submodule(arch.head)
    if arch.head is not None and isinstance(head, nn.Linear) and head.weight is embedding.weight:
        model.set_submodule(arch.head, PackedHead(packed))
        for part in model.modules():
            if isinstance(part, PreTrainedModel):  # nothing is left for transformers to tie
                part._tied_weights_keys, part.all_tied_weights_keys = None, {}  # type: ignore[assignment]
    model.set_submodule(arch.embedding, packed)


def quantize_tables(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> PreTrainedModel:
    """Pack the tables of a model in memory, in place; those that `table_schemes` names."""
    arch = discover(model, PackedLinear)
    for name, scheme in schemes.items():
        part: Any = model.get_submodule(name)
        quantized = quantize_table(part.weight.detach(), scheme)
        if name == arch.embedding:
            put_table(model, arch, Packed.from_qtensor(quantized), part.weight.dtype)
        else:
            model.set_submodule(name, PackedLinear.from_qtensor(quantized, part.bias, part.weight.dtype))
    return model
