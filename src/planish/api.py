"""The verbs of Planish: load, quantize, save, and what they resolve a request to before any work.

`quantize` gives an ordinary transformers model with packed layers; `quantize_to` streams the same run
into a folder, block by block, so that the model is never in memory as a whole. Everything else here joins
the parts: a source of weights, a recipe, a stream of activations, a sink of codes, a format.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planish.arch import Arch, discover, linears
from planish.checkpoint import CheckpointWriter
from planish.errors import PlanishError, nearest
from planish.folder import QuantizedFolder, assemble, config_of, plain_tensors, side_files, tokenizer_of, verify_folder
from planish.formats import FORMATS, choose
from planish.formats import verify as verify_schemes
from planish.formats.format import Format
from planish.kernels.linear import PackedLinear
from planish.log import Progress, RunManifest, versions
from planish.qtensor import QTensor
from planish.recipes import Recipe, build, describe, split_preset
from planish.run import Run, compute_device
from planish.scheme import Scheme, SchemeMap, bits_per_weight
from planish.source import Source, open_source

SAMPLES, SEQLEN = 128, 2048

ModelLike = str | os.PathLike[str] | PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A request, checked: what will be done to which linears.

    Args:
        schemes: scheme by full name of each linear to quantize.
        shapes: (out, in) of every linear of the blocks, quantized or not.
        parameters: of the whole model, tied ones once.
    """

    source: Source
    recipe: Recipe
    keys: dict[str, Any]
    schemes: dict[str, Scheme]
    scheme_text: str
    shapes: dict[str, tuple[int, int]]
    parameters: int
    arch: Arch
    format: Format
    samples: int
    seqlen: int

    def summary(self) -> list[str]:
        """Lines for a user: recipe, scheme, how many of how many linears, bits a weight, what is padded."""
        keys = " ".join(f"{key}={value}" for key, value in self.keys.items())
        padded = [n for n, s in self.schemes.items() if self.shapes[n][1] % s.group_in(self.shapes[n][1])]
        lines = [
            f"{self.source.label}: {self.recipe.name} {keys}".rstrip(),
            f"scheme {self.scheme_text}, format {self.format.name}: {len(self.schemes)} of {len(self.shapes)} linears, "
            f"{bits_per_weight(self.schemes, self.shapes, self.parameters):.2f} bits a weight with embeddings",
        ]
        if padded:
            lines.append(f"the last group of a row is shorter in {len(padded)} linears, such as {padded[0]}")
        return lines


def resolve(
    model: ModelLike,
    recipe: str = "signround",
    scheme: str = "w4g128",
    *,
    layers: Iterable[str] = (),
    ignore: Iterable[str] = (),
    preset: str | None = None,
    revision: str | None = None,
    format: str = "auto",
    samples: int | None = None,
    seqlen: int | None = None,
    **keys: Any,
) -> Resolved:
    """Check a request and say what it comes to; reads headers, no weights.

    Args as of `quantize`.

    Raises:
        PlanishError: for anything wrong with it.
    """
    _, about_data = split_preset(recipe, preset)
    built = build(recipe, preset, keys)
    scheme_map = SchemeMap.parse(scheme, layers, ignore)
    if format != "auto" and format not in FORMATS:
        raise PlanishError(f"no format {format!r}: {nearest(format, FORMATS)}")
    if isinstance(model, PreTrainedModel) and any(isinstance(part, PackedLinear) for part in model.modules()):
        raise PlanishError(f"the {type(model).__name__} is quantized already; give the 16-bit original")
    source = open_source(model, revision=revision)
    skeleton = source.skeleton()
    arch = discover(skeleton)
    shapes = linears(arch, skeleton)
    schemes = scheme_map.resolve(shapes)
    every = {name: schemes.get(name) for name in shapes}
    chosen = choose(every, shapes) if format == "auto" else FORMATS[format]
    verify_schemes(chosen, every, shapes)
    own, _ = split_preset(recipe, preset)
    return Resolved(
        source=source,
        recipe=built,
        keys={**own, **keys},
        schemes=schemes,
        scheme_text=str(scheme_map),
        shapes=shapes,
        parameters=sum(p.numel() for p in skeleton.parameters()),
        arch=arch,
        format=chosen,
        samples=about_data.get("samples", SAMPLES) if samples is None else samples,
        seqlen=about_data.get("seqlen", SEQLEN) if seqlen is None else seqlen,
    )


