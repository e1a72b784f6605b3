"""A whole-model stage by transformers' Trainer on accelerate, with what it leaves open filled in.

Scales of a quarter of a percent of the model are trained while its codes lie packed. A few windows are held out:
the state kept is the best on them, step 0 counted. Checkpoints hold what is trained and the optimizer's moments
as safetensors and JSON, no pickle, and name the recipe they belong to. Knows nothing of formats or sources.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from planish.data import sha256
from planish.errors import PlanishError
from planish.fit.loss import NO_LABEL
from planish.fit.objective import Objective, shifted
from planish.fit.reconstruct import Best, Outcome, Samples
from planish.fit.whole import EndToEnd
from planish.log import Clock, Event, Progress, peak_bytes

TRACKERS = ("none", "tensorboard", "wandb")
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


class Ordered(IterableDataset[dict[str, Tensor]]):
    """Windows in the order of the seed, every one once an epoch, as many as the steps take: a stream without epochs,
    so that no step is cut short at the end of one and a resumed run knows where it was."""

    def __init__(self, windows: Windows, samples: Samples, steps: int) -> None:
        self.windows = windows
        self.order = torch.cat([samples.next() for _ in range(steps)]).tolist()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.windows[index] for index in self.order)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run gives besides the stage.

    Args:
        folder: where the Trainer keeps its checkpoints. resume: go on from the last one there.
        save_every: steps between checkpoints; 0 writes none.
        micro_batch: samples in one forward and backward pass.
        checkpointing: recompute the blocks in the backward pass instead of keeping their activations.
        track: "tensorboard", "wandb" or "none".
    """

    folder: Path
    device: torch.device
    seed: int
    micro_batch: int
    resume: bool = False
    save_every: int = 0
    checkpointing: bool = False
    track: str = "none"
    progress: Progress | None = None


