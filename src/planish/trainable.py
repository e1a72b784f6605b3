"""Prepare and convert: a model whose only trainable tensors are a recipe's, for any trainer; and back.

    model = planish.prepare(planish.load("q2"), "e2e_qp")                   a packed model: its scales learn
    model = planish.prepare(float_model, "block_ap", "w2g64")               a float one: quantizers on its linears
    model = planish.prepare(float_model, "l4q", "w4g128")                   factors of low rank inside them
    groups = planish.parameter_groups(model, "l4q")                         for an optimizer, each with its own rate
    ... train it with transformers' Trainer, TRL or a loop of your own ...
    planish.convert(model); planish.save(model, "out")

What was trained is what is packed, bit for bit. Knows nothing of data, losses or files.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.utils import is_accelerate_available

from planish.arch import discover, linears
from planish.errors import PlanishError
from planish.fit.norms import free, norms_of, settle
from planish.fit.reconstruct import NORM, slot_groups
from planish.fit.spans import Stage
from planish.fit.watch import peak_rates
from planish.fit.whole import EndToEnd
from planish.hf import attach
from planish.inside import check_inside, moved_into_cells, open_start, put_inside
from planish.kernels import siblings
from planish.kernels.embedding import PackedEmbedding
from planish.kernels.linear import PackedLinear, packed_layers
from planish.quant import Given, Learned, QLinear, Quantizer, Steps, grid_of
from planish.recipes import build
from planish.scheme import SchemeMap

# from so many bits on weights that are trained move so much faster, in steps: of a finer grid one is less of a weight.
# Empirical: SmolLM2, 2 and 3 bits at 3e-3, 4 bits at 1e-2
FINE, FASTER = 4, 10 / 3
STRANGE = 0.6  # of a step: a float weight further than this from W_hat, on average, isn't what it was made of


def prepare(
    model: PreTrainedModel,
    recipe: str,
    scheme: str | None = None,
    *,
    preset: str | None = None,
    layers: Iterable[str] = (),
    ignore: Iterable[str] = (),
    **keys: Any,
) -> PreTrainedModel:
    """Mark, in place, what a recipe trains; everything else is frozen.

    Args:
        model: quantized (of `load` or `quantize`), for a recipe that trains it as a whole; or float.
        scheme, layers, ignore: of a float model, as of `quantize`.
        preset, keys: the recipe's.

    Returns:
        The model itself.

    Raises:
        PlanishError: if the recipe trains nothing, or needs another kind of model.
    """
    built = build(recipe, preset, keys)
    model.requires_grad_(False)
    if built.whole is not None and built.whole.inside is not None:
        _prepare_inside(model, built.whole, scheme, layers, ignore)
        return model
    if packed_layers(model) or (built.whole is not None and not built.blocks):
        if built.whole is None or built.blocks:
            raise PlanishError(f"the model is quantized already, and {recipe} quantizes; give the 16-bit original")
        free_slots(model, built.whole)
        return model
    stage = next((stage for stage in built.blocks if stage.fit is not None), None)
    if stage is None:
        raise PlanishError(f"recipe {recipe!r} trains nothing; use quantize")
    if scheme is None:
        raise PlanishError(f"recipe {recipe!r} needs a scheme for a float model, such as w2g64")
    _attach(model, stage, SchemeMap.parse(scheme, layers, ignore))
    return model


def convert(model: PreTrainedModel) -> PreTrainedModel:
    """Pack, in place, what `prepare` made trainable; the model then computes what it was trained to."""
    # by name, so that those that are packed are let go one by one
    for name in [name for name, module in model.named_modules() if isinstance(module, PackedLinear | QLinear)]:
        module = model.get_submodule(name)
        if isinstance(module, PackedLinear):
            module.freeze()
        elif isinstance(module, QLinear) and module.quantizer is not None:
            quantized = module.quantizer.quantize(module.weight)
            how, shared = module.activations, module.quantizer.scheme.shared
            _put(model, name, PackedLinear.from_qtensor(quantized, module.bias, module.weight.dtype, how, shared))
    settle({name: module for name, module in model.named_modules() if parametrize.is_parametrized(module)})
    return attach(siblings.settle(model.requires_grad_(False)))


def parameter_groups(
    model: PreTrainedModel, recipe: str, *, preset: str | None = None, **keys: Any
) -> list[dict[str, Any]]:
    """What a whole-model recipe trains of a prepared model, for a torch optimizer: groups, each with its peak rate and
    weight decay.

    Args:
        model: of `prepare`, by the same recipe, preset and keys.

    Raises:
        PlanishError: if the recipe trains no whole model.
    """
    stage = build(recipe, preset, keys).whole
    if stage is None:
        raise PlanishError(f"recipe {recipe!r} trains no whole model, and its rates are of blocks; choose your own")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, rate, decay in peak_rates(free_slots(model, stage), stage):
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()]


def _prepare_inside(
    model: PreTrainedModel, stage: EndToEnd, scheme: str | None, layers: Iterable[str], ignore: Iterable[str]
) -> None:
    assert stage.inside is not None
    if packed_layers(model):
        raise PlanishError(f"the model is quantized already, and {stage.name} keeps the float one; give that")
    start = open_start(stage.inside.start) if stage.inside.start else None
    if scheme is None and start is None:
        raise PlanishError(f"{stage.name} needs a scheme for a float model, such as w4g128")
    shapes = linears(discover(model), model)
    schemes = SchemeMap.parse(scheme, layers, ignore).resolve(shapes) if scheme else dict(start.schemes)  # type: ignore[union-attr]
    check_inside(stage, schemes, shapes, start)
    put_inside(model, stage, schemes, start)
    free_slots(model.requires_grad_(False), stage)


# slot of a stage with factors inside -> what a quantizer calls it
INSIDE = {"factors": "weight", "scale": "range.scale", "zero": "range.zero", "offset": "range.offset"}


def _free_inside(model: PreTrainedModel, stage: EndToEnd) -> dict[str, list[tuple[nn.Parameter, float]]]:
    """By slot what there is; a symmetric grid has no zero points."""
    layers = [module for module in model.modules() if isinstance(module, QLinear) and module.quantizer is not None]
    if not layers:
        raise PlanishError(f"{stage.name} trains what planish.prepare made of a float model; prepare it first")
    found: dict[str, list[tuple[nn.Parameter, float]]] = {}
    for slot in stage.rates:
        pairs = [pair for layer in layers for pair in layer.quantizer.trainable(INSIDE[slot])]  # type: ignore[union-attr]
        found |= {slot: pairs} if pairs else {}
    for parameter, _ in (pair for pairs in found.values() for pair in pairs):
        parameter.requires_grad_(True)
    return found


def free_slots(
    model: PreTrainedModel, stage: EndToEnd, floats: Callable[[str], Tensor] | None = None
) -> dict[str, list[tuple[nn.Parameter, float]]]:
    """Make the slots of a whole-model stage trainable; the parameters by slot, with the units of their rates.

    Args:
        floats: name -> float weight [out, in] of a linear that was packed, where the float model is at hand: weights
            that are trained start from it. See `_thaw`.

    Raises:
        PlanishError: if the model isn't quantized, or lacks what is to be trained.
    """
    if stage.inside is not None:
        return _free_inside(model, stage)
    packed = packed_layers(model)
    if not packed:
        raise PlanishError(f"{stage.name} trains a quantized model, and this one isn't; quantize it first")
    if any(isinstance(layer, PackedEmbedding) for layer in packed.values()):
        raise PlanishError(f"{stage.name} needs the embedding in 16 bits; quantize it last, with planish export")
    found: dict[str, list[tuple[nn.Parameter, float]]] = {slot: [] for slot in stage.rates}
    if "norm" in found:
        arch = discover(model, PackedLinear)
        norms = norms_of({name: model.get_submodule(name) for name in map(arch.block, range(arch.num_blocks))})
        found["norm"] = [(master, master.detach().abs().mean().item()) for master in free(norms)]
    for name, layer in packed.items():
        layer.to_codes()
        step = layer.scale.detach().abs().float().mean().item()
        slots = [slot for slot in stage.rates if slot != "norm" and (slot != "zero" or not layer.symmetric)]
        freed = _thaw(model, name, layer, slots, floats) if "weight" in slots else layer.make_trainable(slots)
        for slot, parameter in freed.items():
            faster = FASTER if slot == "weight" and layer.scheme.bits >= FINE else 1.0
            found[slot].append((parameter, step if slot == "scale" else faster))
    for slot, parameters in found.items():
        if slot == "norm" and not parameters:
            raise PlanishError("the blocks have no norm with a weight to train; drop norm_rate")
        if not parameters:
            raise PlanishError(
                f"a symmetric grid has no {slot} to train; drop {slot}_rate, or quantize with zero points"
            )
    return found


def _thaw(
    model: PreTrainedModel,
    name: str,
    layer: PackedLinear,
    slots: Iterable[str],
    floats: Callable[[str], Tensor] | None,
) -> dict[str, nn.Parameter]:
    """Put a linear whose weight is rounded anew at each step in the place of a packed one; its parameters by slot.

    No code changes at first. The weight starts where the float one lies in its code's cell, so that those change
    first whose rounding was a near thing; without a float one from W_hat, the middle of each cell, half a step from
    any other code.
    """
    held = layer.qtensor()
    if held.order is not None or held.offset is not None:
        raise PlanishError(f"{name} has columns in another order, or offsets, and its codes can't be trained")
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[assignment]
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(held.dequantize(dtype))
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias)
    start = held.dequantize(torch.float32)
    if floats is not None:
        weight = floats(name).to(start)
        # a transform in between, such as a rotation, made another weight of it
        if (weight - start).abs().mean() < STRANGE * held.scale.abs().float().mean():
            start = moved_into_cells(weight, held, every=True)
    grid = grid_of(held)
    quantizer = Quantizer(
        start,
        layer.scheme,
        weight_slot=functools.partial(Steps, scale=grid.scale),
        range_slot=functools.partial(Learned, start=functools.partial(Given, grid=grid)),
    ).requires_grad_(False)
    parameters = {"weight": "weight.value", "scale": "range.scale", "zero": "range.zero"}
    _put(model, name, QLinear(linear, quantizer, layer.activations))
    freed = {slot: quantizer.get_parameter(parameters[slot]) for slot in slots}
    for parameter in freed.values():
        parameter.requires_grad_(True)
    return freed


def check_trainer() -> None:
    """Refuse a whole-model stage where transformers' Trainer can't run.

    Raises:
        PlanishError: if accelerate isn't installed.
    """
    if not is_accelerate_available():
        raise PlanishError("training the whole model needs accelerate; pip install accelerate")


def _attach(model: PreTrainedModel, stage: Stage, schemes: SchemeMap) -> None:
    assert stage.fit is not None
    arch = discover(model)
    resolved = schemes.resolve(linears(arch, model))
    blocks = {arch.block(index): model.get_submodule(arch.block(index)) for index in range(arch.num_blocks)}
    norms = norms_of(blocks) if NORM in stage.fit.rates else {}
    quantizers: dict[str, Quantizer] = {}
    for name, scheme in resolved.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        quantizers[name] = Quantizer(
            linear.weight.detach(),
            scheme,
            weight_slot=stage.weight,
            range_slot=stage.range,
            rounding_slot=stage.rounding,
        )
        _put(model, name, QLinear(linear, quantizers[name], scheme.activations))
    slot_groups(quantizers, stage.fit.rates_in(1), {NORM: free(norms)})


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
