"""Rotate: a model whose hidden states are turned by a random Hadamard matrix, and computes the same (QuaRot,
arXiv 2404.00456; SpinQuant, arXiv 2405.16406).

    R1: x' = x R in the residual stream.  embedding E R, head and readers W diag(g) R, writers R^T W, norms 1
    R2: v' = v R in each head.            rows of v, columns of o

An outlier is spread over all channels, so that tokens and weights round better. R = diag(signs) H / sqrt(n) commutes
with the root mean square of a norm, not with its weight g, which goes into what reads it. Readers are what a norm
feeds, writers the other linears that are as wide as the stream; whether this is all there is to it is checked
on the first block, so that post-norms, LayerNorms and whatever else doesn't turn are refused. The result is a
Source: nothing behind it knows. Costs nothing when run, but that tied embeddings are no longer tied.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedTokenizerBase

from planish.arch import Arch, discover
from planish.edges import NORM, VALUE, find_edges, is_norm, unit_of
from planish.errors import PlanishError
from planish.quant.hadamard import turn
from planish.skeleton import on_meta, put
from planish.source import Source
from planish.stream import record

TOLERANCE = 1e-4  # of the largest output, in fp64; norms compute in fp32 inside
TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """How a model is turned.

    Args:
        seed: of the signs. values: whether each head's values are turned too.
    """

    seed: int = 0
    values: bool = True

    def of(self, source: Source) -> "RotatedSource":
        """The same model, turned.

        Raises:
            PlanishError: if turning it would change what it computes.
        """
        return RotatedSource(source, self)


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What turns in every block, by names in it.

    Args:
        readers: linear -> the norm that feeds it. writers: linears whose rows are turned.
        units: of each norm, see `edges.Move`. rows, columns: width of the heads of v, and of o.
        values: of a linear in rows, which of its rows are v's; a fused one gives query and key too.
    """

    readers: Mapping[str, str]
    writers: frozenset[str]
    units: Mapping[str, float]
    rows: Mapping[str, int]
    columns: Mapping[str, int]
    values: Mapping[str, Tensor]


