"""What a run left in its folder, gathered for a reader: figures, schemes, sizes.

    read_checkpoint(folder, number, name) -> Checkpoint

From run.json (recipe, losses, errors), eval.json (perplexity, tasks), the sizes of the weights' files and, for the
bits a weight, shapes from their headers. What a folder doesn't say is None or empty: 16-bit models and other tools'
checkpoints have neither file. Nothing is measured here, no weight is read, and nothing is known of charts or pages.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planish.arch import discover, linears
from planish.errors import PlanishError, first_line
from planish.folder import QuantizedFolder
from planish.log import RunManifest
from planish.scheme import Scheme, bits_per_weight
from planish.source import FolderSource


@dataclass(frozen=True)
class Measure:
    """A figure of merit and its standard error, if that is known."""

    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.stderr is None else f"{self.value:.3f} ± {self.stderr:.3f}"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder as the report sees it; what isn't known is None or empty.

    Args:
        number: how the page calls it, from 1.
        schemes: of each linear of the blocks, None for one left in 16 bits.
        format: of the file, or the dtype of a model that isn't quantized.
        bits: a weight, over the whole model. size: bytes of the weights' files.
        errors: relative error of each quantized layer's weight.
        losses: of each span, before and after the fit; those that are no numbers are NaN.
        perplexity, tasks: by the name of text or task.
    """

    name: str
    number: int
    manifest: RunManifest | None
    schemes: dict[str, Scheme | None]
    format: str
    bits: float | None
    size: int | None
    errors: dict[str, float]
    losses: list[tuple[float, float]]
    perplexity: dict[str, Measure] = field(default_factory=dict)
    tasks: dict[str, Measure] = field(default_factory=dict)
    agreement: dict[str, Measure] = field(default_factory=dict)


def read_checkpoint(folder: Path, number: int, name: str) -> Checkpoint:
    """What a folder says of itself.

    Raises:
        PlanishError: if it holds neither weights nor run.json, or a damaged eval.json.
    """
    weights = [*folder.glob("model*.safetensors"), *folder.glob("*.gguf")] if folder.is_dir() else []
    manifest = RunManifest.read(folder) if folder.is_dir() else None
    if not weights and manifest is None:
        raise PlanishError(
            f"{folder} is no model: it has neither run.json nor weights (model*.safetensors, *.gguf); "
            "give the folder of a checkpoint"
        )
    size = sum(file.stat().st_size for file in weights) or None
    figures = as_mapping(manifest.figures) if manifest else {}
    evaluation = _evaluation(folder / "eval.json")
    return Checkpoint(
        name=name,
        number=number,
        manifest=manifest,
        size=size,
        **_stored(folder, manifest, size),
        errors=as_numbers(figures.get("errors")),
        losses=as_pairs(figures.get("losses")),
        perplexity=_perplexity(evaluation.get("perplexity")),
        tasks=_tasks(evaluation.get("tasks")),
        agreement=_agreement(evaluation.get("agreement")),
    )


def _stored(folder: Path, manifest: RunManifest | None, size: int | None) -> dict[str, Any]:
    """Fields of a Checkpoint that headers tell: schemes, format, bits.

    The folder's own word goes before run.json's. A format that isn't ours gives no schemes: then the bits are those
    on disk.
    """
    source, schemes, format = _headers(folder)
    if manifest:
        format = format or str(manifest.format)
        schemes = schemes or _parsed(as_mapping(manifest.layers))
    if source is None:
        return {"schemes": schemes, "format": format, "bits": None}
    model = source.skeleton()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not schemes:
        return {"schemes": {}, "format": format, "bits": 8 * size / parameters if size else None}
    sizes = {name.removesuffix(".weight"): parameter.shape for name, parameter in model.named_parameters()}
    shapes = {name: (sizes[name][0], sizes[name][1]) for name in schemes if len(sizes.get(name, ())) == 2}
    bits = bits_per_weight({name: schemes[name] for name in shapes}, shapes, parameters)
    every: dict[str, Scheme | None] = {}
    with suppress(PlanishError):
        every = dict.fromkeys(linears(discover(model), model))
    return {"schemes": every | schemes, "format": format, "bits": bits}


def _headers(folder: Path) -> tuple[FolderSource | None, dict[str, Scheme], str]:
    """The model behind the weights, its schemes and format: None, {} and "" where they can't be told."""
    with suppress(PlanishError):
        if quantized := QuantizedFolder.open(folder):
            return quantized.source, quantized.schemes, quantized.format.name
    with suppress(PlanishError):
        source = FolderSource(folder, quantized=True)
        how = source.quantization_config
        dtype = str(source.dtype).removeprefix("torch.")
        return source, {}, dtype if how is None else str(as_mapping(how).get("quant_method", ""))
    return None, {}, ""


def _parsed(layers: Mapping[str, Any]) -> dict[str, Scheme]:
    """Schemes from run.json; one that this Planish can't read is left out."""
    schemes = {}
    for layer, text in layers.items():
        with suppress(PlanishError):
            schemes[layer] = Scheme.parse(str(text))
    return schemes


def _evaluation(file: Path) -> Mapping[str, Any]:
    try:
        return as_mapping(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise PlanishError(f"{file} is damaged ({first_line(error)}); evaluate again, or delete it") from error


def as_mapping(value: object) -> Mapping[str, Any]:
    """A JSON object, or an empty one for anything else: files of others may hold anything."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: object) -> float:
    """A finite number, else NaN."""
    plain = isinstance(value, int | float) and abs(value) < 1e300
    return float(value) if plain else math.nan  # type: ignore[arg-type]


def as_numbers(value: object) -> dict[str, float]:
    """The finite numbers of a JSON object."""
    pairs = ((str(key), _number(entry)) for key, entry in as_mapping(value).items())
    return {key: entry for key, entry in pairs if math.isfinite(entry)}


def as_pairs(value: object) -> list[tuple[float, float]]:
    """Losses [[before, after], ...]; none at all if there is nothing to draw."""
    pairs = [(_number(entry[0]), _number(entry[1])) for entry in map(as_list, as_list(value)) if len(entry) == 2]
    return pairs if any(number > 0 for pair in pairs for number in pair) else []


def _perplexity(value: object) -> dict[str, Measure]:
    found = {}
    for entry in map(as_mapping, as_list(value)):
        if (perplexity := _number(entry.get("value"))) > 0:
            windows = f", windows of {entry['seqlen']}" if "seqlen" in entry else ""
            found[f"{entry.get('data', 'a text')}{windows}"] = Measure(perplexity)
    return found


def _tasks(value: object) -> dict[str, Measure]:
    """{"piqa": {"acc": 0.68, "stderr": 0.01}}: of each task the first figure that isn't a standard error."""
    found = {}
    for task, entry in as_mapping(value).items():
        numbers = as_numbers(entry)
        for metric in [name for name in numbers if "stderr" not in name][:1]:
            found[f"{task}, {metric}"] = Measure(numbers[metric], numbers.get("stderr"))
    return found


def _agreement(value: object) -> dict[str, Measure]:
    """KL and top-1 agreement by prompts and float model."""
    found = {}
    for entry in map(as_mapping, as_list(value)):
        numbers = as_numbers(entry)
        for name, title in (("kl", "KL in nats a token"), ("top1", "Top-1 agreement")):
            if name in numbers:
                where = f"{title}, {entry.get('with', 'the float model')} on {entry.get('prompts', 'prompts')}"
                found[where] = Measure(numbers[name], numbers.get(f"{name}_stderr"))
    return found
