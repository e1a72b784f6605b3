"""finetune: train what is quantized already, or quantize and then train, and write a packed checkpoint.

    planish.finetune("q2", "q2-tuned", "e2e_qp", data="train.jsonl")
    planish.finetune("org/name", "q2-tuned", "efficientqat", "w2g64", data="train.jsonl")

Text is packed into windows; conversations go through the chat template with the loss on answers only. What is
written is a checkpoint as `quantize_to` writes one. Everything wrong with a request is said before any work.
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish.checkpoint import CheckpointWriter
from planish.data import check_seqlen, sha256
from planish.errors import PlanishError
from planish.fit.finetune import TRACKERS, Setting
from planish.fit.whole import EndToEnd
from planish.folder import QuantizedFolder, assemble, write_model
from planish.instruct import Examples, load_examples
from planish.log import Clock, Event, Progress, RunManifest, versions
from planish.recipes import build, split_preset
from planish.request import SAMPLES, SEQLEN, make_run, manifest_of, resolve
from planish.run import compute_device, compute_dtype
from planish.source import Source, open_source
from planish.tune import (
    Teacher,
    cast_parameters,
    check_vocabulary,
    figures_of,
    quantize_in_memory,
    teacher_of,
    tune,
    wants_checkpointing,
)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A request to `finetune`, whose keyword arguments these are.

    Args:
        preset, keys: the recipe's own.
        data: text, or conversations; see `planish.data`. Or token ids int64 [samples, seqlen].
        teacher: the float model, where the recipe distils: of a float model itself, of a quantized one the one that
            its run.json names, if not given.
        batch_size: samples in one forward and backward pass; the recipe's own batch_size is that of a step.
        checkpointing: recompute blocks in the backward pass; by the model's size if not given.
        save_every: steps between checkpoints, which lie in a hidden folder beside the output.
        resume: go on from the last of them.
        track: "tensorboard" or "wandb", where installed.
        format: on disk; "auto" keeps that of a quantized model.
    """

    scheme: str | None = None
    preset: str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    data: str | Path | Tensor = "embedded"
    samples: int | None = None
    seqlen: int | None = None
    teacher: str | os.PathLike[str] | None = None
    device: str | torch.device | None = None
    batch_size: int = 4
    seed: int = 0
    checkpointing: bool | None = None
    save_every: int = 0
    resume: bool = False
    track: str = "none"
    format: str = "auto"
    tokenizer: Any = None
    progress: Progress | None = None


def finetune(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: str = "e2e_qp",
    scheme: str | None = None,
    *,
    overwrite: bool = False,
    preset: str | None = None,
    **options: Any,
) -> RunManifest:
    """Train a model end to end and write it, packed.

    Args:
        model: a quantized folder; or a float one, for a recipe that quantizes first, such as efficientqat.
        out: new or empty folder, or one to replace if `overwrite`.
        recipe: one with a stage that trains the model as a whole.
        scheme: of a float model.
        options: fields of `Tuning`, and the recipe's own keys.

    Returns:
        The manifest, also written as run.json.

    Raises:
        PlanishError: for anything wrong with the request, before any work.
    """
    writer = CheckpointWriter(out, overwrite=overwrite)
    known = {field.name for field in dataclasses.fields(Tuning)}
    keys = {**options.pop("keys", {}), **{key: value for key, value in options.items() if key not in known}}
    request = Tuning(
        scheme=scheme, preset=preset, keys=keys, **{key: value for key, value in options.items() if key in known}
    )
    stage = build(recipe, preset, keys).whole
    if stage is None:
        raise PlanishError(f"recipe {recipe!r} trains no whole model; use planish quantize --recipe {recipe}")
    if request.track not in TRACKERS:
        raise PlanishError(f"no tracker {request.track!r}; use one of {', '.join(TRACKERS)}")
    work = writer.out.with_name(f".{writer.out.name}.tune")
    quantized = None if str(model).endswith(".gguf") else QuantizedFolder.open(model)
    if quantized is None:
        manifest = _from_float(model, writer, work, recipe, request)
    else:
        manifest = _from_quantized(quantized, writer, work, recipe, stage, request)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _setting(request: Tuning, work: Path, base: Setting) -> Setting:
    return dataclasses.replace(
        base,
        folder=work,
        micro_batch=request.batch_size,
        checkpointing=base.checkpointing if request.checkpointing is None else request.checkpointing,
        save_every=request.save_every,
        resume=request.resume,
        track=request.track,
        progress=request.progress,
    )


def _examples(request: Tuning, tokenizer: Any, samples: int, seqlen: int, label: str) -> Examples:
    if tokenizer is None and not isinstance(request.data, Tensor):
        raise PlanishError(f"{label} comes without a tokenizer; pass tokenizer=, or token ids as data")
    found = load_examples(tokenizer, request.data, samples, seqlen, request.seed)
    if found.note and request.progress:
        request.progress(Event(stage="data", index=0, total=0, note=found.note))
    return found


