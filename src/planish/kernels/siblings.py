"""Siblings: layers that are given the same x (q, k and v; gate and up), multiplied by in one product.

    y = x [W_1; W_2; ...]^T,   each member takes its own outputs of y

Their records lie in one tensor, of which each member holds its part: so they keep names, weights and files of their
own. Who is a sibling is seen in one pass of the model without numbers: layers that are given the very same tensor.
Whether they really are is asked again at each call, so that a wrong guess costs time and never a result.

The first member that is called with some x makes y; the others find it as long as x is the same object and nothing
was written into it since, by what autograd goes by to know that. While a graph is traced nothing is remembered: each
member multiplies by its own part, or where `Merge` is among the compiler's passes (`merging`) by the whole, of which
the compiler then makes one.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from planish.kernels.gemv_layout import TILE
from planish.kernels.linear import PackedLinear, packed_layers
from planish.kernels.records import multiply, reads

Model = TypeVar("Model", bound=nn.Module)
Span = tuple[int, int]
_MERGED = ("planish.packed_", "aten.view.", "aten.reshape.", "aten.index_select.")  # a product, and how x comes to it


@dataclass(frozen=True)
class _Product:
    """y of an x, for the members that have yet to take their part."""

    x: Tensor
    stamp: tuple[int, object]
    y: Tensor
    waiting: set[Span]


class Siblings:
    """Joins layers; they must agree in bits, groups, zero points, inputs and the order of these.

    Args:
        members: held as records, with outputs in whole tiles.
    """

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        first = members[0]
        assert first.layout is not None
        self.order = first.order
        self.layout = first.layout._replace(out_features=sum(member.out_features for member in members))
        self.records = torch.cat([member.records for member in members if member.records is not None])
        torch._dynamo.mark_static_address(self.records)
        self.spans: list[Span] = []
        self.merging = False  # whether what members state while a graph is traced is made one
        self._product: _Product | None = None
        start = 0
        for member in members:
            stop = start + member.out_features
            member.records = self.records[start // TILE : stop // TILE]
            member.siblings, member.span = self, (start, stop)
            self.spans.append((start, stop))
            start = stop

    def product(self, member: PackedLinear, x: Tensor) -> Tensor:
        """What `member` makes of x [..., in]; no gradient."""
        assert member.records is not None and member.layout is not None and member.span is not None
        start, stop = member.span
        traced = torch.compiler.is_compiling()
        if not self.merging if traced else x.is_inference():  # tensors of inference mode don't say what was written
            return multiply(self._ordered(x), member.records, member.layout, member.bias)
        y = self._multiply(x) if traced else self._remembered(member.span, x)
        part = y[..., start:stop]
        return part if member.bias is None else part + member.bias.to(part.dtype)

    def _remembered(self, span: Span, x: Tensor) -> Tensor:
        stamp = x._version, torch.cuda.current_stream(x.device) if x.is_cuda else None
        known = self._product
        if known is None or known.x is not x or known.stamp != stamp or span not in known.waiting:
            known = self._product = _Product(x, stamp, self._multiply(x), set(self.spans))
        known.waiting.discard(span)
        if not known.waiting:
            self._product = None
        return known.y

    def _multiply(self, x: Tensor) -> Tensor:
        return multiply(self._ordered(x), self.records, self.layout)

    def _ordered(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(-1, self.order)


class Merge(CustomGraphPass):
    """A pass of torch's compiler over a graph without side effects: equal products of equal x become one."""

    def __call__(self, graph: fx.Graph) -> None:
        known: dict[object, fx.Node] = {}
        for node in list(graph.nodes):
            if node.op == "call_function" and str(node.target).startswith(_MERGED):
                first = known.setdefault((node.target, str(node.args), str(node.kwargs)), node)
                if first is not node:
                    node.replace_all_uses_with(first)
                    graph.erase_node(node)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))  # what was compiled is kept on disk for as long as the pass is the same


