"""A whole-model stage by transformers' Trainer on accelerate, with what it leaves open filled in.

Scales of a quarter of a percent of the model are trained while its codes lie packed. What the Trainer keeps in its
checkpoints is joined by what `fit.watch` keeps, the optimizer's moments among it, and no pickle stays. Where memory
is short, `fit.lean_loop` does the same one block at a time. Knows nothing of formats or sources.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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

from planish.experts import has_experts
from planish.fit.graphed import Graphed
from planish.fit.objective import Objective
from planish.fit.optim import Rated
from planish.fit.reconstruct import Outcome, Samples
from planish.fit.watch import Setting, Slots, Watch, Windows, peak_rates
from planish.fit.whole import EndToEnd

TRACKERS = ("none", "tensorboard", "wandb")


class Ordered(IterableDataset[dict[str, Tensor]]):
    """Windows in the order of the seed, every one once an epoch, as many as the steps take: a stream without epochs,
    so that no step is cut short at the end of one and a resumed run knows where it was."""

    def __init__(self, windows: Windows, samples: Samples, steps: int) -> None:
        self.windows = windows
        self.order = torch.cat([samples.next() for _ in range(steps)]).tolist()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.windows[index] for index in self.order)


def finetune(
    objective: Objective,
    parameters: Slots,
    windows: Windows,
    stage: EndToEnd,
    setting: Setting,
) -> Outcome:
    """Train in place.

    Args:
        parameters: by slot of `stage.rates`, with units.

    Returns:
        Held-out loss before and of the state kept.

    Raises:
        PlanishError: if a checkpoint to go on from is another run's.
    """
    samples = Samples(len(windows), stage.holdout, stage.batch_size, setting.seed)
    batch = samples.batch_size
    micro = max(size for size in range(1, min(setting.micro_batch, batch) + 1) if batch % size == 0)
    steps = stage.steps_on(len(samples.rest))
    watch = Watch(objective, windows, samples.held_out, stage, setting, steps, micro)
    last = watch.last_checkpoint()
    trainer = Stepper(
        model=objective,
        args=_arguments(stage, setting, steps, micro, batch // micro),
        train_dataset=Ordered(windows, samples, steps),
        optimizers=(_optimizer(parameters, stage), None),
        callbacks=[Guard(watch, last)],
    )
    trainer.remove_callback(PrinterCallback)
    steady = setting.device.type == "cuda" and not has_experts(objective)  # every step launches the same work
    trainer.graphed = Graphed(objective) if steady else None
    with _checkpointing(objective.model, setting.checkpointing):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.graphed = None  # and the memory of a step with it
    objective.eval()
    watch.restore()
    return watch.outcome


class Stepper(Trainer):
    """Takes the gradients of a step from a CUDA graph, where there is one."""

    graphed: Graphed | None = None

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.graphed is None:
            return super().training_step(model, inputs, num_items_in_batch)
        batch = self._prepare_inputs(inputs)
        count = torch.as_tensor(num_items_in_batch, device=batch["labels"].device)
        return self.graphed({**batch, "num_items_in_batch": count})


class Guard(TrainerCallback):
    """Lets the watch look on where the Trainer calls, and hands it what of the Trainer's a resumed run needs."""

    def __init__(self, watch: Watch, resumed: Path | None) -> None:
        self.watch, self.resumed = watch, resumed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.resumed is None:
            self.watch.begin()
            return
        tensors, facts = self.watch.resume(self.resumed)
        _load_optimizer(kwargs["optimizer"], tensors)
        kwargs["lr_scheduler"].load_state_dict(facts["scheduler"])
        for group, rate in zip(kwargs["optimizer"].param_groups, kwargs["lr_scheduler"].get_last_lr(), strict=True):
            group["lr"] = rate

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.watch.due(state.global_step) and not self.watch.check(state.global_step):
            _forget(kwargs["optimizer"])
            schedule = kwargs["lr_scheduler"]
            schedule.base_lrs = [rate / 2 for rate in schedule.base_lrs]
            for group in kwargs["optimizer"].param_groups:
                group["lr"] /= 2

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of the Trainer's, needed by nobody
        facts = {"scheduler": kwargs["lr_scheduler"].state_dict()}
        self.watch.save(folder, state.global_step, _optimizer_state(kwargs["optimizer"]), facts)


def _arguments(stage: EndToEnd, setting: Setting, steps: int, micro: int, accumulation: int) -> TrainingArguments:
    arguments = TrainingArguments(
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
        logging_nan_inf_filter=False,  # it would wait for the device at every step; the watch sees what isn't finite
        report_to=setting.track,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=setting.device.type == "cuda",
        use_cpu=setting.device.type == "cpu",
    )
    if arguments.n_gpu > 1:
        # it would copy the objective to every GPU that is visible; batches are counted and hooks set for one
        arguments._n_gpu = 1
    return arguments


def _optimizer(parameters: Slots, stage: EndToEnd) -> torch.optim.Optimizer:
    """AdamW, each parameter with a rate of its own."""
    groups: dict[float, dict[str, Any]] = {}
    for parameter, rate, decay in peak_rates(parameters, stage):
        group = groups.setdefault(decay, {"params": [], "rates": [], "weight_decay": decay})
        group["params"].append(parameter)
        group["rates"].append(rate)
    return Rated(groups.values(), betas=stage.betas)


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
        # the state of random numbers can't be read while a step is captured, and serves dropout alone
        how = {"use_reentrant": False, "preserve_rng_state": drops(model)}
        getattr(model, f"{kinds[0]}_checkpointing_enable")(how)
    try:
        yield
    finally:
        if wanted:
            getattr(model, f"{kinds[0]}_checkpointing_disable")()


def drops(model: nn.Module) -> bool:
    """Does a model in training leave out some of its values at random?"""
    shares = (value for part in model.modules() for name, value in vars(part).items() if "dropout" in name)
    layers = (part.p for part in model.modules() if isinstance(part, nn.Dropout))
    return any(isinstance(share, float) and share > 0 for share in (*shares, *layers))
