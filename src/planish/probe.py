"""Probe: the pace of a run, from a few steps of its first span, on the real weights and the real device.

    seconds = beginning + samples (embedding + blocks * passing) + spans (span + steps * step)
              + bytes / writing + layers * opening

Two short runs of one span differ in their steps alone, so that their difference is the steps'. It goes through
what the run goes through, the encoding and reading back of codes included. Knows nothing of how much is to be done.
"""

import dataclasses
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from planish.bitstream import Stream
from planish.checkpoint import sync
from planish.fit.spans import Job, Stage, run_stage
from planish.fit.step import WARM_UP
from planish.formats.format import Format
from planish.qtensor import QTensor
from planish.run import Run
from planish.source import FolderSource, Source
from planish.stream import BlockStream

FILLER = 1 << 25  # bytes written besides, since making a few of them last takes as long as many
SHORT = 20.0  # seconds: a span that takes more isn't asked for many steps
CERTAIN = 0.5  # seconds that steps must take for a difference to be theirs, not the machine's


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of the parts of a run.

    Args:
        embedding: a sample, up to the first block.
        passing: a sample through a block, with all of the streams.
        forward: a sample through a block, once.
        span: a span of `blocks`, without samples and steps. step: one of its steps.
        once: what the first span takes more than another, such as compiling.
        writing: bytes to disk in a second.
        opening: a shard, which is done anew for each layer that is read back.
        beginning: to open the model and its tokenizer, and what was written.
        held: bytes on the GPU at most, without the streams; 0 on a CPU.
    """

    embedding: float
    passing: float
    forward: float
    span: float
    step: float
    once: float
    writing: float
    opening: float
    beginning: float
    held: int
    blocks: int

    def seconds(self, *, samples: int, blocks: int, steps: int, checked: int, written: int, layers: int) -> float:
        """Of a whole run.

        Args:
            samples: in the streams. blocks: of the model. steps: of a span.
            checked: samples that the held-out loss is measured on, all checks of a span together.
            written: bytes of the checkpoint. layers: of it that are quantized.
        """
        spans = blocks / self.blocks
        through = blocks * (samples * self.passing + checked * self.forward)
        at_work = spans * (self.span + steps * self.step) + self.once
        on_disk = written / self.writing + layers * self.opening
        return self.beginning + samples * self.embedding + through + at_work + on_disk


class _Timed(BlockStream):
    """A stream that knows how long it took to pass through blocks."""

    seconds, passes = 0.0, 0

    def advance(self, stream: Tensor, block: nn.Module, index: int) -> None:
        start = now(self.device)
        super().advance(stream, block, index)
        self.seconds, self.passes = self.seconds + now(self.device) - start, self.passes + 1


class _First:
    """The first blocks of a run, as if there were no more."""

    def __init__(self, run: Run, count: int) -> None:
        self.names, self.load, self.unload = run.names[:count], run.load, run.unload


@dataclass
class _Sink:
    """Takes codes as a run does: encoded, and read back as what is written will be."""

    format: Format
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, name: str, quantized: QTensor) -> None:
        stream = Stream.of(quantized).to("cpu")
        tensors = self.format.write(name, stream)
        stream.digest()
        self.format.read(name, tensors, stream.scheme, stream.shape).digest()
        self.tensors |= tensors


def now(device: torch.device) -> float:
    """Seconds, all work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def pace_of(run: Run, format: Format, entries: int) -> Pace:
    """Measure a run's pace on its first span; nothing is kept.

    Args:
        entries: of a shard's header.

    Raises:
        torch.OutOfMemoryError: if the span doesn't fit.
    """
    (stage,) = run.recipe.blocks
    # what libraries take at their first use, such as workspaces, stays, and is the run's
    before = torch.cuda.memory_allocated(run.device) if run.device.type == "cuda" else 0
    length = min(stage.fit.span if stage.fit else 1, run.arch.num_blocks)
    if stage.fit is None:
        first, second = (_span(run, format, stage, length) for _ in "ab")
        return _pace(run, length, second, entries, before, once=first.total - second.total)
    few = 1 if run.device.type == "cpu" else WARM_UP + 2  # as many as a step takes to be captured and replayed
    first = second = _span(run, format, _with_steps(stage, few), length)
    if run.device.type == "cuda":  # the first one compiled
        second = _span(run, format, _with_steps(stage, few), length)
    for more in (1,) if second.total > SHORT else (4, 64):
        third = _span(run, format, _with_steps(stage, few + more), length)
        longer = third.total - third.passing - second.total + second.passing
        if longer > CERTAIN:
            break
    step = max(0.0, longer / more)
    return _pace(run, length, third, entries, before, once=first.total - second.total, step=step, steps=few + more)


