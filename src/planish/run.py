"""Run: one recipe over one model, from a source of weights to a sink of codes.

It loads what stands before the blocks, records the streams, frees it, and walks the recipe's stages. Peak
memory is one span of blocks, its fit, and the streams. With a journal, what a span finished is kept there
before the next one starts, and a run goes on behind what it finds there. Knows nothing of formats.
"""

import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import planish.kernels  # noqa: F401  registers the fast kernels of the fake quantizer
from planish import data as texts
from planish.arch import Arch
from planish.errors import PlanishError
from planish.fit.reconstruct import Outcome
from planish.fit.spans import Job, Keep, Sink, run_stage, trial
from planish.journal import Journal, fingerprint
from planish.log import Clock, Event, Progress, RunManifest, peak_bytes
from planish.mix import Data, Text, blend, is_own, name_of, needs_tokenizer
from planish.own_text import own_windows
from planish.plan import StreamPlan, measure_room, plan_streams
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
        data: calibration text, a mix of several, or token ids int64 [n, seqlen]; see `planish.mix`.
        watch: what the windows held out are of, if not of the same.
        stream_dir: folder for streams that don't fit memory; that for temporary files if not given.
        journal: where the run is kept and found again; streams lie where it says.

    Attributes:
        plan: where the streams will live; None if the recipe needs no data.
        watched: the source that is watched and not trained on, if there is one.
        left_out: what of the recipe the run goes without, and why, if it does.
    """

    source: Source
    arch: Arch
    recipe: Recipe
    schemes: dict[str, Scheme]
    device: torch.device
    micro_batch: int
    seed: int
    storage: str
    progress: Progress | None
    data: Data
    samples: int
    seqlen: int
    tokenizer: Any
    stream_dir: Path | None = None
    journal: Journal | None = None
    watch: Data | None = None
    watched: str = field(default="", init=False)
    left_out: str = field(default="", init=False)
    ids: Tensor | None = field(default=None, init=False)
    plan: StreamPlan | None = field(default=None, init=False)
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise PlanishError(f"a batch size of {self.micro_batch}; at least 1 sample at a time is needed")
        self.dtype = compute_dtype(self.source.dtype, self.device)
        if len(self.recipe.blocks) != 1 and self.recipe.stages != (self.recipe.whole,):
            raise PlanishError(
                f"recipe {self.recipe.name!r} goes through the blocks more than once; one pass is supported"
            )
        if not self.recipe.needs_data:
            if self.watch is not None:
                raise PlanishError(f"recipe {self.recipe.name!r} fits nothing to watch; drop watch")
            return
        self._check_tokenizer()
        found = blend(
            self.data, self._cut, self.samples, seed=self.seed, watch=self.watch, holdout=self.recipe.holdout
        )
        (self.ids,), self.watched = found.tensors, found.watched
        self.notes += [*found.notes, *([f"the state kept is the best on {self.watched}"] if self.watched else [])]
        if self.recipe.blocks:
            self.plan = self._plan(*self.ids.shape)
            self.notes.append(self.plan.summary())

    def some(self, count: int) -> Tensor:
        """About so many of the run's windows, from all over them; new ones where the recipe needs none.

        Raises:
            PlanishError: if there is no tokenizer, or not enough text.
        """
        if self.ids is not None:
            return self.ids[:: -(-len(self.ids) // count)]
        self._check_tokenizer()
        return blend(self.data, self._cut, count, seed=self.seed).tensors[0]

    def _check_tokenizer(self) -> None:
        if self.tokenizer is None and needs_tokenizer(self.data, self.watch):
            raise PlanishError(f"{self.source.label} comes without a tokenizer; pass tokenizer=, or token ids as data")

    def _cut(self, source: Text, count: int) -> tuple[tuple[Tensor], str]:
        """Windows of one source of the mix."""
        if is_own(source):
            return (self.own_text(count),), ""
        fitted = self.recipe.holdout > 0
        ids, note = texts.windows(self.tokenizer, source, count, self.seqlen, self.seed, brief=not fitted)
        return (ids,), note

    def own_text(self, count: int) -> Tensor:
        """So many windows that the float model writes."""
        about: Any = {"device": self.device, "dtype": self.dtype, "seed": self.seed, "progress": self.progress}
        return own_windows(self.source, self.tokenizer, count, self.seqlen, **about)

    def _plan(self, samples: int, seqlen: int) -> StreamPlan:
        fit = self.recipe.blocks[0].fit
        hidden = self.source.config.get_text_config().hidden_size
        return plan_streams(
            samples,
            seqlen,
            hidden,
            self.dtype,
            self.storage,
            self.device,
            measure_room(self.device, self.stream_folder),
            count=1 if fit is None else 2 if fit.target == "float" else 3,
            keep=self.journal is not None,
        )

    @property
    def stream_folder(self) -> Path:
        return self.journal.streams if self.journal else self.stream_dir or Path(tempfile.gettempdir())

    @property
    def data_name(self) -> str:
        return "none" if self.ids is None else name_of(self.data)

    @property
    def data_sha256(self) -> str:
        return "" if self.ids is None else texts.sha256(self.ids)

    def identity(self, manifest: RunManifest, recipe: str) -> dict[str, Any]:
        """All that decides what this run writes; one that was killed goes on only for the same.

        Args:
            recipe: as it was asked for, 'path/to/file.py:function' perhaps.

        Raises:
            PlanishError: if the model is in memory, where it can't be told from another one.
        """
        folder, files = self.source.folder, self.source.files()
        if not files:
            raise PlanishError("--resume needs a model in a folder; write this one with save_pretrained() first")
        files += [] if folder is None else [folder / "config.json"]
        facts = manifest.to_dict()
        del facts["figures"], facts["data"]  # a text is known by its hash
        code = recipe.rpartition(":")[0]
        return {
            **facts,
            "recipe code": fingerprint([Path(code)]) if code else "",
            "weights": fingerprint(files),
            "batch size": self.micro_batch,
            "dtype": str(self.dtype),
            "device": device_kind(self.device),
            "stream folder": str(self.stream_folder),
        }

    def execute(self, sink: Sink, keep: Keep | None = None) -> dict[str, Any]:
        """Quantize everything; codes go to the sink span by span, other tensors that were trained to `keep`.

        Returns:
            Figures of the run: seconds, peak bytes, held-out loss before and after each span, by linear the
            relative error of its weight, and how many tokens reached each expert.
        """
        clock = Clock()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        facts = _Facts(**(self.journal.facts if self.journal else {}))
        first = self.journal.blocks if self.journal else 0
        turnable = [name for name, scheme in self.schemes.items() if scheme.turned]
        self.schemes |= {name: self.schemes[name].unturned() for name in facts.unturned}
        self._say_notes(first)
        stream = self._stream(first, facts) if self.ids is not None and first < self.arch.num_blocks else None
        (stage,) = self.recipe.blocks
        job = Job(
            stage=stage,
            blocks=self,
            schemes=self.schemes,
            stream=stream,
            sink=sink,
            keep=keep,
            device=self.device,
            micro_batch=facts.micro_batch or self.micro_batch,
            seed=self.seed,
            clock=clock,
            first=first,
            errors=facts.errors,
            routed=facts.routed,
        )
        if stage.fit is not None and self.device.type == "cuda" and not first:
            job = trial(job)
        before = facts.seconds

        def finished(blocks: int, outcome: Outcome | None) -> None:
            facts.seconds, facts.micro_batch = before + clock.seconds, job.micro_batch
            facts.unturned = [name for name in turnable if not self.schemes[name].turned]
            if outcome is not None:
                facts.losses.append([outcome.before, outcome.after])
                facts.notes.extend(outcome.notes)
            if self.journal is not None:
                if stream is not None and blocks < self.arch.num_blocks:
                    facts.generation = stream.settle()
                self.journal.commit(blocks, dataclasses.asdict(facts))

        run_stage(dataclasses.replace(job, finished=finished), self.progress)
        return {
            "seconds": round(before + clock.seconds, 2),
            "peak_bytes": peak_bytes(self.device),
            "losses": facts.losses,
            "errors": {name: float(f"{error:.4g}") for name, error in facts.errors.items()},
            "notes": [*facts.notes, self.left_out] if self.left_out else facts.notes,
        } | ({"routed": facts.routed} if facts.routed else {})

    def _say_notes(self, first: int) -> None:
        going_on = [f"going on behind block {first} of {self.arch.num_blocks}"] if first else []
        for note in [*self.notes, *going_on]:
            if self.progress:
                self.progress(Event(stage="data", index=0, total=self.arch.num_blocks, note=note))

    def _stream(self, first: int, facts: "_Facts") -> BlockStream:
        assert self.ids is not None and self.plan is not None
        if self.journal is not None:
            self.journal.streams.mkdir(parents=True, exist_ok=True)
        with self.source.lend(self.arch.around, self.device, self.dtype) as model:  # neither head nor vision tower
            blocks = model.get_submodule(self.arch.blocks)
            assert isinstance(blocks, nn.ModuleList)
            return BlockStream(
                model.get_submodule(self.arch.decoder),
                blocks,
                self.ids,
                device=self.device,
                storage=self.plan.where,
                micro_batch=facts.micro_batch or self.micro_batch,
                quantized=self.recipe.blocks[0].fit is not None,
                directory=self.stream_folder,
                keep=self.journal is not None,
                generation=facts.generation if first else None,
            )

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


@dataclass(kw_only=True)
class _Facts:
    """What finished spans leave to a run that goes on behind them, in the journal's JSON.

    `micro_batch` is the one that fitted the GPU's memory, which another day might give another one;
    `generation` says which files hold the streams, `unturned` which linears' inputs aren't turned though it was asked
    for.
    """

    seconds: float = 0.0
    micro_batch: int = 0
    generation: int = 0
    losses: list[list[float]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    routed: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unturned: list[str] = field(default_factory=list)


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


def device_kind(device: torch.device) -> str:
    """What of a device decides the last bits of a result: two of a kind give the same ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """bf16 on a GPU (fp16 overflows on massive activations); on a CPU fp32, which every CPU multiplies fast."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
