"""A whole-model stage by `LeanTrainer` and `Adam8`, where memory is too short for transformers' Trainer.

    rate(k) = peak * k / warmup                                        in the first `warmup` steps
    rate(k) = peak * (1 + cos(pi * (k - warmup) / (steps - warmup))) / 2        afterwards

The same stage as `fit.finetune` trains: windows, order, rates, held-out checks and the state kept are the same; the
gradients are those of one block at a time, clipped in shares, and the moments have 8 bits. Checkpoints hold
what is trained, the optimizer's state and the clipping's, so that a resumed run repeats itself. Knows nothing of
plans.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from planish.fit.adam8 import Adam8
from planish.fit.lean import LeanTrainer
from planish.fit.objective import Objective
from planish.fit.reconstruct import Outcome, Samples
from planish.fit.watch import Setting, Slots, Watch, Windows, peak_rates
from planish.fit.whole import EndToEnd

TRAINED = "model.safetensors"  # as the Trainer calls it
CLIPPING = "clipping/"  # before the names of the trainer's state, among those of the optimizer
KEPT = 2  # checkpoints


def finetune_lean(
    objective: Objective,
    parameters: Slots,
    windows: Windows,
    stage: EndToEnd,
    setting: Setting,
) -> Outcome:
    """Train in place, as `fit.finetune.finetune` does, in little memory.

    Args:
        parameters: by slot of `stage.rates`, with units; all in the model's blocks.
        setting: its `checkpointing` is moot, and it isn't tracked.

    Returns:
        Held-out loss before and of the state kept.

    Raises:
        PlanishError: if a checkpoint to go on from is another run's, or something outside the blocks is trained.
    """
    samples = Samples(len(windows), stage.holdout, stage.batch_size, setting.seed)
    steps = stage.steps_on(len(samples.rest))
    watch = Watch(objective, windows, samples.held_out, stage, setting, steps, setting.micro_batch)
    last = watch.last_checkpoint()
    optimizer = _optimizer(objective, parameters, stage, setting.seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    trainer = _trainer(objective, optimizer, stage, setting.micro_batch)
    saver = Saver(objective, optimizer, trainer, watch)
    saver.resume(last) if last else watch.begin()
    skipped = 0
    for done in range(1, steps + 1):
        batch = samples.next()
        if done <= watch.start:
            continue  # the order goes on where it was
        share = rate_share(done - 1, steps, round(stage.warmup * steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share * watch.damping
        skipped += trainer.step(windows[batch]).skipped
        if watch.due(done):
            note = f"{skipped} gradients not finite by step {done}: skipped" if skipped else ""
            skipped = 0
            if not watch.check(done, note):
                optimizer.state.clear()
                watch.damping /= 2
        if setting.save_every and (done % setting.save_every == 0 or done == steps):
            saver.save(setting.folder / f"checkpoint-{done}", done)
    watch.restore()
    return watch.outcome


class Saver:
    """Writes and reads the checkpoints of a lean run; of those that it wrote, the last few stay."""

    def __init__(self, objective: Objective, optimizer: Adam8, trainer: LeanTrainer, watch: Watch) -> None:
        self.objective, self.optimizer, self.trainer, self.watch = objective, optimizer, trainer, watch
        self.written: list[Path] = []

    def save(self, folder: Path, done: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(self.objective.state_dict(), folder / TRAINED)
        clipping = {CLIPPING + name: value for name, value in self.trainer.state_dict().items()}
        self.watch.save(folder, done, {**self.optimizer.state_dict(), **clipping}, {"damping": self.watch.damping})
        self.written.append(folder)
        while len(self.written) > KEPT:
            shutil.rmtree(self.written.pop(0), ignore_errors=True)

    def resume(self, folder: Path) -> None:
        self.written.append(folder)
        tensors, facts = self.watch.resume(folder)
        self.watch.damping = facts.get("damping", 1.0)
        clipping = [name for name in tensors if name.startswith(CLIPPING)]
        self.trainer.load_state_dict({name.removeprefix(CLIPPING): tensors.pop(name) for name in clipping})
        self.optimizer.load_state_dict(tensors)
        self.objective.load_state_dict(load_file(folder / TRAINED))


def rate_share(step: int, steps: int, warmup: int) -> float:
    """The rate of step 0, 1, ... as a share of its peak, as transformers' cosine schedule has it."""
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def _optimizer(
    objective: Objective, parameters: Slots, stage: EndToEnd, seed: int
) -> Adam8:
    """One group a parameter, since each has a rate of its own; the state goes by the objective's names."""
    names = {parameter: name for name, parameter in objective.named_parameters()}
    groups = [
        {"params": [(names[parameter], parameter)], "lr": rate, "weight_decay": decay}
        for parameter, rate, decay in peak_rates(parameters, stage)
    ]
    return Adam8(groups, betas=stage.betas, seed=seed)


def _trainer(objective: Objective, optimizer: Adam8, stage: EndToEnd, micro_batch: int) -> LeanTrainer:
    def loss(hidden: Tensor, part: Mapping[str, Tensor]) -> Tensor:
        teacher = objective.own_hidden(part["input_ids"]) if objective.own_teacher else part.get("teacher")
        return objective.of_hidden(hidden, part["labels"], teacher)

    objective.eval()
    return LeanTrainer(objective.model, loss, optimizer, clip=stage.clip, micro_batch=micro_batch)
