"""Forecast: what a run will take and give, said before any work: `planish plan`.

    forecast(resolved, gpu_memory=parse_size("24GB")).lines()

Memory and disk are `needs`'s, from shapes alone; seconds are `probe`'s pace, measured on a few steps of one span,
times samples, blocks and steps; who loads the result is `targets`'s. What doesn't fit gets suggestions, each
predicted like the request itself.
"""

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish import data as texts
from planish.errors import PlanishError
from planish.fit.reconstruct import Samples
from planish.fit.spans import Stage
from planish.inside import check_inside, open_start
from planish.mix import Data, Text, blend, is_own, needs_tokenizer
from planish.needs import Case, Needs, disk_of, needs_of, private_memory
from planish.plan import Room, duration, gigabytes, measure_room
from planish.plan import gpu_memory as memory_of_gpu
from planish.probe import Pace, pace_of
from planish.recipes import RECIPES, describe
from planish.request import Resolved, make_run
from planish.run import Run, compute_device
from planish.targets import GGUF, Verdict, verdicts

UNITS = {"mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30, "tib": 2**40}
# of a GPU's memory what CUDA itself takes; an estimate
CONTEXT = 600 * 10**6
SHORTEST = 256  # tokens of a window, below which none is suggested


def parse_size(text: str) -> int:
    """Bytes of '24GB', '24 GiB', '24G' or '500MB'.

    Raises:
        PlanishError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mgt]i?)b?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise PlanishError(f"no size {text!r}; write it as 24GB, 24GiB or 500MB")
    return round(float(match[1]) * UNITS[match[2] + "b"])


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Flags with which a run fits, and what it then takes."""

    flags: str
    needs: Needs


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take and give; bytes and seconds.

    Args:
        request: lines that say what was asked for.
        disk: of the checkpoint. bits_per_weight: of the whole model.
        on_gpu: whether it runs on one. needs: memory, and why it won't run, if it won't.
        gpu_free, host_free: what there is; of the host with what this process has already.
        batch: samples a step.
        seconds: None if that wasn't probed.
        verdicts: who loads the result, and how.
        suggestions: flags with which it fits, if it doesn't as it is.
    """

    request: tuple[str, ...]
    disk: int
    bits_per_weight: float
    on_gpu: bool
    needs: Needs
    gpu_free: int
    host_free: int
    batch: int
    seconds: float | None
    verdicts: tuple[Verdict, ...]
    suggestions: tuple[Suggestion, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.needs.problem

    def lines(self) -> list[str]:
        """Lines for a terminal."""
        needs = self.needs
        parts = "" if needs.micro_batch >= self.batch else f"; {needs.micro_batch} of {self.batch} samples in a pass"
        rows = {"on disk": f"{gigabytes(self.disk)}, {self.bits_per_weight:.2f} bits a weight with embeddings"}
        if self.on_gpu:
            rows["GPU memory"] = f"{gigabytes(needs.gpu)} of {gigabytes(self.gpu_free)}{parts}"
        rows["host memory"] = f"{gigabytes(needs.host)} of {gigabytes(self.host_free)}"
        if needs.streams is not None:
            rows["activations"] = needs.streams.summary().removeprefix("activations: ")
        rows["time"] = "not measured" if self.seconds is None else f"about {duration(self.seconds)}"
        for verdict in self.verdicts:
            rows[verdict.target] = verdict.how.replace("{path}", "DIR") if verdict.loads else f"no, it {verdict.reason}"
        table = [f"  {name:<14}{value}" for name, value in rows.items()]
        return [*self.request, *table, *(f"  note: {note}" for note in self.notes), *self._advice()]

    def _advice(self) -> list[str]:
        if self.fits:
            return ["it fits"]
        if not self.suggestions:
            return [f"it doesn't fit: {self.needs.problem}", "no flag that Planish knows makes it fit"]
        found = [f"it doesn't fit: {self.needs.problem}", "it would with"]
        for suggestion in self.suggestions:
            gpu = f"{gigabytes(suggestion.needs.gpu)} of GPU memory, " if self.on_gpu else ""
            found.append(f"  {suggestion.flags:<32}{gpu}{gigabytes(suggestion.needs.host)} of host memory")
        return found


def forecast(
    resolved: Resolved,
    *,
    data: Data = "embedded",
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    storage: str = "auto",
    stream_dir: Path | None = None,
    tokenizer: Any = None,
    gpu_memory: int | None = None,
    probe: bool = True,
) -> Forecast:
    """Predict a run.

    Args:
        resolved: the request, `batch_size` a key of its recipe already: see `request.with_batch`.
        gpu_memory: bytes of the GPU that it shall run on; of the one that is here if not given. Without a GPU here it
            is predicted for one of that size, but for the time.
        probe: measure the pace, on a few steps of one span.
        others: as of `api.quantize`.

    Raises:
        PlanishError: for data that isn't there, or a model whose memory can't be predicted.
    """
    where, absent = _device(device, gpu_memory)
    if batch_size is not None and batch_size < 1:
        raise PlanishError(f"a batch size of {batch_size}; at least 1 sample at a time is needed")
    tokenizer = tokenizer or resolved.source.tokenizer()  # a run has it in memory, if it needs data or not
    ids, notes = _windows(resolved, data, tokenizer, seed)
    case = Case(
        resolved=resolved,
        samples=0 if ids is None else len(ids),
        device=where,
        micro_batch=8 if batch_size is None else batch_size,
        storage=storage,
        room=_room(where, stream_dir or Path(tempfile.gettempdir()), gpu_memory),
        idle=private_memory(),
        disk=disk_of(resolved),
    )
    needs, pace = needs_of(case), None
    if probe and not absent and not needs.problem and resolved.recipe.blocks:
        lying = needs.streams.where if needs.streams else storage
        text, micro = data if ids is None else ids, needs.micro_batch
        run = make_run(resolved, text, where, micro, seed, lying, None, tokenizer, stream_dir=stream_dir)
        case, needs, pace = _probed(case, needs, run)
    return Forecast(
        request=tuple(resolved.summary()),
        disk=case.disk.total,
        bits_per_weight=resolved.bits_per_weight,
        on_gpu=where.type == "cuda",
        needs=needs,
        gpu_free=case.room.device,
        host_free=case.room.host + case.idle,
        batch=case.batch,
        seconds=None if pace is None else seconds_of(case, pace),
        verdicts=tuple(verdicts(GGUF if resolved.gguf else resolved.format.name, set(resolved.schemes.values()))),
        suggestions=tuple(_suggestions(case)) if needs.problem else (),
        notes=(*notes, *([needs.left_out] if needs.left_out else []), *_remarks(resolved, probe, absent, pace)),
    )


def _device(device: str | torch.device | None, gpu_memory: int | None) -> tuple[torch.device, bool]:
    """The device of the run, and whether it is one that isn't here."""
    if gpu_memory is None:
        return compute_device(device), False
    if str(device) == "cpu":
        raise PlanishError("--gpu-memory is that of a GPU; drop it, or --device cpu")
    absent = not torch.cuda.is_available()
    return torch.device("cuda") if absent else compute_device(device), absent


def _check(resolved: Resolved) -> None:
    """Refuse what a stage with factors inside would."""
    stage = resolved.recipe.whole
    if stage is not None and stage.inside is not None:
        start = open_start(stage.inside.start) if stage.inside.start else None
        check_inside(stage, resolved.schemes, resolved.shapes, start)


def _remarks(resolved: Resolved, probe: bool, absent: bool, pace: Pace | None) -> Iterator[str]:
    """What the figures leave out."""
    if not resolved.recipe.blocks:
        yield f"the time of {resolved.recipe.name}, which trains the model as a whole, isn't measured beforehand"
    elif absent:
        yield "the time can only be measured where it runs; on the host CUDA's own libraries come on top"
    elif probe and pace is None:
        yield "the time is measured where it fits"
    if resolved.recipe.whole is not None and pace is not None:
        yield f"the time is that of the blocks, without the {resolved.recipe.whole.name} behind them"
    if resolved.gguf:
        yield "the GGUF file takes about as much disk again"


def _windows(
    resolved: Resolved, data: Data, tokenizer: Any, seed: int
) -> tuple[Tensor | None, list[str]]:
    """The samples that there are, and a note if they are fewer than asked for.

    Raises:
        PlanishError: if there are none, or the model has no room for factors inside, or their start doesn't fit it.
    """
    _check(resolved)
    if not resolved.recipe.needs_data:
        return None, []
    if tokenizer is None and needs_tokenizer(data):
        raise PlanishError(f"{resolved.source.label} comes without a tokenizer; pass tokenizer=, or token ids as data")
    notes = []

    def cut(source: Text, count: int) -> tuple[tuple[Tensor], str]:
        if is_own(source):
            notes.append("what the model takes to write its own text isn't counted")
            size, vocabulary = (count, resolved.seqlen), resolved.source.config.get_text_config().vocab_size
            return (torch.randint(0, vocabulary, size, generator=torch.Generator().manual_seed(seed)),), ""
        ids, note = texts.windows(tokenizer, source, count, resolved.seqlen, seed)
        return (ids,), note

    found = blend(data, cut, resolved.samples, seed=seed)
    return found.tensors[0], [*found.notes, *notes]


def _room(device: torch.device, folder: Path, limit: int | None) -> Room:
    """What is free, of a GPU that isn't here what CUDA leaves of `limit`."""
    if device.type != "cuda" or not torch.cuda.is_available():
        room = measure_room(torch.device("cpu"), folder)
        return room if limit is None else dataclasses.replace(room, device=max(0, limit - CONTEXT))
    room, free = measure_room(device, folder), memory_of_gpu(device)
    return dataclasses.replace(room, device=free if limit is None else max(0, min(free, limit - CONTEXT)))


def _probed(case: Case, needs: Needs, run: Run) -> tuple[Case, Needs, Pace | None]:
    """The pace; what it showed of memory besides is in the case and the needs."""
    try:
        pace = pace_of(run, case.resolved.format, case.disk.tensors // case.disk.shards)
    except torch.OutOfMemoryError:
        return (
            case,
            dataclasses.replace(needs, problem="a span was tried, and took more GPU memory than there is"),
            None,
        )
    if case.device.type != "cuda":
        return case, needs, pace
    torch.cuda.empty_cache()
    # libraries that are loaded with their first use take host memory, and workspaces on the GPU
    case = dataclasses.replace(case, idle=max(case.idle, private_memory()), unseen=pace.held - needs.held)
    return case, needs_of(case), pace


def seconds_of(case: Case, pace: Pace) -> float:
    """Seconds of a run at a pace, from the first sample to the folder's name."""
    (stage,), steps, checked = case.resolved.recipe.blocks, 0, 0
    if stage.fit is not None:
        samples = Samples(case.samples, stage.fit.holdout, stage.fit.batch_size, 0)
        steps = stage.fit.steps_on(len(samples.rest))
        checked = len(samples.held_out) * (1 + -(-steps // max(1, steps // stage.fit.checks)))
    return pace.seconds(
        samples=case.samples,
        blocks=case.resolved.arch.num_blocks,
        steps=steps,
        checked=checked,
        written=case.disk.total,
        layers=len(case.disk.layers),
    )


Change = tuple[str, Callable[[Case], Case]]


def _suggestions(case: Case) -> list[Suggestion]:
    """Each kind of change that alone makes it fit, as mild as it may be; else as many of them together as it takes."""
    ladder = [kind for kind in (_spans(case), _storages(case), _batches(case), _lengths(case), _ends(case)) if kind]
    found = []
    for kind in ladder:
        tried = ((flags, needs_of(change(case))) for flags, change in kind)
        found += [Suggestion(flags=flags, needs=needs) for flags, needs in tried if not needs.problem][:1]
    if found:
        return found
    said: list[str] = []
    for kind in ladder:
        for flags, change in kind:
            needs = needs_of(change(case))
            if not needs.problem:
                return [Suggestion(flags=" ".join([*said, flags]), needs=needs)]
        said, case = [*said, flags], change(case)
    return []


def _spans(case: Case) -> list[Change]:
    recipe, fit = case.resolved.recipe, case.fit
    takes_it = recipe.name in RECIPES and "span" in describe(recipe.name)["keys"]
    return [("span=1", lambda case: _with_fit(case, span=1))] if fit and fit.span > 1 and takes_it else []


def _storages(case: Case) -> list[Change]:
    """Nearer to the disk than it is."""
    if case.samples == 0 or case.storage == "disk" or not case.resolved.recipe.blocks:
        return []
    names = ("host", "disk") if case.device.type == "cuda" and case.storage != "host" else ("disk",)
    return [(f"--storage {name}", partial(_stored, name)) for name in names]


def _stored(name: str, case: Case) -> Case:
    return dataclasses.replace(case, storage=name)


def _batches(case: Case) -> list[Change]:
    """A GPU's run with steps halves its passes by itself, so that smaller batches are no help there."""
    stepping = case.fit is not None or not case.resolved.recipe.blocks
    if case.samples == 0 or (case.device.type == "cuda" and stepping):
        return []
    sizes = [case.micro_batch >> shift for shift in range(1, case.micro_batch.bit_length())]
    return [(f"--batch-size {size}", partial(_batched, size)) for size in sizes]


def _batched(size: int, case: Case) -> Case:
    case = dataclasses.replace(case, micro_batch=size)
    return _with_fit(case, batch_size=size) if case.fit else case


def _lengths(case: Case) -> list[Change]:
    if case.samples == 0:
        return []
    seqlen = case.resolved.seqlen
    lengths = [seqlen >> shift for shift in range(1, seqlen.bit_length()) if seqlen >> shift >= SHORTEST]
    return [(f"--seqlen {length}", partial(_shortened, length)) for length in lengths]


def _ends(case: Case) -> list[Change]:
    """Without a stage behind the blocks: layers are written as they come, and don't wait for it in memory."""
    recipe = case.resolved.recipe
    takes_it = recipe.name in RECIPES and "end_to_end" in describe(recipe.name)["keys"]
    return [("end_to_end=false", _blocks_alone)] if takes_it and recipe.whole else []


def _blocks_alone(case: Case) -> Case:
    recipe = dataclasses.replace(case.resolved.recipe, stages=case.resolved.recipe.blocks)
    return dataclasses.replace(case, resolved=dataclasses.replace(case.resolved, recipe=recipe))


def _shortened(seqlen: int, case: Case) -> Case:
    return dataclasses.replace(case, resolved=dataclasses.replace(case.resolved, seqlen=seqlen))


def _with_fit(case: Case, **changes: Any) -> Case:
    recipe = case.resolved.recipe
    stages = tuple(
        dataclasses.replace(stage, fit=dataclasses.replace(stage.fit, **changes))
        if isinstance(stage, Stage) and stage.fit
        else stage
        for stage in recipe.stages
    )
    resolved = dataclasses.replace(case.resolved, recipe=dataclasses.replace(recipe, stages=stages))
    return dataclasses.replace(case, resolved=resolved)
