"""Tune: a recipe in memory, its whole-model stage included.

    model, figures = quantize_in_memory(run)     the blocks, then the stage behind them
    model, figures = tune_float(run, stage, ...)  for a stage whose factors lie inside quantizers of the float model

    tune(model, stage, ids, labels, teacher, setting)

What the stage names becomes trainable, is trained, and is frozen again as it will be stored. Knows nothing
of the checkpoint it came from or goes to.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from planish.arch import discover, linears
from planish.bitstream import Stream
from planish.errors import PlanishError
from planish.fit.lean_loop import finetune_lean
from planish.fit.objective import Objective
from planish.fit.reconstruct import Outcome
from planish.fit.repeat import repeatable
from planish.fit.watch import Setting, Slots, Windows
from planish.fit.whole import EndToEnd, Inside
from planish.fit.windowed import windowed
from planish.folder import assemble
from planish.formats import FORMATS
from planish.inside import check_inside, inside_layers, open_start
from planish.instruct import Examples
from planish.kernels.linear import PackedLinear, packed_layers
from planish.kernels.pack import Packed
from planish.log import Clock, Event, peak_bytes
from planish.plan import WholeSize, check_waiting, host_memory
from planish.qtensor import PARTS, QTensor
from planish.quant import QLinear
from planish.run import Run
from planish.source import Source
from planish.teacher import Teacher, teacher_of
from planish.trainable import convert, free_slots
from planish.ways import planned, trains_on, wants_checkpointing, whole_size

# steps between the checkpoints of a run that shall survive a kill, and times as many where weights are trained: one
# takes as long as some of the steps then
SAVE_EVERY, RARER = 16, 8
CHECKPOINTS, NATIVE = "whole", FORMATS["native"]
UNCOMMON = "offsets in weight units are kept in the native format, which servers don't load; offset=integer is for them"


def tune(
    model: PreTrainedModel,
    stage: EndToEnd,
    ids: Tensor,
    labels: Tensor,
    teacher: Teacher | None,
    setting: Setting,
    floats: Callable[[str], Tensor] | None = None,
) -> Outcome:
    """Train a packed model, or one with factors inside, in place; it is packed afterwards, as it will be stored.

    Args:
        ids, labels: int64 [samples, tokens], aligned; see `fit.loss.NO_LABEL`.
        teacher: needed if the stage distils from another model; its hidden states in the order of `ids`.
        floats: as of `free_slots`.
    """
    assert teacher is not None or stage.distill == 0 or (stage.inside is not None and stage.inside.own_teacher)
    arch, parameters = discover(model, (PackedLinear, QLinear)), free_slots(model, stage, floats)
    objective = Objective(
        model,
        arch,
        distill=stage.distill,
        temperature=stage.temperature,
        teacher_logits=None if teacher is None else teacher.logits,
    )
    windows = Windows(ids, labels, None if teacher is None else teacher.hidden)
    try:
        with windowed(model), repeatable(model, setting.device):
            if setting.lean:
                return finetune_lean(objective, parameters, windows, stage, setting)
            return _by_trainer(objective, parameters, windows, stage, setting)
    except torch.OutOfMemoryError:
        raise PlanishError(
            f"{stage.name} doesn't fit the GPU even one block at a time; use shorter samples (--seqlen)"
            if setting.lean
            else f"{stage.name} doesn't fit the GPU even one sample at a time; train lean (--lean), or on shorter "
            "samples (--seqlen)"
        ) from None
    finally:
        convert(model)


def _by_trainer(
    objective: Objective,
    parameters: Slots,
    windows: Windows,
    stage: EndToEnd,
    setting: Setting,
) -> Outcome:
    """With half as many samples in a pass, from the start, whenever memory runs out."""
    from planish.fit.finetune import finetune  # here, not above: who loads a model needn't wait for the Trainer

    members = [parameter for slot in parameters.values() for parameter, _ in slot]
    start = [parameter.detach().to("cpu", copy=True) for parameter in members]
    while True:
        try:
            return finetune(objective, parameters, windows, stage, setting)
        except torch.OutOfMemoryError:
            if setting.micro_batch == 1:
                raise
        setting = dataclasses.replace(setting, micro_batch=setting.micro_batch // 2)
        torch.cuda.empty_cache()
        for parameter, value in zip(members, start, strict=True):
            parameter.data.copy_(value)
            parameter.grad = None


def quantize_in_memory(
    run: Run, examples: Examples | None = None, how: Callable[[Setting], Setting] = lambda setting: setting
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Run a recipe; the model and the figures of the run.

    Args:
        examples: what a whole-model stage trains on; the windows of the calibration if not given.
        how: changes the setting of a whole-model stage.
    """
    stage, source = run.recipe.whole, run.source
    if stage is None:
        layers, trained, figures = _blocks(run)
        return _assembled(run, layers, trained, source.dtype), figures
    if examples is None:
        assert run.ids is not None
        examples = Examples(ids=run.ids, labels=run.ids, note="")
    if stage.inside is not None:
        return tune_float(run, stage, stage.inside, examples, how)
    with _checkpoints(run) as folder:
        chosen, setting, left = _chosen(run, stage, lambda size: how(_setting_of(run, size, folder)))
        run.notes += left
        layers, trained, figures = _blocks(run)
        figures["notes"] = [*figures["notes"], *left]
        teacher = _teacher(run, examples) if stage.distill > 0 else None
        model = _assembled(run, layers, trained, run.dtype)
        outcome = tune(model, chosen, examples.ids, examples.labels, teacher, setting, weights_of(source))
    return cast_parameters(model, source.dtype), {**figures, **figures_of(outcome, run.device)}


