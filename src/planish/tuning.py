"""finetune: train what is quantized already, or quantize and then train, and write a packed checkpoint.

    planish.finetune("q2", "q2-tuned", "e2e_qp", data="train.jsonl")
    planish.finetune("org/name", "q2-tuned", "efficientqat", "w2g64", data="train.jsonl")

Text is packed into windows; conversations go through the chat template with the loss on answers only. What is
written is a checkpoint as `quantize_to` writes one. Everything wrong with a request is said before any work.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.integrations import get_available_reporting_integrations

from planish.card import papers
from planish.checkpoint import CheckpointWriter, replace
from planish.data import sha256
from planish.errors import PlanishError, UnsupportedScheme
from planish.fit.finetune import TRACKERS
from planish.fit.watch import Setting
from planish.fit.whole import EndToEnd
from planish.folder import QuantizedFolder, assemble, write_model
from planish.formats import FORMATS, verify
from planish.formats.format import Format
from planish.inside import open_start, scheme_text
from planish.instruct import Examples, load_examples
from planish.journal import fingerprint
from planish.log import Clock, Event, Progress, RunManifest, versions
from planish.mix import Data, Text, blend, is_own, name_of, needs_tokenizer
from planish.own_text import own_windows
from planish.recipes import build, split_preset
from planish.request import Resolved, data_size, make_run, manifest_of, resolve
from planish.run import compute_device, compute_dtype
from planish.source import Source, open_source
from planish.teacher import check_vocabulary, teacher_of
from planish.trainable import check_trainer
from planish.tune import cast_parameters, figures_of, quantize_in_memory, settle_last, tune, weights_of
from planish.ways import planned, wants_checkpointing, whole_size
from planish.widths import settle_bits

LOGS = "runs"  # where tensorboard's callback writes
REQUEST = "request.json"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A request to `finetune`, whose keyword arguments these are.

    Args:
        preset, keys: the recipe's own.
        data: text, conversations, or a mix; see `planish.data` and `planish.mix`. Or token ids int64 [samples, seqlen].
        calib: what the blocks of a float model are calibrated on, as `data` is given; windows of the data if not given.
        watch: the source of the windows held out; of a mix the embedded text, else the data itself, if not given.
        adapter: folder of a LoRA of a float model, merged into its weights before they are quantized.
        teacher: the float model, where the recipe distils: of a float model itself, of a quantized one the one that
            its run.json names, if not given.
        batch_size: samples in one forward and backward pass; the recipe's own batch_size is that of a step.
        checkpointing: recompute blocks in the backward pass; by the model's size if not given.
        lean: train one block at a time, with 8-bit moments, in the least memory; if the GPU's is short, if not given.
        save_every: steps between checkpoints, which lie in a hidden folder beside the output.
        resume: go on from the last of them.
        track: "tensorboard" or "wandb", where installed.
        format: on disk; "auto" keeps that of a quantized model.
    """

    scheme: str | None = None
    preset: str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    data: Data = "embedded"
    calib: Data | None = None
    watch: Data | None = None
    samples: int | None = None
    seqlen: int | None = None
    adapter: str | os.PathLike[str] | None = None
    teacher: str | os.PathLike[str] | None = None
    device: str | torch.device | None = None
    batch_size: int = 4
    seed: int = 0
    checkpointing: bool | None = None
    lean: bool | None = None
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
    built = build(recipe, preset, keys)
    stage = built.whole
    if stage is None:
        raise PlanishError(f"recipe {recipe!r} trains no whole model; use planish quantize --recipe {recipe}")
    _check(request)
    quantized = None if str(model).endswith(".gguf") else QuantizedFolder.open(model)
    if quantized is not None and built.blocks:
        raise PlanishError(f"{model} is quantized already, and {recipe} begins with a float model; use --recipe e2e_qp")
    if quantized is not None and stage.inside is not None:
        raise PlanishError(
            f"{model} is quantized already, and {recipe} keeps the float model; give that one, with start={model}"
        )
    with _work_folder(writer.out) as work:
        if quantized is None:
            return _from_float(model, writer, work, recipe, request)
        return _from_quantized(quantized, writer, work, recipe, stage, request)


