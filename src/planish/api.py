"""The verbs of Planish: load, quantize, save.

`quantize` gives an ordinary transformers model with packed layers; `quantize_to` streams the same run
into a folder, block by block, so that the model is never in memory as a whole. Everything else here joins
the parts: a source of weights, a recipe, a stream of activations, a sink of codes, a format.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from planish.arch import discover, linears
from planish.bitstream import Stream
from planish.card import papers
from planish.checkpoint import CheckpointWriter
from planish.errors import PlanishError, nearest
from planish.folder import (
    QuantizedFolder,
    assemble,
    block_shapes,
    config_of,
    schemes_of,
    side_files,
    tokenizer_of,
    verify_folder,
    words_of,
    write_model,
)
from planish.formats import FORMATS, choose
from planish.formats import verify as verify_schemes
from planish.gguf_file import write_gguf
from planish.hf import attach
from planish.journal import Journal
from planish.kernels.linear import packed_layers
from planish.kernels.siblings import settle
from planish.log import Progress, RunManifest
from planish.mix import Data
from planish.naming import disk_speller
from planish.qtensor import QTensor
from planish.request import ModelLike, Resolved, make_run, manifest_of, resolve, stream_folder, with_batch
from planish.run import Run, compute_device
from planish.scheme import Scheme, bits_per_weight
from planish.source import Source, open_source
from planish.tables import quantize_table, quantize_tables, table_shapes
from planish.targets import verdicts
from planish.transcode import resolve_for_export
from planish.tune import quantize_in_memory, settle_last
from planish.widths import settle_bits


def quantize(
    model: ModelLike,
    recipe: str = "planish",
    scheme: str = "w4g128",
    *,
    data: Data = "embedded",
    watch: Data | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    storage: str = "auto",
    stream_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    tokenizer: Any = None,
    **request: Any,
) -> PreTrainedModel:
    """Quantize a model; the result is an ordinary transformers model whose linears are packed.

    Args:
        model: Hugging Face folder, hub id, .gguf file, or a model in memory (which is left as it is).
        recipe: name in `planish.recipes.RECIPES`, or './mine.py:mine'.
        scheme: such as 'w4g128', 'w2g64asym', 'w4pc'; 'w2.5g64' for 2.5 bits on average, by what each linear loses.
        data: calibration text or a mix of several, see `planish.mix`, or token ids int64 [samples, seqlen].
        watch: the source of the windows held out, by which the state kept is chosen; of a mix the embedded text, else
            the data itself, if not given.
        device: where blocks are fitted; the GPU if there is one.
        batch_size: samples a step, the recipe's own if not given; where memory is too short for it, a step goes
            through it in parts.
        seed: of the windows and of the fit.
        storage: where activations wait: 'auto' (the first of the others that has room), 'device', 'host', 'disk'.
        stream_dir: folder for activations on disk; that for temporary files if not given.
        progress: called with a `planish.log.Event` after each span.
        tokenizer: for `data`, where the source has none.
        request: layers, ignore, preset, revision, format, samples, seqlen, and the recipe's own keys.

    Raises:
        PlanishError: for anything wrong with the request, before any work.
    """
    resolved = resolve(model, recipe, scheme, **with_batch(recipe, batch_size, request))
    run = make_run(
        resolved, data, device, batch_size, seed, storage, progress, tokenizer, stream_dir=stream_folder(stream_dir),
        watch=watch,
    )  # fmt: skip
    resolved = settle_bits(resolved, run)
    settle_last(run)
    return attach(settle(quantize_tables(quantize_in_memory(run)[0], resolved.tables)))


def quantize_to(
    model: ModelLike,
    out: str | os.PathLike[str],
    recipe: str = "planish",
    scheme: str = "w4g128",
    *,
    data: Data = "embedded",
    watch: Data | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    storage: str = "auto",
    stream_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    tokenizer: Any = None,
    announce: Callable[[Resolved], None] | None = None,
    inexact: Callable[[str], None] | None = None,
    **request: Any,
) -> RunManifest:
    """Quantize into a folder, block by block; the model is never in memory as a whole, unless a last stage trains it.

    The folder gets its name only when it is complete and was read back, every code, scale and zero equal.

    Args:
        out: new or empty folder, or one to replace if `overwrite`.
        stream_dir: folder for activations on disk; beside `out` if not given.
        resume: keep finished blocks and the activations behind them, in files, so that after a kill the same call
            goes on from there and writes the same bytes; and go on if such a call was killed.
        announce: called with what the request resolved to, before any work.
        inexact: as of `planish.export`: linears that the format or target can't hold are rounded once more in the end.
        others: as of `quantize`.

    Returns:
        The manifest, also written as run.json.
    """
    journal = Journal(out, stream_dir) if resume else None
    finished = journal is not None and journal.published
    writer = CheckpointWriter(out, overwrite=overwrite or finished, inside=journal.folder if journal else None)
    resolved = resolve_for_export(model, recipe, scheme, inexact, **with_batch(recipe, batch_size, request))
    if resolved.source.folder is not None and resolved.source.folder.resolve() == writer.out:
        raise PlanishError(f"{out} is the model itself; write to another folder")
    run = make_run(
        resolved, data, device, batch_size, seed, storage, progress, tokenizer, journal=journal, watch=watch,
        stream_dir=stream_folder(stream_dir) or writer.out.parent,
    )  # fmt: skip
    resolved = settle_bits(resolved, run)
    last = settle_last(run, decided=journal.request.get("last stage") if journal else None)
    write = _write_tuned if last else _write
    if journal is None:
        if (left := Journal(out).folder).is_dir():
            run.notes.append(f"{left} holds an unfinished run: go on with --resume, or delete it")
        return write(resolved, run, writer, announce)
    wanted = {**run.identity(manifest_of(resolved, run, {}), recipe), "last stage": last}
    wanted["then"] = resolved.then and resolved.then.note
    with journal:
        journal.begin(wanted)
        done = RunManifest.read(writer.out) if finished else None
        return done or write(resolved, run, writer, announce)


def _write_tuned(
    resolved: Resolved, run: Run, writer: CheckpointWriter, announce: Callable[[Resolved], None] | None
) -> RunManifest:
    """The same for a recipe that trains the whole model in the end, which is then in memory, packed."""
    if announce:
        announce(resolved)
    model, figures = quantize_in_memory(run)
    quantize_tables(model, resolved.tables)
    manifest = manifest_of(resolved, run, figures)
    extra = papers(manifest)

    write_model(
        model,
        writer,
        resolved.format,
        source=resolved.source,
        tokenizer=run.tokenizer,
        extra=extra,
        finish=lambda folder: _finish(folder, resolved, run, writer),
    )
    return RunManifest.read(writer.out) or manifest


def _finish(folder: Path, resolved: Resolved, run: Run, writer: CheckpointWriter) -> None:
    """What is left to do once the folder was read back, before it gets its name."""
    if resolved.then is not None:
        resolved.then.work(folder, writer.out.name)
    elif resolved.gguf:  # the same model beside the native one, as a file of its own
        written = QuantizedFolder.open(folder)
        assert written is not None
        write_gguf(written, folder / "model.gguf", name=writer.out.name)
    if run.journal:
        run.journal.publish()


def _write(
    resolved: Resolved, run: Run, writer: CheckpointWriter, announce: Callable[[Resolved], None] | None
) -> RunManifest:
    """Run it, and give the folder its name. With a journal, blocks wait there until all are finished."""
    if announce:
        announce(resolved)
    journal, source, skeleton = run.journal, resolved.source, resolved.source.skeleton()
    spell = disk_speller(skeleton)

    def write(name: str, tensor: Tensor) -> None:
        writer.add(spell(name), tensor)

    add, digests = (journal.add, journal.digests) if journal else (write, {})
    trained: set[str] = set()

    def sink(name: str, quantized: QTensor, add: Callable[[str, Tensor], None] = add) -> None:
        stream = Stream.of(quantized).to("cpu")
        digests[name] = stream.digest()
        for key, tensor in resolved.format.write(name, stream).items():
            add(key, tensor)

    def keep(name: str, tensor: Tensor) -> None:
        add(name, tensor.to(source.dtype))
        trained.add(name)

    def verify(folder: Path) -> None:
        verify_folder(folder, digests)
        _finish(folder, resolved, run, writer)

    with writer:
        figures = run.execute(sink, keep)
        for key, tensor in journal.tensors() if journal else ():
            write(key, tensor)
            trained.add(key)
        for name in source.names():
            owner = name.removesuffix(".weight")
            if owner in resolved.tables:
                sink(owner, quantize_table(source.get(name), resolved.tables[owner]), add=write)
            elif owner not in digests and name not in trained:
                write(name, source.get(name))
        manifest = manifest_of(resolved, run, figures)
        every = {name: resolved.schemes.get(name) for name in resolved.shapes} | resolved.tables
        config = config_of(source.config, skeleton, source.dtype, words_of(resolved.format, every, skeleton))
        files = side_files(source.folder, skeleton, run.tokenizer)
        writer.finish(config, files | papers(manifest), verify=verify)
    return RunManifest.read(writer.out) or manifest


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """A model from a folder or hub id, quantized in any of `planish.formats.FORMATS` or not at all.

    Args:
        device: the GPU if there is one.
        dtype: of activations and unquantized weights; the checkpoint's own if not given.

    Returns:
        An ordinary transformers model in eval mode; quantized layers are `planish.kernels.PackedLinear`. On an NVIDIA
        GPU they are laid out for decoding; `prepare` undoes that.
    """
    where = compute_device(device)
    folder = QuantizedFolder.open(path, revision=revision)
    if folder is None:
        source = open_source(path, revision=revision)
        return assemble(source, (), where, dtype or source.dtype)
    kind = dtype or folder.source.dtype
    model = settle(assemble(folder.source, folder.held(where, kind), where, kind, folder.schemes))
    return attach(model, folder.source.quantization_config)


def save(
    model: PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    format: str = "auto",
    overwrite: bool = False,
    tokenizer: Any = None,
) -> Path:
    """Write a quantized model (of `quantize` or `load`) as a folder that others load too.

    Raises:
        PlanishError: if the folder isn't empty, the format can't hold a layer, or nothing is quantized.
    """
    writer = CheckpointWriter(out, overwrite=overwrite)
    packed, schemes = packed_layers(model), schemes_of(model)
    if not packed:
        raise PlanishError("the model has no quantized layer; use save_pretrained() for a 16-bit one")
    shapes = block_shapes(model) | {name: (part.out_features, part.in_features) for name, part in packed.items()}
    if format != "auto" and format not in FORMATS:
        raise PlanishError(f"no format {format!r}: {nearest(format, FORMATS)}")
    chosen = choose(schemes, shapes) if format == "auto" else FORMATS[format]
    verify_schemes(chosen, schemes, shapes)
    layers = {name: str(scheme) for name, scheme in schemes.items() if scheme}
    label = str(model.config.name_or_path or type(model).__name__)
    extra = papers(RunManifest.of_unknown(label, layers, chosen.name))
    return write_model(model, writer, chosen, tokenizer=tokenizer or tokenizer_of(model), extra=extra)


def info(path: str | os.PathLike[str]) -> "Info":
    """What a folder or hub id holds, from headers alone.

    Raises:
        PlanishError: if it is no model.
    """
    folder = QuantizedFolder.open(path)
    source = folder.source if folder else open_source(path)
    skeleton = source.skeleton()
    arch = discover(skeleton)
    return Info(
        source=source,
        shapes=linears(arch, skeleton),
        tables=table_shapes(arch, skeleton),
        schemes=folder.schemes if folder else {},
        format=folder.format.name if folder else "16-bit",
        manifest=RunManifest.read(source.folder) if source.folder else None,
    )


@dataclass(frozen=True, kw_only=True)
class Info:
    """A model's size, linears, schemes and the run that made it.

    Args:
        shapes: (out, in) of the linears of the blocks. tables: those of the embedding and an untied head.
        schemes: of what is quantized of both.
    """

    source: Source
    shapes: dict[str, tuple[int, int]]
    tables: dict[str, tuple[int, int]]
    schemes: dict[str, Scheme]
    format: str
    manifest: RunManifest | None

    def summary(self) -> list[str]:
        """Lines for a user."""
        model = self.source.skeleton()
        count = sum(p.numel() for p in model.parameters())
        inside = [str(scheme) for name, scheme in self.schemes.items() if name in self.shapes]
        kinds = ", ".join(f"{n} x {scheme}" for scheme, n in Counter(inside).most_common())
        lines = [
            f"{self.source.label}: {type(model).__name__}, {count / 1e6:.1f} M parameters, format {self.format}",
            f"{len(inside)} of {len(self.shapes)} linears quantized: {kinds or 'none'}",
            *(f"{name} quantized: {self.schemes[name]}" for name in self.tables if name in self.schemes),
            f"{bits_per_weight(self.schemes, self.shapes | self.tables, count):.2f} bits a weight with embeddings",
        ]
        if self.manifest:
            run = self.manifest
            keys = " ".join(f"{key}={value}" for key, value in run.keys.items())
            lines.append(
                f"made by {run.recipe} {keys} from {run.model} on {run.data}, "
                f"{run.samples} x {run.seqlen} tokens, seed {run.seed}"
            )
        if self.schemes:
            able = [verdict.target for verdict in verdicts(self.format, set(self.schemes.values())) if verdict.loads]
            lines.append(f"loads in {', '.join(['Planish', *able])}")
        return lines
