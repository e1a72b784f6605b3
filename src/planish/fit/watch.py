"""Watch: what the two ways to train a whole-model stage share: windows, rates, held-out loss, best state, checkpoints.

    rate of a parameter = rate of its slot * (the parameter's unit, where rates are relative)

A few windows are held out: the state kept is the best on them, step 0 counted, and a loss that isn't finite rolls
back to it and halves the rates. It lies in host memory. Checkpoints are safetensors and JSON and name the run they
belong to. Knows nothing of how a step is made.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from planish.checkpoint import replace
from planish.data import sha256
from planish.errors import PlanishError
from planish.fit.loss import NO_LABEL
from planish.fit.objective import Objective, shifted
from planish.fit.reconstruct import Outcome
from planish.fit.whole import EndToEnd
from planish.log import Clock, Event, Progress, peak_bytes

# by slot of a stage's rates: parameters, each with the unit of its rate
Slots = Mapping[str, Sequence[tuple[nn.Parameter, float]]]

FACTORS = "factors"  # the slot whose parameters decay
ROLLED_BACK = "rolled back, rate halved"
BEST, OPTIMIZER, STATE = "best.safetensors", "optimizer.safetensors", "planish.json"


class Windows:
    """Token windows with what comes next, and the other model's hidden states.

    Args:
        ids: int64 [n, tokens]. labels: the same shape, aligned with ids; NO_LABEL where there is no loss.
        teacher: last hidden states of the other model [n, tokens, hidden], or None.
    """

    def __init__(self, ids: Tensor, labels: Tensor, teacher: Tensor | None) -> None:
        self.ids, self.labels, self.teacher = ids, shifted(labels), teacher

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | Tensor) -> dict[str, Tensor]:
        row = {"input_ids": self.ids[index], "labels": self.labels[index]}
        return row if self.teacher is None else {**row, "teacher": self.teacher[index]}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run gives besides the stage.

    Args:
        folder: where checkpoints are kept. resume: go on from the last one there.
        save_every: steps between checkpoints; 0 writes none.
        micro_batch: samples in one forward and backward pass.
        checkpointing: recompute the blocks in the backward pass instead of keeping their activations; lean
            training always does.
        lean: by `finetune_lean`, one block at a time, instead of the Trainer; None is undecided (see `tune.planned`)
            and, left so, the Trainer.
        track: "tensorboard", "wandb" or "none".

    Raises:
        PlanishError: if lean training is to be tracked.
    """

    folder: Path
    device: torch.device
    seed: int
    micro_batch: int
    resume: bool = False
    save_every: int = 0
    checkpointing: bool = False
    lean: bool | None = None
    track: str = "none"
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.lean and self.track != "none":
            raise PlanishError(f"lean training writes nothing for {self.track}; drop --track, or give --no-lean")