def _check(request: Tuning) -> None:
    """Refuse what doesn't depend on the model."""
    if request.track not in TRACKERS:
        raise PlanishError(f"no tracker {request.track!r}; use one of {', '.join(TRACKERS)}")
    if request.track != "none" and request.track not in get_available_reporting_integrations():
        raise PlanishError(f"{request.track} isn't installed; pip install {request.track}, or drop --track")
    check_trainer()
    if request.batch_size < 1:
        raise PlanishError(f"a batch size of {request.batch_size}; at least 1 sample at a time is needed")
    if request.save_every < 0:
        raise PlanishError(f"a checkpoint every {request.save_every} steps; 0 writes none")


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside the output for checkpoints; after a success a tracker's log moves into the output.

    What failed leaves it if there is something in it to go on from.

    Raises:
        PlanishError: if a checkpoint can't be written.
    """
    work = out.with_name(f".{out.name}.tune")
    try:
        yield work
    except (OSError, SafetensorError) as error:
        if not work.is_dir():
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PlanishError(
            f"can't keep checkpoints in {work}: {reason}; make room, or delete it to start anew"
        ) from error
    else:
        if (work / LOGS).is_dir():
            shutil.move(work / LOGS, out / LOGS)
        shutil.rmtree(work, ignore_errors=True)
    finally:
        if work.is_dir() and not any(work.glob("checkpoint-*")):
            shutil.rmtree(work, ignore_errors=True)


def _claim(
    work: Path, request: Tuning, source: Source, recipe: str, examples: Examples, calibration: str = ""
) -> None:
    """Note in the work folder whose checkpoints it holds; empty it first if the run starts anew.

    Args:
        calibration: hash of a text of its own.

    Raises:
        PlanishError: if the run is to go on from checkpoints of another request.
    """
    if not (request.save_every or request.resume):
        return
    wanted = {
        "model": fingerprint(source.files())[:12],
        "recipe": recipe,
        "preset": request.preset or "default",
        "keys": {key: str(value) for key, value in sorted(request.keys.items())},
        "scheme": request.scheme or "",
        "seed": request.seed,
        "data": sha256(torch.cat([examples.ids, examples.labels]))[:12],
        "calibration": calibration[:12],
    }
    theirs = json.loads((work / REQUEST).read_text()) if request.resume and (work / REQUEST).is_file() else wanted
    for key, value in wanted.items():
        if theirs.get(key) != value:
            raise PlanishError(
                f"{work} is of another run: {key} was {theirs.get(key)!r} and is {value!r}; give the same request, or "
                "start anew without --resume"
            )
    if not request.resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    replace(work / REQUEST, wanted)


def _setting(request: Tuning, work: Path, base: Setting) -> Setting:
    return dataclasses.replace(
        base,
        folder=work,
        micro_batch=request.batch_size,
        checkpointing=base.checkpointing if request.checkpointing is None else request.checkpointing,
        lean=request.lean,
        save_every=request.save_every,
        resume=request.resume,
        track=request.track,
        progress=request.progress,
    )


def _examples(
    request: Tuning, tokenizer: Any, samples: int, seqlen: int, holdout: int, label: str, own: Callable[[int], Tensor]
) -> tuple[Examples, str]:
    """What is trained on, behind what is watched; and the source of the latter, if it is another one.

    Args:
        own: windows of the float model's own text, so many.
    """
    if tokenizer is None and needs_tokenizer(request.data, request.watch):
        raise PlanishError(f"{label} comes without a tokenizer; pass tokenizer=, or token ids as data")

    def cut(source: Text, count: int) -> tuple[tuple[Tensor, Tensor], str]:
        if is_own(source):
            ids = own(count)
            return (ids, ids.clone()), ""
        found = load_examples(tokenizer, source, count, seqlen, request.seed)
        return (found.ids, found.labels), found.note

    found = blend(request.data, cut, samples, seed=request.seed, watch=request.watch, holdout=holdout)
    for note in found.notes if request.progress else ():
        request.progress(Event(stage="data", index=0, total=0, note=note))  # type: ignore[misc]
    ids, labels = found.tensors
    return Examples(ids, labels, "; ".join(found.notes)), found.watched


def _own_text(
    teacher: Source | None,
    request: Tuning,
    tokenizer: Any,
    seqlen: int,
    device: torch.device,
    dtype: torch.dtype,
    count: int,
) -> Tensor:
    """Windows that the teacher writes."""
    if teacher is None:
        raise PlanishError("data=self is text of the float model: distil from it (distill=1), or give a text")
    about: Any = {"device": device, "dtype": dtype, "seed": request.seed, "progress": request.progress}
    return own_windows(teacher, tokenizer, count, seqlen, **about)


def _from_float(
    model: str | os.PathLike[str], writer: CheckpointWriter, work: Path, recipe: str, request: Tuning
) -> RunManifest:
    """The blocks on windows of the calibration text, or of the data; then the whole on the data's examples."""
    start = request.keys.get("start")
    resolved = resolve(
        model,
        recipe,
        request.scheme or (scheme_text(open_start(start)) if start else "w4g128"),
        preset=request.preset,
        format=request.format,
        adapter=request.adapter,
        samples=request.samples,
        seqlen=request.seqlen,
        **request.keys,
    )
    if request.teacher is not None:
        raise PlanishError(f"{model} is its own teacher; drop teacher")
    _check_calibration(request, resolved)
    directory = writer.out.parent if writer.out.parent.is_dir() else None
    calib = request.data if request.calib is None else request.calib
    run = make_run(
        resolved, calib, request.device, None, request.seed, "auto", request.progress, request.tokenizer,
        stream_dir=directory, watch=request.watch,
    )  # fmt: skip
    resolved = settle_bits(resolved, run)
    examples, watched = _examples(
        request, run.tokenizer, resolved.samples, resolved.seqlen, resolved.recipe.holdout, resolved.source.label,
        run.own_text,
    )  # fmt: skip
    own_calibration = "" if request.calib is None else run.data_sha256
    _claim(work, request, resolved.source, recipe, examples, own_calibration)
    how = functools.partial(_setting, request, work)
    settle_last(run, how)
    tuned, figures = quantize_in_memory(run, examples, how)
    manifest = manifest_of(resolved, run, figures)
    if request.calib is not None:
        manifest = dataclasses.replace(
            manifest, data=name_of(request.data), data_sha256=sha256(examples.ids), samples=len(examples.ids),
            watched=watched, calibration=run.data_name, calibration_sha256=own_calibration,
        )  # fmt: skip
    write_model(
        tuned,
        writer,
        resolved.format,
        source=resolved.source,
        tokenizer=run.tokenizer,
        extra=papers(manifest),
    )
    return manifest