def _with_steps(stage: Stage, steps: int) -> Stage:
    assert stage.fit is not None
    return dataclasses.replace(stage, fit=dataclasses.replace(stage.fit, steps=steps, checks=1))


@dataclass(frozen=True, kw_only=True)
class _Times:
    """Of one span: seconds in all, of the embedding, and of passing through blocks; and what is to be written."""

    total: float
    embedding: float
    passing: float
    passes: int
    samples: int
    held: int
    tensors: dict[str, Tensor]


def _span(run: Run, format: Format, stage: Stage, length: int) -> _Times:
    """One span with as few samples as its batches take."""
    on_gpu = run.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(run.device)
    start = now(run.device)
    stream = None if run.ids is None else _stream(run, run.ids[: _samples(run, stage)], stage)
    begun, sink = now(run.device), _Sink(format)
    job = Job(
        stage=stage,
        blocks=_First(run, length),
        schemes=run.schemes,
        stream=stream,
        sink=sink,
        keep=lambda name, value: None,
        device=run.device,
        micro_batch=run.micro_batch,
        seed=run.seed,
    )
    run_stage(job)
    total = now(run.device) - begun
    held = torch.cuda.max_memory_allocated(run.device) if on_gpu else 0
    if stream is not None and stream.storage == "device":
        held -= stream.fp.nbytes + stream.quant.nbytes
    return _Times(
        total=total,
        embedding=begun - start,
        passing=stream.seconds if stream else 0.0,
        passes=stream.passes if stream else 0,
        samples=len(stream) if stream else 0,
        held=held,
        tensors=sink.tensors,
    )


def _samples(run: Run, stage: Stage) -> int:
    """As many as a batch takes beside those that are held out."""
    batch = max(run.micro_batch, stage.fit.batch_size) if stage.fit else run.micro_batch
    return batch + max(1, batch // 3) if stage.fit else batch


def _stream(run: Run, ids: Tensor, stage: Stage) -> _Timed:
    assert run.plan is not None
    with run.source.lend(run.arch.around, run.device, run.dtype) as model:
        blocks: Any = model.get_submodule(run.arch.blocks)
        return _Timed(
            model.get_submodule(run.arch.decoder),
            blocks,
            ids,
            device=run.device,
            storage=run.plan.where,
            micro_batch=run.micro_batch,
            quantized=stage.fit is not None,
            directory=run.stream_folder,
        )


def _disk(tensors: dict[str, Tensor], folder: Path, entries: int) -> tuple[float, float]:
    """Bytes to disk in a second, and seconds to open a file of so many entries for one of them."""
    filled = {f"{number:050}": torch.empty(0) for number in range(entries - len(tensors))}
    filled["filler"] = torch.zeros(FILLER, dtype=torch.uint8)
    with tempfile.NamedTemporaryFile(prefix="planish-probe-", dir=folder) as file:
        start = time.perf_counter()
        save_file({**tensors, **filled}, file.name)
        sync(Path(file.name))
        written = time.perf_counter()
        for name in tensors:
            with safe_open(file.name, framework="pt") as handle:
                handle.get_tensor(name)
        opened = time.perf_counter()
    size = FILLER + sum(tensor.nbytes for tensor in tensors.values())
    return size / (written - start), (opened - written) / len(tensors)


def _beginning(source: Source) -> float:
    """Seconds until there is a model and its tokenizer, and to open once more what was written."""
    if not isinstance(source, FolderSource):
        return 0.0
    start = time.perf_counter()
    source.tokenizer()
    again = time.perf_counter()
    assert source.folder is not None
    FolderSource(source.folder, label=source.label, trust_remote_code=source.trust)
    return 2 * (time.perf_counter() - again) + again - start


def _pace(
    run: Run, length: int, times: _Times, entries: int, before: int, *, once: float, step: float = 0.0, steps: int = 0
) -> Pace:
    samples = max(1, times.samples)
    writing, opening = _disk(times.tensors, run.stream_folder, entries)
    return Pace(
        embedding=times.embedding / samples,
        passing=times.passing / samples / length,
        forward=times.passing / samples / max(1, times.passes),
        span=max(0.0, times.total - times.passing - steps * step),
        step=step,
        once=max(0.0, once),
        writing=writing,
        opening=opening,
        beginning=_beginning(run.source),
        held=max(0, times.held - before),
        blocks=length,
    )
