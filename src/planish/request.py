"""Request: what a user asks for, checked, and made into a run, before any work.

`resolve` reads headers only and says what a request comes to; `make_run` chooses samples and plans memory.
Everything wrong with a request is said here. Knows nothing of what becomes of the codes.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from planish.adapter import adapted
from planish.arch import Arch, discover, linears
from planish.attention import check_heads
from planish.data import check_seqlen
from planish.errors import PlanishError, UnsupportedScheme, nearest
from planish.fit.allocate import Widths
from planish.formats import FORMATS, choose
from planish.formats import verify as verify_schemes
from planish.formats.format import Format
from planish.gguf_file import check as check_gguf
from planish.journal import Journal
from planish.log import Progress, RunManifest, versions
from planish.mix import Data
from planish.recipes import Recipe, build, describe, split_preset
from planish.run import Run, compute_device
from planish.scheme import Average, Scheme, SchemeMap, bits_per_weight
from planish.source import Source, open_source
from planish.tables import table_schemes, table_shapes
from planish.targets import GGUF, choose_for, joined
from planish.trainable import check_trainer
from planish.transform.rotate import RotatedSource

SAMPLES, SEQLEN = 128, 2048

ModelLike = str | os.PathLike[str] | PreTrainedModel


class Afterwards(NamedTuple):
    """What is done to the finished folder before it gets its name: a line for a user, and work(folder, that name)."""

    note: str
    work: Callable[[Path, str], None]


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A request, checked: what will be done to which linears.

    Args:
        schemes: scheme by full name of each linear to quantize.
        shapes: (out, in) of every linear of the blocks, quantized or not.
        tables: scheme of the embedding (and an untied head), if they are quantized. around: (out, in) of these.
        parameters: of the whole model, tied ones once.
        gguf: a GGUF file shall be written beside the checkpoint.
        widths: linears whose bits are yet to be measured, see `planish.widths`; `schemes` has a stand-in of the size.
        then: where the format asked for can't hold these schemes: how it gets them.
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
    tables: dict[str, Scheme]
    around: dict[str, tuple[int, int]]
    gguf: bool = False
    widths: Widths | None = None
    then: Afterwards | None = None

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model."""
        return bits_per_weight(self.schemes | self.tables, self.shapes | self.around, self.parameters)

    def summary(self) -> list[str]:
        """Lines for a user: recipe, scheme, how many of how many linears, bits a weight, what is padded."""
        keys = " ".join(f"{key}={value}" for key, value in self.keys.items())
        padded = [n for n, s in self.schemes.items() if self.shapes[n][1] % s.group_in(self.shapes[n][1])]
        lines = [
            f"{self.source.label}: {self.recipe.name} {keys}".rstrip(),
            f"scheme {self.scheme_text}, format {self.format.name}{' and gguf' * self.gguf}: {len(self.schemes)} of "
            f"{len(self.shapes)} linears, {self.bits_per_weight:.2f} bits a weight with embeddings",
        ]
        if self.widths is not None:
            lines.append(self.widths.summary(self.schemes))
        if self.then is not None:
            lines.append(self.then.note)
        if isinstance(self.source, RotatedSource):
            lines.append(self.source.note)
        if padded:
            lines.append(f"the last group of a row is shorter in {len(padded)} linears, such as {padded[0]}")
        return lines