def quantize(
    model: ModelLike,
    recipe: str = "signround",
    scheme: str = "w4g128",
    *,
    data: str | Path | Tensor = "embedded",
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    storage: str = "auto",
    progress: Progress | None = None,
    tokenizer: Any = None,
    **request: Any,
) -> PreTrainedModel:
    """Quantize a model; the result is an ordinary transformers model whose linears are packed.

    Args:
        model: Hugging Face folder, hub id, .gguf file, or a model in memory (which is left as it is).
        recipe: name in `planish.recipes.RECIPES`, or './mine.py:mine'.
        scheme: such as 'w4g128', 'w2g64asym', 'w4pc'.
        data: calibration text, see `planish.data`, or token ids int64 [samples, seqlen].
        device: where blocks are fitted; the GPU if there is one.
        batch_size: samples a step, the recipe's own if not given; where memory is too short for it, a step goes
            through it in parts.
        seed: of the windows and of the fit.
        storage: where activations wait: 'auto', 'device', 'host', 'disk'.
        progress: called with a `planish.log.Event` after each span.
        tokenizer: for `data`, where the source has none.
        request: layers, ignore, preset, revision, format, samples, seqlen, and the recipe's own keys.

    Raises:
        PlanishError: for anything wrong with the request, before any work.
    """
    resolved = resolve(model, recipe, scheme, **_with_batch(recipe, batch_size, request))
    run = _prepare(resolved, data, device, batch_size, seed, storage, progress, tokenizer)
    found: dict[str, QTensor] = {}
    run.execute(lambda name, quantized: found.update({name: quantized.to("cpu")}))
    return assemble(resolved.source, found.items(), run.device, resolved.source.dtype)


def quantize_to(
    model: ModelLike,
    out: str | os.PathLike[str],
    recipe: str = "signround",
    scheme: str = "w4g128",
    *,
    data: str | Path | Tensor = "embedded",
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    storage: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
    tokenizer: Any = None,
    announce: Callable[[Resolved], None] | None = None,
    **request: Any,
) -> RunManifest:
    """Quantize into a folder, block by block; the model is never in memory as a whole.

    The folder gets its name only when it is complete and was read back, every code, scale and zero equal.

    Args:
        out: new or empty folder, or one to replace if `overwrite`.
        announce: called with what the request resolved to, before any work.
        others: as of `quantize`.

    Returns:
        The manifest, also written as run.json.
    """
    writer = CheckpointWriter(out, overwrite=overwrite)
    resolved = resolve(model, recipe, scheme, **_with_batch(recipe, batch_size, request))
    run = _prepare(resolved, data, device, batch_size, seed, storage, progress, tokenizer)
    if resolved.source.folder is not None and resolved.source.folder.resolve() == writer.out:
        raise PlanishError(f"{out} is the model itself; write to another folder")
    if announce:
        announce(resolved)
    digests: dict[str, str] = {}

    def sink(name: str, quantized: QTensor) -> None:
        on_host = quantized.to("cpu")
        digests[name] = on_host.digest()
        for key, tensor in resolved.format.encode(name, on_host).items():
            writer.add(key, tensor)

    with writer:
        figures = run.execute(sink)
        for name in resolved.source.names():
            if name.removesuffix(".weight") not in digests:
                writer.add(name, resolved.source.get(name))
        manifest = _manifest(resolved, run, figures)
        every = {name: resolved.schemes.get(name) for name in resolved.shapes}
        source, skeleton = resolved.source, resolved.source.skeleton()
        config = config_of(source.config, skeleton, source.dtype, resolved.format.config(every))
        files = side_files(source.folder, skeleton, run.tokenizer)
        writer.finish(
            config, {**files, "run.json": manifest.to_dict()}, verify=lambda folder: verify_folder(folder, digests)
        )
    return manifest


def _with_batch(recipe: str, batch_size: int | None, request: dict[str, Any]) -> dict[str, Any]:
    """The request with `batch_size` as a key of the recipe, if the recipe takes steps at all."""
    takes_it = batch_size is not None and "batch_size" in describe(recipe)["keys"]
    return {**request, "batch_size": batch_size} if takes_it else request


def _prepare(
    resolved: Resolved,
    data: str | Path | Tensor,
    device: str | torch.device | None,
    batch_size: int | None,
    seed: int,
    storage: str,
    progress: Progress | None,
    tokenizer: Any,
) -> Run:
    return Run(
        source=resolved.source,
        arch=resolved.arch,
        recipe=resolved.recipe,
        schemes=resolved.schemes,
        device=compute_device(device),
        micro_batch=8 if batch_size is None else batch_size,
        seed=seed,
        storage=storage,
        progress=progress,
        data=data,
        samples=resolved.samples,
        seqlen=resolved.seqlen,
        tokenizer=tokenizer or resolved.source.tokenizer(),
    )


