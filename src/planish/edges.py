"""Edges: who consumes whose output in a block, found by one forward pass with dyed tensors.

An edge is a vector of channels between two sides with nothing in between but what lets a factor through:

    norm -> linears   what a norm gives is what linears take: its weight / s, their columns * s
    value -> output   rows of v pass the attention's mean into columns of o: rows / s, columns * s
    query <-> key     rows, or the weights of their norms, meet in a product: q / s, k * s

In the pass every norm and linear gives its dye instead of what it computes: in channel c the number of the module
and c. What arrives in a linear or an attention, through views, copies and repeated heads, says where it comes from,
so that no family of models is named. Rotary embeddings mix channels in pairs; which, is tried. In the end each
edge is held against the block: moved at random, its output must be the same, or the edge isn't one.

Knows nothing of what s is good for, nor of quantizers.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from planish.experts import Experts, everywhere, gates

NORM, VALUE, QUERY = "norm", "value", "query"
TOLERANCE = 1e-3  # of the largest output, in fp32: a wrong edge is off by a share of it
_APART = 2**24  # dyes of two modules

Run = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Move:
    """What an edge does to one parameter.

    Args:
        module: name in the block. leaf: "weight" or "bias".
        how: "down" divides rows by s (a bias first loses the shift), "up" multiplies rows by s, "columns"
            multiplies columns by s (a bias gains W times the shift).
        index: entry of s for each row or column, -1 for none.
        unit: what the module itself adds to its weight.
    """

    module: str
    leaf: str
    how: str
    index: Tensor
    unit: float = 0.0

    def __call__(self, value: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """The parameter moved, at least in fp32; `weight` is a bias's own, [out, in] before it was moved."""
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        factor = self._entries(scale, 1.0)
        if self.how == "columns" and self.leaf == "weight":
            return value * factor
        offset = None if shift is None else self._entries(shift, 0.0)
        if self.how == "columns":
            assert weight is not None and offset is not None
            return value + weight.to(value.dtype) @ offset.to(value.dtype)
        factor = factor.unsqueeze(-1) if value.ndim == 2 else factor
        if self.how == "up":
            return (value + self.unit) * factor - self.unit
        if self.leaf == "bias" and offset is not None:
            value = value - offset
        return (value + self.unit) / factor - self.unit

    def _entries(self, vector: Tensor, none: float) -> Tensor:
        """A vector's entry of each row or column."""
        if self.whole and len(vector) == len(self.index):  # the gradient of a choice is dear
            return vector
        return torch.cat([vector, vector.new_full((1,), none)])[self.index.to(vector.device)]

    @functools.cached_property
    def whole(self) -> bool:
        """Does each row or column have the entry of its own number? Of meta tensors it is taken for granted."""
        if self.index.is_meta:
            return True
        return self.index.tolist() == list(range(len(self.index)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Edge:
    """A vector of `size` channels, and all that it moves.

    Args:
        kind: NORM, VALUE or QUERY.
        width: channels of a head, of a VALUE edge.
        takes: linears (and routers) whose columns are moved. shifts: whether both sides have a bias to hold a shift.
    """

    kind: str
    size: int
    moves: tuple[Move, ...]
    width: int = 0
    takes: dict[str, Tensor] = field(default_factory=dict)
    shifts: bool = False


# of several edges that exclude each other the freest first
Proposals = Sequence[Sequence[Edge]]


def find_edges(
    block: nn.Module, hidden: Tensor, arguments: Mapping[str, Any], run: Run, among: Proposals | None = None
) -> list[Edge]:
    """The edges of a block, those of norms first.

    Args:
        block: decoder block with its weights; it is left as it is.
        hidden: what enters it, [1, tokens, hidden], two tokens at least.
        arguments: its others.
        run: (block, hidden, **arguments) -> what it gives.
        among: where on meta dyes can't be read, `proposals`; then the freest of them are taken.
    """
    probe, kind = copy.deepcopy(block).double(), torch.float64  # which tells dyes apart

    def forward(values: Tensor) -> Tensor:
        cast = tree_map_only(Tensor, lambda t: t.to(kind) if t.is_floating_point() else t, dict(arguments))
        return run(probe, values.to(kind), **cast)

    with torch.no_grad():
        dyes = _Dyes(probe)
        with dyes:
            forward(hidden)
        probe, kind = probe.float(), torch.float32  # attention's memory is then that of its inputs
        wanted = forward(hidden)
        found: list[Edge] = []
        for choices in _proposals(dyes) if among is None else among:
            found += next(([edge] for edge in choices if _holds(edge, probe, forward, hidden, wanted)), [])
    return found


def proposals(block: nn.Module, hidden: Tensor, arguments: Mapping[str, Any], run: Run) -> Proposals:
    """What `find_edges` tries, of a block whose weights may be on meta.

    Args:
        hidden, arguments: on meta or not; as of `find_edges`, and two tokens are enough.
    """

    def real(value: Tensor) -> Tensor:
        return torch.ones_like(value, device="cpu") if value.is_meta else value

    norms = [parameter for part in block.modules() if is_norm(part) for parameter in part.parameters()]
    memo: dict[int, Any] = {id(norm): nn.Parameter(real(norm.data), requires_grad=False) for norm in norms}
    probe = copy.deepcopy(block, memo | {id(buffer): real(buffer) for buffer in block.buffers()}).double()
    with torch.no_grad(), _Dyes(probe) as dyes:
        run(probe, real(hidden).double(), **tree_map_only(Tensor, real, dict(arguments)))
    return list(_proposals(dyes))


class _Dyes(TorchFunctionMode):
    """While it lasts, modules give their dyes, and what arrives in them is noted, all of the first token."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.handles = block, list[Any]()
        dyed = {name: m for name, m in block.named_modules() if is_norm(m) or isinstance(m, nn.Linear)}
        self.names = list(dyed)
        # a router takes, but what it gives are no channels
        self.modules = dyed | {name: block.get_submodule(name) for name in gates(block)}
        self.arrived: dict[str, Tensor] = {}
        self.attended: list[tuple[Tensor, Tensor, Tensor]] = []

    def __enter__(self) -> "_Dyes":
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_pre_hook(self._note(name)))
        for number, name in enumerate(self.names):
            self.handles.append(self.modules[name].register_forward_hook(self._dye(number + 1)))
        for module in self.block.modules():
            if isinstance(module, Experts):
                self.handles.append(module.register_forward_pre_hook(everywhere))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _note(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.arrived[name] = args[0].flatten(0, -2)[0].clone()

        return hook

    @staticmethod
    def _dye(number: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            channels = torch.arange(output.shape[-1], dtype=torch.float64, device=output.device)
            return (number * _APART + channels).expand_as(output).clone()

        return hook

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and args[1].is_meta:  # what it gives is dyed anyhow
            return args[0].new_zeros(*args[0].shape[:-1], len(args[1]))
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        heads = query.shape[1]
        key, value = (part.repeat_interleave(heads // part.shape[1], 1) for part in (key, value))
        self.attended.append((query[0, :, 0], key[0, :, 0], value[0, :, 0]))
        return value  # as if each token attended to itself alone

    def read(self, values: Tensor) -> tuple[str, Tensor] | None:
        """The module and its channels that dyed values are of, if all are of one; a common factor is allowed."""
        flat = values.flatten().double()
        step = (flat[1] - flat[0]).abs() if len(flat) > 1 else flat.new_ones(())
        for factor in (1.0, float(step)):
            if not factor > 0:
                continue
            dyes = flat / factor
            whole, number = dyes.round(), int(dyes[0].round()) // _APART
            near = bool(((dyes - whole).abs() < 1e-3).all()) and 0 < number <= len(self.names)
            if near and bool((whole.div(_APART, rounding_mode="floor") == number).all()):
                name = self.names[number - 1]
                return name, (whole % _APART).long().view_as(values)
        return None


def is_norm(module: nn.Module) -> bool:
    """Has it a weight for each channel?"""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1


def _proposals(dyes: _Dyes) -> Iterator[Sequence[Edge]]:
    """What may be edges; of several that exclude each other the freest first."""
    sources: dict[str, list[str]] = {}
    for name, values in dyes.arrived.items():
        found = None if is_norm(dyes.modules[name]) else dyes.read(values)
        if found and is_norm(dyes.modules[found[0]]) and torch.equal(found[1].cpu(), torch.arange(len(values))):
            sources.setdefault(found[0], []).append(name)
    for norm, takes in sources.items():
        index = torch.arange(len(dyes.modules[norm].get_parameter("weight")))
        yield [_towards_columns(NORM, dyes.modules, {norm: index}, {name: index for name in takes}, len(index))]
    for query, key, value in dyes.attended:
        gives = dyes.read(value)
        if gives and isinstance(dyes.modules[gives[0]], nn.Linear):
            yield from _value_edges(dyes, gives)
        rows, columns = dyes.read(query), dyes.read(key)
        if rows and columns and query.shape == key.shape:
            yield [edge for tie in (_free, _halves, _neighbours) if (edge := _query_edge(dyes, rows, columns, tie))]


def _value_edges(dyes: _Dyes, gives: tuple[str, Tensor]) -> Iterator[Sequence[Edge]]:
    name, rows = gives[0], gives[1].unique().cpu()
    at = torch.full((dyes.modules[name].out_features,), -1)  # type: ignore[arg-type]
    at[rows] = torch.arange(len(rows))
    for taker, values in dyes.arrived.items():
        found = dyes.read(values)
        if found and found[0] == name and isinstance(dyes.modules[taker], nn.Linear):
            edge = _towards_columns(VALUE, dyes.modules, {name: at}, {taker: at[found[1].cpu()]}, len(rows))
            yield [dataclasses.replace(edge, width=gives[1].shape[-1])]


def _towards_columns(
    kind: str, modules: Mapping[str, nn.Module], gives: dict[str, Tensor], takes: dict[str, Tensor], size: int
) -> Edge:
    """What is divided on one side is multiplied into columns on the other."""
    shifts = all(getattr(modules[name], "bias", None) is not None for name in (*gives, *takes))
    moves = []
    for name, index in gives.items():
        moves.append(Move(module=name, leaf="weight", how="down", index=index, unit=unit_of(modules[name])))
        if getattr(modules[name], "bias", None) is not None:
            moves.append(Move(module=name, leaf="bias", how="down", index=index))
    for name, index in takes.items():
        # the bias first: it needs the weight as it was
        if shifts:
            moves.append(Move(module=name, leaf="bias", how="columns", index=index))
        moves.append(Move(module=name, leaf="weight", how="columns", index=index))
    return Edge(kind=kind, size=size, moves=tuple(moves), takes=takes, shifts=shifts)


def _free(channel: Tensor, width: int) -> Tensor:
    return channel


def _halves(channel: Tensor, width: int) -> Tensor:
    """Channels c and c + width / 2 of a head are turned together."""
    return channel % (width // 2)


def _neighbours(channel: Tensor, width: int) -> Tensor:
    return channel // 2


def _query_edge(
    dyes: _Dyes, query: tuple[str, Tensor], key: tuple[str, Tensor], tie: Callable[[Tensor, int], Tensor]
) -> Edge | None:
    """Both sides' channels by the key's head and the pair in it; None if a channel would be in two."""
    (q_name, q_rows), (k_name, k_rows) = query, key
    heads, width = k_rows.shape
    _, head = k_rows[:, 0].cpu().unique(return_inverse=True)
    entry = head.unsqueeze(1) * width + tie(torch.arange(width), width)
    entries, entry = entry.unique(return_inverse=True)
    moves = []
    for name, rows, how in ((q_name, q_rows.cpu(), "down"), (k_name, k_rows.cpu(), "up")):
        module = dyes.modules[name]
        index = torch.full((len(module.get_parameter("weight")),), -1)
        index[rows.flatten()] = entry.flatten()
        if not torch.equal(index[rows], entry):
            return None
        moves.append(Move(module=name, leaf="weight", how=how, index=index, unit=unit_of(module)))
        if getattr(module, "bias", None) is not None:
            moves.append(Move(module=name, leaf="bias", how=how, index=index))
    return Edge(kind=QUERY, size=len(entries), moves=tuple(moves))


def unit_of(module: nn.Module) -> float:
    """1 if a norm multiplies by 1 + its weight: with a weight of -1 it then gives nothing."""
    if not is_norm(module):
        return 0.0
    weight = module.get_parameter("weight")
    test = copy.deepcopy(module)
    test.get_parameter("weight").data.fill_(-1)
    values = torch.randn(2, len(weight), dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    given = test(values.to(weight.device))
    return 1.0 if bool((given == given[:1]).all()) else 0.0


def _holds(edge: Edge, probe: nn.Module, forward: Callable[[Tensor], Tensor], hidden: Tensor, wanted: Tensor) -> bool:
    """Does the block give the same when the edge is moved at random?"""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(edge.size, generator=generator).to(hidden.device) for _ in range(2)]
    scale, shift = (0.5 * draw[0]).exp(), draw[1] if edge.shifts else None
    kept = []
    for move in edge.moves:
        module = probe.get_submodule(move.module)
        parameter = module.get_parameter(move.leaf)
        kept.append((parameter, parameter.data))
        parameter.data = move(parameter.data, scale, shift, module.get_parameter("weight").data)
    given = forward(hidden)
    for parameter, value in reversed(kept):  # a fused linear is moved more than once
        parameter.data = value
    return bool((given - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