def _check_calibration(request: Tuning, resolved: Resolved) -> None:
    """Refuse a calibration text where nothing would read it."""
    read = resolved.widths is not None or any(stage.needs_data for stage in resolved.recipe.blocks)
    if request.calib is not None and not read:
        raise PlanishError(
            f"{resolved.recipe.name} calibrates nothing before it trains on the data; drop calib, or start from a "
            "model that was calibrated"
        )


def _from_quantized(
    folder: QuantizedFolder, writer: CheckpointWriter, work: Path, recipe: str, stage: EndToEnd, request: Tuning
) -> RunManifest:
    """The whole alone, its codes as they are."""
    source, clock = folder.source, Clock()
    _check_folder(folder, writer.out, request)
    format = _written_in(folder, request)
    own, _ = split_preset(recipe, request.preset)
    samples, seqlen = data_size(recipe, request.preset, request.samples, request.seqlen, source.config)
    before = RunManifest.read(source.folder) if source.folder is not None else None
    theirs = _teacher_source(request, before) if stage.distill > 0 else None
    if theirs is not None:
        check_vocabulary(source.skeleton(), theirs.skeleton())
    device = compute_device(request.device)
    dtype = compute_dtype(source.dtype, device)
    tokenizer = request.tokenizer or source.tokenizer()
    own_text = functools.partial(_own_text, theirs, request, tokenizer, seqlen, device, dtype)
    examples, watched = _examples(request, tokenizer, samples, seqlen, stage.holdout, source.label, own_text)
    setting = _planned(folder, stage, request, work, device, dtype, seqlen)
    _claim(work, request, source, recipe, examples)
    teacher = None
    if theirs is not None:
        teacher = teacher_of(
            theirs,
            examples.ids,
            labels=examples.labels,
            device=device,
            dtype=dtype,
            micro_batch=request.batch_size,
            directory=writer.out.parent if writer.out.parent.is_dir() else Path.cwd(),
            progress=request.progress,
        )
    model = assemble(source, folder.packed(device), device, dtype, folder.schemes)
    floats = None if theirs is None else weights_of(theirs)
    outcome = tune(model, stage, examples.ids, examples.labels, teacher, setting, floats)
    manifest = RunManifest(
        model=source.label,
        recipe=recipe,
        keys={**own, **request.keys},
        scheme=before.scheme if before else "",
        layers={name: str(scheme) for name, scheme in folder.schemes.items()},
        format=format.name,
        data=name_of(request.data),
        data_sha256=sha256(examples.ids),
        samples=len(examples.ids),
        seqlen=seqlen,
        seed=request.seed,
        watched=watched,
        versions=versions(),
        figures={"seconds": round(clock.seconds, 2), **figures_of(outcome, device)},
    )
    write_model(
        cast_parameters(model, source.dtype), writer, format, source=source,
        tokenizer=request.tokenizer, extra=papers(manifest),
    )  # fmt: skip
    return manifest