def settle_last(
    run: Run, how: Callable[[Setting], Setting] = lambda setting: setting, decided: str | None = None
) -> str:
    """Where memory has no room for a last stage that is optional, the run ends with the blocks, and says so.

    Args:
        how: as of `quantize_in_memory`.
        decided: what this returned when a run that now goes on was begun; None where it is to be found out.

    Returns:
        The name of the last stage; "" if there is none, or none any more.
    """
    # nothing is trained yet that it could go on from, and what it does is said when it begins
    nowhere = Path(os.devnull)
    stage = run.recipe.whole
    if stage is None or not stage.optional or decided == stage.name:
        return "" if stage is None else stage.name
    try:
        if decided is not None:
            raise PlanishError("memory was too short when this run was begun")
        _chosen(run, stage, lambda size: dataclasses.replace(how(_setting_of(run, size, nowhere)), progress=None))
        return stage.name
    except PlanishError as reason:
        if not trains_on(run.device):  # only memory is a reason to go without it
            raise
        run.left_out = f"{stage.name} is left out: {reason}"
        run.notes.append(run.left_out)
        run.recipe = dataclasses.replace(run.recipe, stages=run.recipe.blocks)
        return ""


def weights_of(source: Source) -> Callable[[str], Tensor]:
    """name -> weight of a linear of a float model."""
    return lambda name: source.get(f"{name}.weight")


@contextmanager
def _checkpoints(run: Run) -> Iterator[Path]:
    """The folder of a whole-model stage's checkpoints: in the journal, where there is one."""
    if run.journal is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder = run.journal.folder / CHECKPOINTS
    folder.mkdir(exist_ok=True)
    run.journal.streams.mkdir(parents=True, exist_ok=True)  # the teacher's may wait there
    with run.journal.reporting():
        yield folder