def resolve(
    model: ModelLike,
    recipe: str = "planish",
    scheme: str = "w4g128",
    *,
    layers: Iterable[str] = (),
    ignore: Iterable[str] = (),
    preset: str | None = None,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    format: str = "auto",
    target: str | None = None,
    tp: int = 1,
    embeddings: int | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    **keys: Any,
) -> Resolved:
    """Check a request and say what it comes to; reads headers, no weights.

    Args:
        adapter: folder of a LoRA of this model, merged into its weights first.
        format: 'auto', one of `planish.formats.FORMATS`, or 'gguf': that file then lies beside a native checkpoint.
        target: who shall load it, one of `planish.targets.TARGETS`, which says the format. tp: GPUs it cuts layers for.
        embeddings: bits of the embedding and the head: 16, 8 or 4; if not given 16, and 8 in a GGUF.
        others: as of `quantize`.

    Raises: PlanishError for anything wrong with it.
    """
    if format not in ("auto", GGUF, *FORMATS):
        raise PlanishError(f"no format {format!r}: {nearest(format, [*FORMATS, GGUF])}")
    built = _recipe(recipe, preset, keys)
    average = Average.parse(scheme)
    scheme_map = SchemeMap.parse(scheme if average is None else str(average.candidates[0]), layers, ignore)
    source = _source(model, revision, adapter, built)
    arch = discover(skeleton := source.skeleton())
    shapes = linears(arch, skeleton)
    check_heads(skeleton, schemes := scheme_map.resolve(shapes))
    hold = partial(_held, source, shapes, _with_offsets(built, format), target, tp, embeddings)
    widths = None if average is None else _widths(average, scheme_map, schemes, hold, shapes)
    asked, chosen, bits = hold(schemes if widths is None else schemes | widths.every())
    schemes |= {} if widths is None else widths.even()
    samples, seqlen = data_size(recipe, preset, samples, seqlen, source.config)
    return Resolved(
        source=source,
        recipe=built,
        keys={**split_preset(recipe, preset)[0], **keys},
        schemes=schemes,
        scheme_text=", ".join([str(average or scheme_map.default), *scheme_map.said]),
        shapes=shapes,
        parameters=sum(p.numel() for p in skeleton.parameters()),
        arch=arch,
        format=chosen,
        samples=samples,
        seqlen=seqlen,
        tables=table_schemes(bits, around := table_shapes(arch, skeleton), chosen.name),
        around=around,
        gguf=asked == GGUF,
        widths=widths,
    )


def _with_offsets(recipe: Recipe, asked: str) -> str:
    """The format that is asked for; native where the recipe trains offsets in weight units."""
    if recipe.whole is None or recipe.whole.inside is None or not recipe.whole.inside.offset:
        return asked
    if asked not in ("auto", "native"):
        raise PlanishError(f"{asked} can't hold offsets in weight units; give offset=integer, or --format native")
    return "native"


def _held(
    source: Source,
    shapes: dict[str, tuple[int, int]],
    format: str,
    target: str | None,
    tp: int,
    embeddings: int | None,
    schemes: dict[str, Scheme],
) -> tuple[str, Format, int]:
    """The format asked for, that of the folder, and bits of the tables, if these schemes can be held so."""
    every = {name: schemes.get(name) for name in shapes}
    asked = format if target is None else choose_for(target, every, shapes, format=format, tp=tp)
    bits = (8 if asked == GGUF else 16) if embeddings is None else embeddings
    chosen = _format(asked, every, shapes, bits)
    if asked == GGUF:
        check_gguf(source, schemes, shapes)
    return asked, chosen, bits


def _widths(
    average: Average,
    scheme_map: SchemeMap,
    schemes: dict[str, Scheme],
    hold: Callable[[dict[str, Scheme]], object],
    shapes: dict[str, tuple[int, int]],
) -> Widths:
    """The linears that no rule names, in units of one scheme each, and the candidates that format and target take.

    Raises:
        PlanishError: if a rule names every linear, no candidate is taken, or the average isn't among those that are.
    """
    free = {name: shapes[name] for name in schemes if not scheme_map.named(name)}
    if not free:
        raise PlanishError(f"--layers names every linear, and none is left for an average of {average.bits:g} bits")
    units: dict[str, list[str]] = {}
    for name in free:
        units.setdefault(joined(name), []).append(name)
    taken, refusals = [], []
    for scheme in average.candidates:
        try:
            hold(schemes | dict.fromkeys(free, scheme))
            taken.append(scheme)
        except UnsupportedScheme as error:
            refusals.append(error)
    if not taken:
        raise refusals[0]
    return Widths(average=average, units=tuple(map(tuple, units.values())), shapes=free, candidates=tuple(taken))


def _source(
    model: ModelLike, revision: str | None, adapter: str | os.PathLike[str] | None, recipe: Recipe
) -> Source:
    """The model, with its adapter, turned where the recipe says so."""
    source = adapted(open_source(model, revision=revision), adapter)
    return source if recipe.rotation is None else recipe.rotation.of(source)