def _check_folder(folder: QuantizedFolder, out: Path, request: Tuning) -> None:
    """Refuse what doesn't suit the quantized folder."""
    source = folder.source
    if given := [name for name in ("scheme", "adapter", "calib") if getattr(request, name) is not None]:
        raise PlanishError(f"{source.label} is quantized already; drop the {given[0]}, or give the 16-bit original")
    if request.format not in ("auto", folder.format.name):
        raise PlanishError(f"{source.label} is in format {folder.format.name} and stays so; drop --format")
    if source.folder is not None and source.folder.resolve() == out:
        raise PlanishError(f"{out} is the model itself; write to another folder")
    if folder.embedding in folder.schemes:
        raise PlanishError(
            f"{source.label}: its embedding is quantized; finetune first, then planish export --embeddings"
        )


def _written_in(folder: QuantizedFolder, request: Tuning) -> Format:
    """The folder's own format; native for what is only read in that one, since native holds everything."""
    schemes = {name: folder.schemes.get(name) for name in folder.shapes}
    ordered = any(name.endswith("g_idx") for name in folder.source.names())
    try:
        if ordered and not folder.format.name.startswith("gptq"):
            raise UnsupportedScheme(f"{folder.format.name} can't hold columns in another order")
        verify(folder.format, schemes, folder.shapes)
    except UnsupportedScheme as reason:
        if request.progress:
            request.progress(Event(stage="finetune", index=0, total=0, note=f"it will be written as native: {reason}"))
        return FORMATS["native"]
    return folder.format


def _planned(
    folder: QuantizedFolder,
    stage: EndToEnd,
    request: Tuning,
    work: Path,
    device: torch.device,
    dtype: torch.dtype,
    seqlen: int,
) -> Setting:
    """How the whole of a quantized folder trains; refused here if it can't, before the teacher's work."""
    size = whole_size(folder.source.skeleton(), folder.schemes, stage, dtype)
    checkpointing = wants_checkpointing(size, device)
    base = Setting(
        folder=work, device=device, seed=request.seed, micro_batch=request.batch_size, checkpointing=checkpointing
    )
    return planned(_setting(request, work, base), size, stage, seqlen)


def _teacher_source(request: Tuning, before: RunManifest | None) -> Source:
    """The float model to distil from.

    Raises:
        PlanishError: if none is named and the one that run.json names can't be had.
    """
    if request.teacher is not None:
        return open_source(request.teacher)
    if before is None:
        raise PlanishError("distillation needs the float model; name it with --teacher, or give distill=0")
    label, seen = before.model, set[str]()
    while label not in seen and Path(label).is_dir() and (earlier := RunManifest.read(Path(label))):
        seen.add(label)  # folders that were overwritten may name each other
        label = earlier.model
    try:
        return open_source(label)
    except PlanishError as error:
        raise PlanishError(
            f"the float model {label}, of which this one was made, can't be had; name it with --teacher, or "
            "give distill=0"
        ) from error