class RotatedSource(Source):
    """A source whose tensors are turned as they are read."""

    def __init__(self, base: Source, how: Rotate) -> None:
        self.base, self.how = base, how
        model = base.skeleton()
        # as stored: a block that was loaded once has the dtype that it was computed in
        self.dtypes = {name: part.dtype for name, part in (*model.named_parameters(), *model.named_buffers())}
        self.arch = discover(model)
        hidden = model.config.get_text_config().hidden_size
        self.signs = 1.0 - 2 * torch.randint(0, 2, (hidden,), generator=torch.Generator().manual_seed(how.seed))
        self.turns, self.norm = _turns_of(base, self.arch, how), self._final_norm(model)
        self.unit = unit_of(_real(base, self.norm))
        self._check()
        config = copy.deepcopy(base.config)
        self.untied = self._untie(model)
        if self.untied:
            config.tie_word_embeddings = model.config.tie_word_embeddings = False
        super().__init__(model, config, base.label, base.folder)

    @property
    def note(self) -> str:
        """What it costs."""
        if not self.untied:
            return "rotated"
        rows, columns = self._model.get_parameter(f"{self.arch.embedding}.weight").shape
        return f"rotated; embedding and head are no longer tied, which is {rows * columns / 1e6:.0f} M weights more"

    def names(self) -> list[str]:
        head = [f"{self.arch.head}.weight"] if self.untied else []
        return [*self.base.names(), *head]

    def files(self) -> list[Path]:
        return self.base.files()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.base.tokenizer()

    def tensors(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        return {name: tensor.to(self.dtypes[name]) for name, tensor in super().tensors(names, device).items()}

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        head = f"{self.arch.head}.weight"
        for name in names:
            there = f"{self.arch.embedding}.weight" if self.untied and name == head else name
            for _, tensor in self.base._read([there]):
                yield name, self._turned(name, tensor)

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        if owner == self.arch.embedding:
            return turn(tensor.float(), self.signs)
        if owner == self.norm:
            return torch.full_like(tensor, 1 - self.unit)
        if owner == self.arch.head:
            norm = self.base.get(f"{self.norm}.weight").float() + self.unit
            return turn(tensor.float() * norm.to(tensor.device), self.signs) if leaf == "weight" else tensor
        if not name.startswith(f"{self.arch.blocks}."):
            return tensor
        index, _, inside = owner.removeprefix(f"{self.arch.blocks}.").partition(".")
        block = self.arch.block(int(index))
        gain: Tensor | None = None
        if leaf == "weight" and inside in self.turns.readers:
            reads = self.turns.readers[inside]
            gain = self.base.get(f"{block}.{reads}.weight") + self.turns.units[reads]
        return _turn(self.turns, self.signs, inside, leaf, tensor, gain)

    def _final_norm(self, model: nn.Module) -> str:
        norms = [name for name in self.arch.around if is_norm(model.get_submodule(name))]
        if len(norms) != 1:
            raise PlanishError(f"{self.base.label}: {len(norms)} norms behind the blocks, and one is needed to rotate")
        return norms[0]

    def _untie(self, model: nn.Module) -> bool:
        """Give the head a weight of its own; whether it had none."""
        head = self.arch.head
        if head is None:
            raise PlanishError(f"{self.base.label} has no head, and what it gives can't be turned back")
        first = f"{self.arch.embedding}.weight"
        if model.get_parameter(f"{head}.weight") is not model.get_parameter(first):
            return False
        put(model, f"{head}.weight", on_meta(model.get_parameter(first)))
        self.dtypes[f"{head}.weight"] = self.dtypes[first]
        return True

    def _check(self) -> None:
        """Refuse what doesn't turn, by the first block: block'(x R) must be block(x) R; others must have its parts."""
        base, name = self.base, self.arch.block(0)
        parts = [_linears(base.skeleton().get_submodule(self.arch.block(i))) for i in range(self.arch.num_blocks)]
        block, hidden, arguments = _first_block(base, self.arch)
        turned = copy.deepcopy(block)
        for full, parameter in turned.named_parameters():
            put(turned, full, nn.Parameter(self._turned(f"{name}.{full}", parameter.data).double(), False))
        with torch.no_grad():
            wanted = turn(_run(block, hidden, **arguments), self.signs)
            given = _run(turned, turn(hidden, self.signs), **arguments)
        close = bool((given - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
        if not close or any(part != parts[0] for part in parts):
            raise PlanishError(
                f"{base.label} can't be rotated: turned, its blocks compute something else (norms behind the "
                "linears, LayerNorms); use a recipe without rotate"
            )


def _turn(
    turns: Turns, signs: Tensor, module: str, leaf: str, tensor: Tensor, gain: Tensor | None
) -> Tensor:
    """A parameter of a block, turned; `gain` is what a reader's norm multiplies by."""
    if module in turns.units:
        return torch.full_like(tensor, 1 - turns.units[module])
    value = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if leaf == "weight" and gain is not None:
        value = turn(value * gain.to(value), signs)
    if leaf == "weight" and module in turns.columns:
        value = turn(value.unflatten(1, (-1, turns.columns[module]))).flatten(1)
    if module in turns.rows:
        across, at = value.unsqueeze(0) if leaf == "bias" else value.T, turns.values[module]
        heads = turn(across[:, at].unflatten(1, (-1, turns.rows[module]))).flatten(1)
        across = across.index_copy(1, at.to(across.device), heads)
        value = across[0] if leaf == "bias" else across.T
    if module in turns.writers:
        value = turn(value, signs) if leaf == "bias" else turn(value.T, signs).T
    return value


def _turns_of(base: Source, arch: Arch, how: Rotate) -> Turns:
    block, hidden, arguments = _first_block(base, arch)
    edges = find_edges(block, hidden, arguments, _run)
    norms = {move.module: move.unit for edge in edges if edge.kind == NORM for move in edge.moves if move.how == "down"}
    readers = {
        name: move.module
        for edge in edges
        if edge.kind == NORM
        for move in edge.moves
        if move.how == "down" and move.leaf == "weight"
        for name in edge.takes
    }
    rows, columns, values = dict[str, int](), dict[str, int](), dict[str, Tensor]()
    for edge in edges if how.values else ():
        giver = edge.moves[0].module
        if edge.kind == VALUE and edge.width:
            rows[giver], values[giver] = edge.width, (edge.moves[0].index >= 0).nonzero().flatten()
            columns |= dict.fromkeys(edge.takes, edge.width)
    width = hidden.shape[-1]
    writers = {
        name
        for name, part in block.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == width and name not in readers
    }
    return Turns(readers=readers, writers=frozenset(writers), units=norms, rows=rows, columns=columns,
                 values=values)  # fmt: skip


def _first_block(base: Source, arch: Arch) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The first block in fp64, some hidden states that enter it, and its other arguments."""
    cpu = torch.device("cpu")
    with base.lend(arch.around, cpu, torch.float32) as model:
        blocks = model.get_submodule(arch.blocks)
        assert isinstance(blocks, nn.ModuleList)
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
        hidden, arguments = record(model.get_submodule(arch.decoder), blocks, ids, every_block=False)
    with base.lend([arch.block(0)], cpu) as model:
        block = copy.deepcopy(model.get_submodule(arch.block(0))).double()
    wide: dict[str, Any] = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments[0])
    return block, hidden.double(), wide


def _real(base: Source, name: str) -> nn.Module:
    with base.lend([name], "cpu") as model:
        return copy.deepcopy(model.get_submodule(name))


def _linears(block: nn.Module) -> set[str]:
    return {name for name, part in block.named_modules() if isinstance(part, nn.Linear)}


def _run(block: nn.Module, hidden: Tensor, **arguments: Any) -> Tensor:
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output