class Watch:
    """Measures the held-out loss, keeps the best state, says how it goes, and keeps both in checkpoints.

    Args:
        held_out: indices of the windows held out.
        steps: of the whole run. micro: windows in one forward pass.

    Attributes:
        before, loss: held-out loss at step 0 and of the state kept; of `begin` or `resume`.
        notes: what went wrong on the way.
        damping: what a lean loop multiplies rates by.
    """

    def __init__(
        self,
        objective: Objective,
        windows: Windows,
        held_out: Tensor,
        stage: EndToEnd,
        setting: Setting,
        steps: int,
        micro: int,
    ) -> None:
        self.objective, self.windows, self.held_out = objective, windows, held_out
        self.stage, self.setting = stage, setting
        self.steps, self.micro = steps, micro
        self.every = max(1, steps // stage.checks)
        how = json.loads(json.dumps(dataclasses.asdict(stage)))  # as a checkpoint's JSON gives it back
        self.identity = {
            "stage": how.pop("name"),
            **how,
            "steps": steps,
            "seed": setting.seed,
            "micro_batch": micro,
            "data": sha256(windows.ids),
            "lean": bool(setting.lean),
        }
        self.before = self.loss = float("nan")
        self.notes, self.clock, self.start = list[str](), Clock(), 0
        self.best: dict[str, Tensor] = {}
        self.damping = 1.0

    @property
    def outcome(self) -> Outcome:
        return Outcome(before=self.before, after=self.loss, notes=tuple(self.notes))

    def begin(self) -> None:
        """At step 0, if the run goes on from no checkpoint."""
        self.before = self.loss = self._measure()
        self.best = {name: value.to("cpu", copy=True) for name, value in self.objective.state_dict().items()}

    def due(self, done: int) -> bool:
        return done % self.every == 0 or done == self.steps

    def check(self, done: int, note: str = "") -> bool:
        """Measure after `done` steps: is the loss finite? The state is kept if it is the best, rolled back if not
        finite; the caller then forgets moments and halves its rates.

        Args:
            note: what else is to be said.
        """
        value = self._measure()
        finite = math.isfinite(value)
        if not finite:
            self.restore()
            # said once: what goes on being too fast is halved again
            told = any(ROLLED_BACK in earlier for earlier in self.notes)
            note = note if told else f"loss not finite at step {done}: {ROLLED_BACK}"
        elif value < self.loss:
            self.loss = value
            for name, current in self.objective.state_dict().items():
                self.best[name].copy_(current)
        self.notes += [note] if note else []
        self._report(done, note)
        return finite

    def restore(self) -> None:
        """Take back the best state."""
        for name, current in self.objective.state_dict().items():
            current.copy_(self.best[name])

    def last_checkpoint(self) -> Path | None:
        """The last whole checkpoint, if the run goes on from one.

        Raises:
            PlanishError: if it is another run's.
        """
        folder = last_whole(self.setting.folder) if self.setting.resume else None
        if folder is None:
            return None
        theirs = _state_of(folder)["identity"]
        for key, value in self.identity.items():
            if theirs.get(key) != value:
                raise PlanishError(
                    f"{folder} is of another run: {key} was {theirs.get(key)!r} and is {value!r}; "
                    "give the same request, or start anew without --resume"
                )
        return folder

    def resume(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Take over the best state and the notes of a checkpoint; what else `save` was given."""
        saved = _state_of(folder)
        self.before, self.loss, self.notes = saved["before"], saved["best"], saved["notes"]
        self.start = saved["done"]
        self.best = load_file(folder / BEST)
        return load_file(folder / OPTIMIZER), saved["facts"]

    def save(self, folder: Path, done: int, optimizer: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Add to a checkpoint what a resumed run needs; nothing is to be written behind that.

        Args:
            done: steps. optimizer: its state. facts: what else JSON is to keep.
        """
        save_file(self.best, folder / BEST)
        save_file({name: value.contiguous() for name, value in optimizer.items()}, folder / OPTIMIZER)
        saved = {"identity": self.identity, "before": self.before, "best": self.loss, "notes": self.notes}
        # written last: a checkpoint without it isn't whole
        replace(folder / STATE, {**saved, "done": done, "facts": dict(facts)})

    def _report(self, done: int, note: str) -> None:
        if self.setting.progress is None:
            return
        left = self.clock.eta(done - self.start, self.steps - self.start)
        self.setting.progress(
            Event(
                stage=self.stage.name,
                index=done,
                total=self.steps,
                before=self.before,
                after=self.loss,
                seconds=self.clock.seconds,
                eta=left,
                peak_bytes=peak_bytes(self.setting.device),
                note=note,
            )
        )

    @torch.no_grad()
    def _measure(self) -> float:
        """Mean loss over the tokens held out."""
        was, total, count = self.objective.training, 0.0, 0
        self.objective.eval()
        for part in self.held_out.split(self.micro):
            batch = {key: value.to(self.setting.device) for key, value in self.windows[part].items()}
            total += self.objective(**batch, num_items_in_batch=1)["loss"].item()
            count += int((batch["labels"] != NO_LABEL).sum())
        self.objective.train(was)
        return total / max(1, count)


def peak_rates(parameters: Slots, stage: EndToEnd) -> Iterator[tuple[nn.Parameter, float, float]]:
    """Each parameter with its rate at the peak, and its weight decay."""
    for slot, members in parameters.items():
        decay = stage.weight_decay if slot == FACTORS else 0.0
        for parameter, unit in members:
            yield parameter, stage.rates[slot] * (unit if stage.relative else 1.0), decay


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint in a folder that was written to its end."""
    found = [file.parent for file in folder.glob(f"checkpoint-*/{STATE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def begun(folder: Path) -> dict[str, Any]:
    """How the run trained whose checkpoints are in a folder, as its identity has it; {} if there are none."""
    last = last_whole(folder)
    return {} if last is None else dict(_state_of(last)["identity"])


def _state_of(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state
