"""Run: one recipe over one model, from a source of weights to a sink of codes.

It loads what stands before the blocks, records the streams, frees it, and walks the recipe's stages. Peak
memory is one span of blocks, its fit, and the streams. Knows nothing of formats and folders.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import planish.kernels  # noqa: F401  registers the fast kernels of the fake quantizer
from planish import data as texts
from planish.arch import Arch
from planish.errors import PlanishError
from planish.fit.spans import Job, Sink, run_stage, trial
from planish.log import Clock, Event, Progress, peak_bytes
from planish.recipes import Recipe
from planish.scheme import Scheme
from planish.source import Source
from planish.stream import BlockStream


@dataclass(kw_only=True)
class Run:
    """One run; its samples are chosen, and refused if they can't be had, when it is made.

    Args:
        micro_batch: samples in one forward or backward pass.
        seed: of the choice of windows and of the fit.
        data: calibration text, or token ids int64 [n, seqlen].
    """

    source: Source
    arch: Arch
    recipe: Recipe
    schemes: Mapping[str, Scheme]
    device: torch.device
    micro_batch: int
    seed: int
    storage: str
    progress: Progress | None
    data: str | Path | Tensor
    samples: int
    seqlen: int
    tokenizer: Any
    ids: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise PlanishError(f"a batch size of {self.micro_batch}; at least 1 sample at a time is needed")
        self.dtype = compute_dtype(self.source.dtype, self.device)
        if len(self.recipe.stages) != 1:
            raise PlanishError(
                f"recipe {self.recipe.name!r} has {len(self.recipe.stages)} stages; one is supported yet"
            )
        if not self.recipe.needs_data:
            return
        if self.tokenizer is None and not isinstance(self.data, Tensor):
            raise PlanishError(f"{self.source.label} comes without a tokenizer; pass tokenizer=, or token ids as data")
        self.ids, note = texts.windows(self.tokenizer, self.data, self.samples, self.seqlen, self.seed)
        if note and self.progress:
            self.progress(Event(stage="data", index=0, total=self.arch.num_blocks, note=note))

    @property
    def data_name(self) -> str:
        return "none" if self.ids is None else "token ids" if isinstance(self.data, Tensor) else str(self.data)

    @property
    def data_sha256(self) -> str:
        return "" if self.ids is None else texts.sha256(self.ids)

    def execute(self, sink: Sink) -> dict[str, Any]:
        """Quantize everything; codes go to the sink span by span.

        Returns:
            Figures of the run: seconds, peak bytes, held-out loss before and after each span.
        """
        clock = Clock()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        stream = self._stream() if self.ids is not None else None
        (stage,) = self.recipe.stages
        job = Job(
            stage=stage,
            blocks=self,
            schemes=self.schemes,
            stream=stream,
            sink=sink,
            device=self.device,
            micro_batch=self.micro_batch,
            seed=self.seed,
            clock=clock,
        )
        if stage.fit is not None and self.device.type == "cuda":
            job = trial(job)
        outcomes = run_stage(job, self.progress)
        return {
            "seconds": round(clock.seconds, 2),
            "peak_bytes": peak_bytes(self.device),
            "losses": [[outcome.before, outcome.after] for outcome in outcomes],
            "notes": [note for outcome in outcomes for note in outcome.notes],
        }

    def _stream(self) -> BlockStream:
        assert self.ids is not None
        model = self.source.skeleton()
        outside = [name for name in self.arch.outside if name != self.arch.head]
        for name in outside:
            self.source.load(model.get_submodule(name), name, self.device, self.dtype)
        decoder = model.get_submodule(self.arch.blocks.rpartition(".")[0])
        blocks = model.get_submodule(self.arch.blocks)
        assert isinstance(blocks, nn.ModuleList)
        stream = BlockStream(
            decoder,
            blocks,
            self.ids,
            device=self.device,
            storage=self.storage,
            micro_batch=self.micro_batch,
            quantized=self.recipe.stages[0].fit is not None,
        )
        for name in outside:
            self.source.unload(model.get_submodule(name))
        return stream

    @property
    def names(self) -> list[str]:
        """Full names of the blocks, in order."""
        return [self.arch.block(index) for index in range(self.arch.num_blocks)]

    def load(self, index: int) -> nn.Module:
        """A block with its weights, on the device."""
        block = self.source.skeleton().get_submodule(self.names[index])
        self.source.load(block, self.names[index], self.device, self.dtype)
        return block

    def unload(self, index: int) -> None:
        self.source.unload(self.source.skeleton().get_submodule(self.names[index]))


def compute_device(device: str | torch.device | None) -> torch.device:
    """The one asked for, else the GPU if there is one.

    Raises:
        PlanishError: if there is no such device.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise PlanishError(f"no device {device!r}; use cpu, cuda or cuda:1") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise PlanishError(f"no device {str(chosen)!r} here ({torch.cuda.device_count()} GPUs); use cpu")
    return chosen


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """bf16 on a GPU (fp16 overflows on massive activations); on a CPU fp32, which every CPU multiplies fast."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