@contextmanager
def merging(model: nn.Module) -> Iterator[None]:
    """For as long as it lasts, graphs of this model must be compiled with `Merge` among the passes."""
    joined = {layer.siblings for layer in packed_layers(model).values() if layer.siblings is not None}
    for siblings in joined:
        siblings.merging = True
    try:
        yield
    finally:
        for siblings in joined:
            siblings.merging = False


def settle(model: Model) -> Model:
    """Make a model that isn't trained fast, in place: where a GPU reads records layers hold them, siblings joined."""
    for layer in packed_layers(model).values():
        if type(layer) is PackedLinear and layer.records is None and reads(layer.codes.device, _dtype(model)):
            layer.to_records()
    join(model)
    return model


def join(model: nn.Module) -> None:
    """Join the siblings among layers that are held as records; where Humming takes many rows, lay them out for it."""
    for members in _given_the_same(model):
        kinds: dict[object, list[PackedLinear]] = {}
        for member in members:
            layout, order = member.layout, member.order
            if layout is not None and layout.out_features % TILE == 0 and member.siblings is None:
                ordered = None if order is None else tuple(order.tolist())
                kinds.setdefault((layout[:3], layout.in_features, ordered), []).append(member)
        for alike in kinds.values():
            if len(alike) > 1:
                Siblings(alike)
    dtype = _dtype(model)
    for member in packed_layers(model).values():
        member.lay_out(dtype)
    for device in {member.records.device for member in packed_layers(model).values() if member.records is not None}:
        if device.type == "cuda":  # a kernel that overlaps reads records before the kernels ahead of it have ended
            torch.cuda.synchronize(device)


def _given_the_same(model: nn.Module) -> list[list[PackedLinear]]:
    """Layers held as records, by the tensor they are given in a pass of one token, on meta; one block for its kin."""
    held = {name: layer for name, layer in packed_layers(model).items() if layer.records is not None}
    given: dict[tuple[int, int], tuple[Tensor, dict[str, None]]] = {}  # holds tensors, so that no id comes twice
    if not held:
        return []
    kin = _alike(model, held)
    twin = _on_meta(model, [other for _, *others in kin for other in others])

    def see(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        given.setdefault((id(args[0]), args[0]._version), (args[0], {}))[1][name] = None

    for name, layer in twin.named_modules():
        if name in held:
            layer.register_forward_pre_hook(partial(see, name))
    with suppress(Exception), torch.no_grad():  # what can't run without numbers is joined as far as it came
        twin(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="meta"), use_cache=True)  # else masks ask for them
    found = []
    for _, names in given.values():
        blocks = next((blocks for blocks in kin if all(name.startswith(f"{blocks[0]}.") for name in names)), [""])
        found += [[held[block + name.removeprefix(blocks[0])] for name in names] for block in blocks]
    return found


def _alike(model: nn.Module, held: Iterable[str]) -> list[list[str]]:
    """Names of blocks, those made of the same modules together: what one of them shows is true of all."""
    kinds, outer = dict[object, list[str]](), "-"
    for name, module in model.named_modules():
        if name and isinstance(module, nn.ModuleList) and not name.startswith(f"{outer}."):
            outer = name
            for number, block in module.named_children():
                parts = [(part, type(kind), f"{name}.{number}.{part}" in held) for part, kind in block.named_modules()]
                kinds.setdefault((name, *parts), []).append(f"{name}.{number}")
    return list(kinds.values())


def _on_meta(model: nn.Module, without: Iterable[str]) -> nn.Module:
    """A copy that takes no memory; of its lists some members are left out, and the others keep their names."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, object] = {id(tensor): tensor.to("meta") for tensor in tensors}
    memo |= {id(layer.laid): None for layer in packed_layers(model).values()}
    memo |= {id(model.get_submodule(name)): None for name in without}
    twin = copy.deepcopy(model, memo)
    for name in without:
        del twin.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]]
    return twin


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