def _manifest(resolved: Resolved, run: Run, figures: dict[str, Any]) -> RunManifest:
    return RunManifest(
        model=resolved.source.label,
        recipe=resolved.recipe.name,
        keys=resolved.keys,
        scheme=resolved.scheme_text,
        layers={name: str(scheme) for name, scheme in resolved.schemes.items()},
        format=resolved.format.name,
        data=run.data_name,
        data_sha256=run.data_sha256,
        samples=0 if run.ids is None else len(run.ids),
        seqlen=resolved.seqlen,
        seed=run.seed,
        versions=versions(),
        figures=figures,
    )


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
        An ordinary transformers model in eval mode; quantized layers are `planish.kernels.PackedLinear`.
    """
    where = compute_device(device)
    folder = QuantizedFolder.open(path, revision=revision)
    if folder is None:
        source = open_source(path, revision=revision)
        return assemble(source, (), where, dtype or source.dtype)
    return assemble(folder.source, folder.layers(), where, dtype or folder.source.dtype)


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
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not packed:
        raise PlanishError("the model has no quantized layer; use save_pretrained() for a 16-bit one")
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear | nn.Linear) and module is not model.get_output_embeddings()
    }
    schemes = {name: packed[name].qtensor().scheme if name in packed else None for name in shapes}
    if format != "auto" and format not in FORMATS:
        raise PlanishError(f"no format {format!r}: {nearest(format, FORMATS)}")
    chosen = choose(schemes, shapes) if format == "auto" else FORMATS[format]
    verify_schemes(chosen, schemes, shapes)
    digests = {}
    with writer:
        for name, module in packed.items():
            quantized = module.qtensor().to("cpu")
            digests[name] = quantized.digest()
            for key, tensor in chosen.encode(name, quantized).items():
                writer.add(key, tensor)
        for key, tensor in plain_tensors(model):
            writer.add(key, tensor)
        tokenizer = tokenizer or tokenizer_of(model)
        return writer.finish(
            config_of(model.config, model, model.dtype, chosen.config(schemes)),
            side_files(None, model, tokenizer),
            verify=lambda folder: verify_folder(folder, digests),
        )


def info(path: str | os.PathLike[str]) -> "Info":
    """What a folder or hub id holds, from headers alone.

    Raises:
        PlanishError: if it is no model.
    """
    folder = QuantizedFolder.open(path)
    source = folder.source if folder else open_source(path)
    skeleton = source.skeleton()
    shapes = linears(discover(skeleton), skeleton)
    return Info(
        source=source,
        shapes=shapes,
        schemes=folder.schemes if folder else {},
        format=folder.format.name if folder else "16-bit",
        manifest=RunManifest.read(source.folder) if source.folder else None,
    )


@dataclass(frozen=True, kw_only=True)
class Info:
    """A model's size, linears, schemes and the run that made it."""

    source: Source
    shapes: dict[str, tuple[int, int]]
    schemes: dict[str, Scheme]
    format: str
    manifest: RunManifest | None

    def summary(self, linears: bool = False) -> list[str]:
        """Lines for a user; with `linears` one for each linear."""
        model = self.source.skeleton()
        count = sum(p.numel() for p in model.parameters())
        lines = [
            f"{self.source.label}: {type(model).__name__}, {count / 1e6:.1f} M parameters, format {self.format}",
            f"{len(self.schemes)} of {len(self.shapes)} linears quantized: "
            + (", ".join(f"{n} x {s}" for s, n in Counter(map(str, self.schemes.values())).most_common()) or "none"),
            f"{bits_per_weight(self.schemes, self.shapes, count):.2f} bits a weight with embeddings",
        ]
        if self.manifest:
            run = self.manifest
            keys = " ".join(f"{key}={value}" for key, value in run.keys.items())
            lines.append(
                f"made by {run.recipe} {keys} from {run.model} on {run.data}, "
                f"{run.samples} x {run.seqlen} tokens, seed {run.seed}"
            )
        if linears:
            lines += [
                f"  {name}  {list(shape)}  {self.schemes.get(name, '16-bit')}" for name, shape in self.shapes.items()
            ]
        return lines