def _recipe(name: str, preset: str | None, keys: dict[str, Any]) -> Recipe:
    """The recipe, which must start from a float model."""
    built = build(name, preset, keys)
    if not built.stages:
        raise PlanishError(f"recipe {name!r} rounds nothing; let another follow it, as {name}+rtn")
    if not built.blocks and (built.whole is None or built.whole.inside is None):
        raise PlanishError(
            f"recipe {name!r} trains a model that is quantized already, and this one isn't; quantize it first, then "
            f"planish finetune DIR --recipe {name}"
        )
    if built.whole is not None:
        check_trainer()
    return built


def _format(
    asked: str, schemes: dict[str, Scheme | None], shapes: dict[str, tuple[int, int]], embeddings: int
) -> Format:
    """The format of the folder; a GGUF lies beside a native one."""
    if asked == "auto":
        return choose(schemes, shapes) if embeddings == 16 else FORMATS["native"]
    chosen = FORMATS["native" if asked == GGUF else asked]
    verify_schemes(chosen, schemes, shapes)
    return chosen


def data_size(
    recipe: str, preset: str | None, samples: int | None, seqlen: int | None, config: PreTrainedConfig
) -> tuple[int, int]:
    """How many windows of how many tokens: as asked for, else as the preset says, else as many as the model can take.

    Raises:
        PlanishError: if longer windows are asked for than the model has positions for.
    """
    _, about_data = split_preset(recipe, preset)
    samples = about_data.get("samples", SAMPLES) if samples is None else samples
    if seqlen is None:
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        wanted = about_data.get("seqlen", SEQLEN)
        return samples, min(wanted, longest) if isinstance(longest, int) else wanted
    check_seqlen(config, seqlen)
    return samples, seqlen


def stream_folder(stream_dir: str | os.PathLike[str] | None) -> Path | None:
    """A folder for activations, if one is named.

    Raises:
        PlanishError: if there is none of that name.
    """
    if stream_dir is not None and not Path(stream_dir).is_dir():
        raise PlanishError(f"no such folder for activations: {stream_dir}; make it, or name another")
    return None if stream_dir is None else Path(stream_dir).resolve()


def with_batch(recipe: str, batch_size: int | None, request: dict[str, Any]) -> dict[str, Any]:
    """The request with `batch_size` as a key of the recipe, if the recipe takes steps at all."""
    takes_it = batch_size is not None and "batch_size" in describe(recipe)["keys"]
    return {**request, "batch_size": batch_size} if takes_it else request


def make_run(
    resolved: Resolved,
    data: Data,
    device: str | torch.device | None,
    batch_size: int | None,
    seed: int,
    storage: str,
    progress: Progress | None,
    tokenizer: Any,
    *,
    stream_dir: Path | None,
    journal: Journal | None = None,
    watch: Data | None = None,
) -> Run:
    """The run of a request; arguments as of `api.quantize`.

    Raises:
        PlanishError: if there isn't enough text, room or such a device.
    """
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
        stream_dir=stream_dir,
        journal=journal,
        watch=watch,
    )


def manifest_of(resolved: Resolved, run: Run, figures: dict[str, Any]) -> RunManifest:
    """What run.json says of a run that is finished."""
    chosen = {} if resolved.widths is None else {"widths": resolved.widths.summary(resolved.schemes)}
    return RunManifest(
        model=resolved.source.label,
        recipe=resolved.recipe.name,
        keys=resolved.keys,
        scheme=resolved.scheme_text,
        layers={name: str(scheme) for name, scheme in (resolved.schemes | resolved.tables).items()},
        format=resolved.format.name,
        data=run.data_name,
        data_sha256=run.data_sha256,
        samples=0 if run.ids is None else len(run.ids),
        seqlen=resolved.seqlen,
        seed=run.seed,
        watched=run.watched,
        versions=versions(),
        figures={**figures, **chosen, "bits_per_weight": round(resolved.bits_per_weight, 4)},
    )
