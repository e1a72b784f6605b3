"""Inside: a float model whose linears get factors of low rank inside their quantizers, and what it may start from.

    put_inside(model, stage, schemes)                  a model in memory; it keeps its weights
    inside_layers(source, stage, schemes, ...)         layer by layer from a source; of 8 bits, no more is ever held

A stage may start from a checkpoint of the same model: its grids are taken over, and a weight that they would round
to another code than the checkpoint has moves just into that code's cell, so that the start computes what the
checkpoint does. Knows nothing of training.
"""

import functools
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.fit.whole import EndToEnd, Inside
from planish.folder import QuantizedFolder
from planish.log import RunManifest
from planish.qtensor import QTensor, encode, from_groups, to_groups
from planish.quant import Given, QLinear, Quantizer, grid_of
from planish.scheme import Scheme
from planish.source import Source

CELL = 0.4  # of a step: how far from its middle a weight may lie that is moved into a cell


def open_start(path: str | os.PathLike[str]) -> QuantizedFolder:
    """The checkpoint that a stage starts from.

    Raises:
        PlanishError: if it isn't quantized.
    """
    folder = QuantizedFolder.open(path)
    if folder is None:
        raise PlanishError(f"start={path} isn't quantized; give a folder that Planish wrote, or drop start")
    return folder


def scheme_text(folder: QuantizedFolder) -> str:
    """The scheme that a checkpoint was asked for."""
    manifest = RunManifest.read(folder.source.folder) if folder.source.folder else None
    return manifest.scheme if manifest and manifest.scheme else str(next(iter(folder.schemes.values())))


def check_inside(
    stage: EndToEnd, schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]], start: QuantizedFolder | None
) -> None:
    """Refuse a rank that a layer doesn't have, and a start of other layers or schemes; before any work.

    Args:
        schemes: of the linears to be trained. shapes: (out, in) of these, at least.

    Raises:
        PlanishError: naming the layer.
    """
    assert stage.inside is not None
    for name in schemes:
        if stage.inside.rank > min(shapes[name]):
            raise PlanishError(
                f"rank={stage.inside.rank} is above {min(shapes[name])}, the smaller side of {name}; give less"
            )
    if start is None:
        return
    label = start.source.label
    for name in sorted(schemes.keys() | start.schemes.keys()):
        ours, theirs = schemes.get(name, "16 bits"), start.schemes.get(name, "16 bits")
        if str(ours) != str(theirs):
            raise PlanishError(f"start={label} has {name} in {theirs}, not {ours}; give its own scheme, or drop scheme")
        if name in start.schemes and start.shapes[name] != shapes[name]:
            raise PlanishError(f"start={label} is of another model: {name} has another shape")


def put_inside(model: nn.Module, stage: EndToEnd, schemes: Mapping[str, Scheme], start: QuantizedFolder | None) -> None:
    """Put quantizers with factors on linears of a float model, in place."""
    for name, scheme in schemes.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _inside(linear, stage.inside, scheme, _started(start, name)))


def inside_layers(
    source: Source,
    stage: EndToEnd,
    schemes: Mapping[str, Scheme],
    device: torch.device,
    dtype: torch.dtype,
    start: QuantizedFolder | None,
) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of each linear with factors, on the device, one at a time; for `folder.assemble`."""
    skeleton = source.skeleton()
    for name, scheme in schemes.items():
        part = skeleton.get_submodule(name)
        assert isinstance(part, nn.Linear)
        linear = nn.Linear(part.in_features, part.out_features, part.bias is not None, device="meta")
        for leaf, _ in list(linear.named_parameters()):
            tensor = source.get(f"{name}.{leaf}").to(device, dtype)
            setattr(linear, leaf, nn.Parameter(tensor, requires_grad=False))
        yield name, _inside(linear, stage.inside, scheme, _started(start, name))


def _started(start: QuantizedFolder | None, name: str) -> QTensor | None:
    if start is None:
        return None
    held = start.stream(name).qtensor()
    if held.order is not None:
        raise PlanishError(f"start={start.source.label}: {name} has columns in an order of their own; quantize anew")
    return held


def _inside(linear: nn.Linear, inside: Inside | None, scheme: Scheme, held: QTensor | None) -> QLinear:
    assert inside is not None
    built = inside.range_slot()
    if held is not None:
        held = held.to(linear.weight.device)
        moved = moved_into_cells(linear.weight.detach(), held, every=inside.in_8_bits)
        linear.weight = nn.Parameter(moved, requires_grad=False)
        built = inside.range_slot(functools.partial(Given, grid=grid_of(held)))
    quantizer = Quantizer(linear.weight.detach(), scheme, weight_slot=inside.weight_slot, range_slot=built)
    if inside.in_8_bits:
        linear.weight.data = linear.weight.data.new_empty(0)  # the quantizer has what it needs
    return QLinear(linear, quantizer, scheme.activations)


def moved_into_cells(weight: Tensor, held: QTensor, every: bool = False) -> Tensor:
    """The weight [out, in], but where its code isn't the one that is held: there it lies just inside that cell.

    Args:
        every: keep all weights off the ends of their cells, where 8 bits could put them on the other side.
    """
    grid = grid_of(held)
    groups = to_groups(weight.float(), held.group_size)
    codes = from_groups(encode(groups, grid.scale, grid.zero, held.bits, offset=grid.offset), weight.shape[1])
    middle, reach = held.dequantize(), from_groups((CELL * grid.scale.abs()).expand_as(groups), weight.shape[1])
    inside = middle + torch.clamp(weight.float() - middle, -reach, reach)
    stays = torch.zeros_like(codes, dtype=torch.bool) if every else codes == held.codes
    return torch.where(stays, weight, inside.to(weight.dtype))