def _from_float(
    model: str | os.PathLike[str], writer: CheckpointWriter, work: Path, recipe: str, request: Tuning
) -> RunManifest:
    """The blocks on calibration windows of the data, then the whole on its examples."""
    resolved = resolve(
        model,
        recipe,
        request.scheme or "w4g128",
        preset=request.preset,
        format=request.format,
        samples=request.samples,
        seqlen=request.seqlen,
        **request.keys,
    )
    if request.teacher is not None:
        raise PlanishError(f"{model} is its own teacher; drop teacher")
    directory = writer.out.parent if writer.out.parent.is_dir() else None
    run = make_run(
        resolved, request.data, request.device, None, request.seed, "auto", request.progress, request.tokenizer,
        stream_dir=directory,
    )  # fmt: skip
    examples = _examples(request, run.tokenizer, resolved.samples, resolved.seqlen, resolved.source.label)
    tuned, figures = quantize_in_memory(run, examples, lambda base: _setting(request, work, base))
    manifest = manifest_of(resolved, run, figures)
    write_model(
        tuned,
        writer,
        resolved.format,
        source=resolved.source,
        tokenizer=run.tokenizer,
        extra={"run.json": manifest.to_dict()},
    )
    return manifest


def _from_quantized(
    folder: QuantizedFolder, writer: CheckpointWriter, work: Path, recipe: str, stage: EndToEnd, request: Tuning
) -> RunManifest:
    """The whole alone, its codes as they are."""
    source, clock = folder.source, Clock()
    if request.scheme is not None:
        raise PlanishError(f"{source.label} is quantized already; drop the scheme, or give the 16-bit original")
    if request.format not in ("auto", folder.format.name):
        raise PlanishError(f"{source.label} is in format {folder.format.name} and stays so; drop --format")
    if source.folder is not None and source.folder.resolve() == writer.out:
        raise PlanishError(f"{writer.out} is the model itself; write to another folder")
    own, about_data = split_preset(recipe, request.preset)
    samples = about_data.get("samples", SAMPLES) if request.samples is None else request.samples
    seqlen = about_data.get("seqlen", SEQLEN) if request.seqlen is None else request.seqlen
    check_seqlen(source.config, seqlen)
    before = RunManifest.read(source.folder) if source.folder is not None else None
    theirs = _teacher_source(request, before) if stage.distill > 0 else None
    if theirs is not None:
        check_vocabulary(source.skeleton(), theirs.skeleton())
    examples = _examples(request, request.tokenizer or source.tokenizer(), samples, seqlen, source.label)
    device = compute_device(request.device)
    dtype = compute_dtype(source.dtype, device)
    teacher: Teacher | None = None
    if theirs is not None:
        teacher = teacher_of(
            theirs,
            examples.ids,
            device=device,
            dtype=dtype,
            micro_batch=request.batch_size,
            directory=writer.out.parent if writer.out.parent.is_dir() else Path.cwd(),
            progress=request.progress,
        )
    model = assemble(source, folder.layers(), device, dtype)
    base = Setting(
        folder=work,
        device=device,
        seed=request.seed,
        micro_batch=request.batch_size,
        checkpointing=wants_checkpointing(model, device),
    )
    outcome = tune(model, stage, examples.ids, examples.labels, teacher, _setting(request, work, base))
    manifest = RunManifest(
        model=source.label,
        recipe=recipe,
        keys={**own, **request.keys},
        scheme=before.scheme if before else "",
        layers={name: str(scheme) for name, scheme in folder.schemes.items()},
        format=folder.format.name,
        data="token ids" if isinstance(request.data, Tensor) else str(request.data),
        data_sha256=sha256(examples.ids),
        samples=len(examples.ids),
        seqlen=seqlen,
        seed=request.seed,
        versions=versions(),
        figures={"seconds": round(clock.seconds, 2), **figures_of(outcome, device)},
    )
    write_model(
        cast_parameters(model, source.dtype), writer, folder.format, source=source,
        tokenizer=request.tokenizer, extra={"run.json": manifest.to_dict()},
    )  # fmt: skip
    return manifest


def _teacher_source(request: Tuning, before: RunManifest | None) -> Source:
    """The float model to distil from.

    Raises:
        PlanishError: if none is named and the one that run.json names can't be had.
    """
    if request.teacher is not None:
        return open_source(request.teacher)
    if before is None:
        raise PlanishError("distillation needs the float model; name it with --teacher, or give distill=0")
    label = before.model
    while Path(label).is_dir() and (earlier := RunManifest.read(Path(label))):
        label = earlier.model
    try:
        return open_source(label)
    except PlanishError as error:
        raise PlanishError(
            f"the float model {label}, of which this one was made, can't be had; name it with --teacher, or "
            "give distill=0"
        ) from error