def tune_float(
    run: Run, stage: EndToEnd, inside: Inside, examples: Examples, how: Callable[[Setting], Setting]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train factors inside the quantizers of a float model, which stays as it is; the packed model and figures.

    Args:
        examples, how: as of `quantize_in_memory`.

    Raises:
        PlanishError: if the start doesn't fit the request, or memory is too short for any way.
    """
    source, clock = run.source, Clock()
    start = open_start(inside.start) if inside.start else None
    check_inside(stage, run.schemes, linears(run.arch, source.skeleton()), start)
    notes = [UNCOMMON] if inside.offset else []
    with _checkpoints(run) as folder:
        stage, setting, left = _chosen(run, stage, lambda size: how(_setting_of(run, size, folder)))
        for note in (notes := [*notes, *left]):
            if run.progress:
                run.progress(Event(stage=stage.name, index=0, total=0, note=note))
        teacher = _teacher(run, examples) if stage.distill > 0 and not inside.own_teacher else None
        torch.manual_seed(run.seed)  # of the factors
        layers = inside_layers(source, stage, run.schemes, run.device, run.dtype, start)
        model = assemble(source, layers, run.device, run.dtype, run.schemes)
        outcome = tune(model, stage, examples.ids, examples.labels, teacher, setting)
    figures = {"seconds": round(clock.seconds, 2), "notes": notes, **figures_of(outcome, run.device)}
    return cast_parameters(model, source.dtype), figures


def _chosen(
    run: Run, stage: EndToEnd, setting_of: Callable[[WholeSize], Setting]
) -> tuple[EndToEnd, Setting, list[str]]:
    """The first of a stage's ways for which there is memory, how it trains, and what is to be said of that."""
    ways, notes = stage.ways(), list[str]()
    for tried in ways:
        size = whole_size(run.source.skeleton(), run.schemes, tried, run.dtype)
        try:
            check_waiting(size, host_memory())
            return tried, planned(setting_of(size), size, tried, run.seqlen), notes
        except PlanishError as reason:
            if tried is ways[-1]:
                raise
            eight = "the frozen weights are held in 8 bits: of 16 there is no room"
            notes.append(str(reason) if tried.if_room else eight)
    raise AssertionError("the last one returns or raises")


def _setting_of(run: Run, size: WholeSize, folder: Path) -> Setting:
    return Setting(
        folder=folder,
        device=run.device,
        seed=run.seed,
        micro_batch=run.micro_batch,
        checkpointing=wants_checkpointing(size, run.device),
        resume=run.journal is not None,
        save_every=SAVE_EVERY * (RARER if size.trained >= size.weights else 1) if run.journal else 0,
        progress=run.progress,
    )


def _teacher(run: Run, examples: Examples) -> Teacher:
    """The float model of a run, to distil from."""
    about: Any = {"device": run.device, "dtype": run.dtype, "micro_batch": run.micro_batch, "progress": run.progress}
    return teacher_of(run.source, examples.ids, labels=examples.labels, directory=run.stream_folder, **about)


def _blocks(run: Run) -> tuple[dict[str, Packed], dict[str, Tensor], dict[str, Any]]:
    """The stages that go through the blocks: packed layers, tensors that were trained besides, figures.

    With a journal, both come out of it, in the native format, which holds every layer.
    """
    layers: dict[str, Packed] = {}
    trained: dict[str, Tensor] = {}
    if run.journal is None:

        def sink(name: str, quantized: QTensor) -> None:
            layers[name] = Packed.from_qtensor(quantized).to("cpu")

        return layers, trained, run.execute(sink, trained.__setitem__)
    journal = run.journal

    def keep(name: str, quantized: QTensor) -> None:
        for key, tensor in NATIVE.write(name, Stream.of(quantized).to("cpu")).items():
            journal.add(key, tensor)

    figures = run.execute(keep, journal.add)
    written: dict[str, dict[str, Tensor]] = {name: {} for name in run.schemes}
    for key, tensor in journal.tensors():
        name, _, part = key.rpartition(".")
        (written[name] if name in written and part in PARTS else trained)[key] = tensor
    shapes = linears(run.arch, run.source.skeleton())
    for name, tensors in written.items():
        layers[name] = Packed.from_stream(NATIVE.read(name, tensors, run.schemes[name], shapes[name]))
    return layers, trained, figures


def figures_of(outcome: Outcome, device: torch.device) -> dict[str, Any]:
    """What run.json says of a whole-model stage."""
    return {
        "end_to_end": [outcome.before, outcome.after],
        "end_to_end_notes": list(outcome.notes),
        "peak_bytes": peak_bytes(device),
    }


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Parameters and biases in a dtype; buffers such as rotary frequencies keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for layer in packed_layers(model).values():
        layer.bias = None if layer.bias is None else layer.bias.to(dtype)
    return model


def _assembled(run: Run, layers: dict[str, Packed], trained: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    found = ((name, weight.to(run.device)) for name, weight in layers.items())
    model = assemble(run.source, found, run.device, dtype, run.schemes)
    for name, tensor in trained.items():
        owner, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(owner), leaf).data.copy_(tensor)  # a packed layer's bias is a buffer
    return model