def finetune(
    objective: Objective,
    parameters: Mapping[str, Sequence[nn.Parameter]],
    windows: Windows,
    stage: EndToEnd,
    setting: Setting,
) -> Outcome:
    """Train in place.

    Args:
        parameters: by slot of `stage.rates`.

    Returns:
        Held-out loss before and of the state kept.

    Raises:
        PlanishError: if a checkpoint to go on from is another run's.
    """
    samples = Samples(len(windows), stage.holdout, stage.batch_size, setting.seed)
    batch = samples.batch_size
    micro = max(size for size in range(1, min(setting.micro_batch, batch) + 1) if batch % size == 0)
    steps = stage.steps_on(len(samples.rest))
    guard = Guard(objective, windows, samples.held_out, stage, setting, steps, micro)
    last = guard.last_checkpoint()
    trainer = Trainer(
        model=objective,
        args=_arguments(stage, setting, steps, micro, batch // micro),
        train_dataset=Ordered(windows, samples, steps),
        optimizers=(_optimizer(parameters, stage), None),
        callbacks=[guard],
    )
    trainer.remove_callback(PrinterCallback)
    with _checkpointing(objective.model, setting.checkpointing):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    objective.eval()
    assert guard.best is not None
    guard.best.restore()
    return Outcome(before=guard.before, after=guard.best.loss, notes=tuple(guard.notes))


class Guard(TrainerCallback):
    """Measures the held-out loss, keeps the best state, and adds to a checkpoint what a resumed run needs."""

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
        self.identity = {
            "stage": stage.name,
            "rates": dict(stage.rates),
            "steps": steps,
            "seed": setting.seed,
            "batch_size": stage.batch_size,
            "distill": stage.distill,
            "data": sha256(windows.ids),
        }
        self.best: Best | None = None
        self.before, self.notes, self.clock = float("nan"), list[str](), Clock()
        self._resumed: Path | None = None

    def last_checkpoint(self) -> Path | None:
        """The last whole checkpoint, if the run goes on from one; refused if it is another run's."""
        found = (
            [file.parent for file in self.setting.folder.glob(f"checkpoint-*/{STATE}")] if self.setting.resume else []
        )
        if not found:
            return None
        self._resumed = max(found, key=lambda folder: int(folder.name.rpartition("-")[2]))
        theirs = json.loads((self._resumed / STATE).read_text())["identity"]
        for key, value in self.identity.items():
            if theirs.get(key) != value:
                raise PlanishError(
                    f"{self._resumed} is of another run: {key} was {theirs.get(key)!r} and is {value!r}; "
                    "give the same request, or start anew without --resume"
                )
        return self._resumed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trained = list(self.objective.state_dict())
        parameters = [self.objective.get_parameter(name) for name in trained]
        if self._resumed is None:
            self.before = self._measure()
            self.best = Best(parameters, self.before)
            return
        saved = json.loads((self._resumed / STATE).read_text())
        self.before, self.notes = saved["before"], saved["notes"]
        self.best = Best(parameters, saved["best"])
        tensors = load_file(self._resumed / BEST)
        for kept, name in zip(self.best.state, trained, strict=True):
            kept.copy_(tensors[name])
        _load_optimizer(kwargs["optimizer"], load_file(self._resumed / OPTIMIZER))
        kwargs["lr_scheduler"].load_state_dict(saved["scheduler"])
        for group, rate in zip(kwargs["optimizer"].param_groups, kwargs["lr_scheduler"].get_last_lr(), strict=True):
            group["lr"] = rate

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        done = state.global_step
        if done % self.every and done != self.steps:
            return
        assert self.best is not None
        value, note = self._measure(), ""
        if math.isfinite(value):
            self.best.offer(value)
        else:
            self.best.restore()
            _forget(kwargs["optimizer"])
            note = f"loss not finite at step {done}: rolled back"
            self.notes.append(note)
        self._report(done, note)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.best is not None
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        names = list(self.objective.state_dict())
        save_file(dict(zip(names, self.best.state, strict=True)), folder / BEST)
        save_file(_optimizer_state(kwargs["optimizer"]), folder / OPTIMIZER)
        saved = {
            "identity": self.identity,
            "before": self.before,
            "best": self.best.loss,
            "notes": self.notes,
            "scheduler": kwargs["lr_scheduler"].state_dict(),
        }
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of the Trainer's, needed by nobody
        # written last: a checkpoint without it isn't whole
        (folder / STATE).write_text(json.dumps(saved))

    def _report(self, done: int, note: str) -> None:
        if self.setting.progress is None:
            return
        assert self.best is not None
        self.setting.progress(
            Event(
                stage=self.stage.name,
                index=done,
                total=self.steps,
                before=self.before,
                after=self.best.loss,
                seconds=self.clock.seconds,
                eta=self.clock.eta(done, self.steps),
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


def _arguments(stage: EndToEnd, setting: Setting, steps: int, micro: int, accumulation: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(setting.folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        warmup_steps=round(stage.warmup * steps),
        lr_scheduler_type="cosine",
        max_grad_norm=stage.clip,
        seed=setting.seed,
        save_strategy="steps" if setting.save_every else "no",
        save_steps=setting.save_every or 500,
        save_total_limit=2,
        save_only_model=True,
        logging_strategy="no" if setting.track == "none" else "steps",
        logging_steps=1,
        report_to=setting.track,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=setting.device.type == "cuda",
        use_cpu=setting.device.type == "cpu",
    )


def _optimizer(parameters: Mapping[str, Sequence[nn.Parameter]], stage: EndToEnd) -> torch.optim.Optimizer:
    """AdamW, one group a parameter, since each matrix's scales move in units of their own mean."""
    groups = [
        {"params": [parameter], "lr": stage.rates[slot] * _unit(parameter, slot, stage.relative)}
        for slot, members in parameters.items()
        for parameter in members
    ]
    return torch.optim.AdamW(groups, betas=stage.betas, weight_decay=0.0)


def _unit(parameter: Tensor, slot: str, relative: bool) -> float:
    return parameter.detach().abs().mean().item() if relative and slot == "scale" else 1.0


def _optimizer_state(optimizer: Any) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value.contiguous() for index, values in state.items() for key, value in values.items()}


def _load_optimizer(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        whole["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(whole)


def _forget(optimizer: Any) -> None:
    for values in optimizer.state.values():
        for value in values.values():
            value.zero_()


@contextmanager
def _checkpointing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    # transformers 5.23 has a new name for it; the old one warns there
    kinds = [name for name in ("activation", "gradient") if hasattr(model, f"{name}_checkpointing_enable")]
    if wanted:
        getattr(model, f"{kinds[0]}_checkpointing_enable")()
    try:
        yield
    finally:
        if wanted:
            getattr(model, f"{kinds[0]}_checkpointing_disable")()
