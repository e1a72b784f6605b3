"""LeanTrainer: training steps of a whole model that only just fits its device, one block at a time.

    forward    h[i+1] = block i of h[i], without a graph; every h[i] goes to pinned host memory
    loss       dL/dh[n] of what leaves the last block, by a function that is passed in
    backward   i = n-1 ... 0: h[i] comes back, block i runs again with a graph and gives dL/dh[i] and
               dL/dtheta[i]; theta[i] is updated at once and its gradient dropped

So the device holds the weights, the optimizer's state, and the graph and the gradients of a single block. A
batch of many sequences passes through a block in parts, so that its gradients add up in that block alone.
Only what the blocks hold is trained. Knows nothing of quantizers, teachers, data or schedules.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from planish.arch import discover
from planish.errors import PlanishError
from planish.fit.loss import NO_LABEL
from planish.kernels.linear import PackedLinear
from planish.quant import QLinear
from planish.stream import Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUTS = ("input_ids", "attention_mask", "position_ids")  # of a batch, what the decoder is given
MEMORY = 0.9  # of a block's share in the gradient's norm, from one step to the next
IN_FLIGHT = 2  # copies to the host whose source is kept alive

Loss = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class OneByOne(Protocol):
    """An optimizer that takes its parameters as their gradients come, such as `Adam8`."""

    def step_one(self, parameter: Tensor, factor: float = 1.0) -> None:
        """Update by `factor` times parameter.grad, and set that to None."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One step.

    Args:
        loss: mean over the counted tokens, before the update.
        norm: L2 norm of the whole gradient before it was clipped, without tensors that were skipped.
        skipped: tensors with a gradient that wasn't finite; they were left as they were.
    """

    loss: float
    norm: float
    skipped: int


class LeanTrainer:
    """Trains what requires a gradient in a model's blocks, one step a call.

    Clipping can't wait for the norm of the whole gradient, since the last block is updated before the first
    has one. Block i, whose share in the squared norm was w_i in the steps before (their weights falling by
    0.9; equal shares at first), is clipped to clip * sqrt(w_i). The shares sum to 1, so the norm of what is
    applied is at most `clip`, always; while shares stay as they are it is the customary clipping exactly,
    and a block whose share has risen is clipped more than it would be there.

    Args:
        model: a causal language model on one device, its blocks with trainable parameters; it is put into
            eval mode, since a block runs twice and must give the same twice.
        loss: loss(hidden, part) -> scalar, summed over the tokens of a part of the batch that have a label;
            hidden [b, tokens, width] is what the head is given, the part is on the device.
        optimizer: holds the trainable parameters.
        clip: largest norm of the gradient; None doesn't clip.
        micro_batch: sequences in one pass through a block. Host memory for a batch is
            blocks * sequences * tokens * width activations whatever it is.

    Raises:
        PlanishError: if nothing in the blocks is trainable, or something outside them is.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        loss: Loss,
        optimizer: OneByOne,
        *,
        clip: float | None = 0.3,
        micro_batch: int = 1,
    ) -> None:
        if micro_batch < 1 or (clip is not None and clip <= 0):
            raise PlanishError(f"micro_batch is {micro_batch} and clip {clip}; both must be positive")
        arch = discover(model, packed=(PackedLinear, QLinear))
        self.decoder = model.get_submodule(arch.decoder)
        blocks = model.get_submodule(arch.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        self.trained = [[p for p in block.parameters() if p.requires_grad] for block in self.blocks]
        _refuse_others(model, self.trained)
        # nothing below the first trained block needs a gradient
        self.first = next(index for index, trained in enumerate(self.trained) if trained)
        self.device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
        self.loss, self.optimizer, self.clip, self.micro_batch = loss, optimizer, clip, micro_batch
        self.inputs = HostInputs(self.device)
        self.arguments: dict[Hashable, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        active = sum(map(bool, self.trained))
        self.shares = [1 / active if trained else 0.0 for trained in self.trained]
        self.steps = 0  # whose gradients the shares come from
        model.eval()

    @torch.enable_grad()
    def step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """One update on a batch.

        Args:
            batch: "input_ids" and "labels" int64 [sequences, tokens] (labels where they are predicted, as
                `fit.objective.shifted` gives them), and what else the loss asks for, sequences first; on any
                device. Sequences may be padded on the right without a mask: no earlier token sees that.

        Raises:
            PlanishError: if no token has a label.
        """
        parts, count = self._parts(batch)
        losses: list[Tensor] = []
        gradients: list[Tensor | None] = []
        for number, part in enumerate(parts):
            loss, gradient = self._forward(number, part, count)
            losses.append(loss)
            gradients.append(gradient)
        order = [(i, part) for i in reversed(range(self.first, len(self.blocks))) for part in range(len(parts))]
        squares, skipped = [0.0] * len(self.blocks), 0
        for (index, number), hidden in zip(order, self.inputs.replay(order), strict=True):
            gradients[number] = self._backward(index, number, hidden, gradients[number])
            if number == len(parts) - 1:
                squares[index], unusable = self._update(index)
                skipped += unusable
        self._remember(squares)
        return StepResult(loss=torch.stack(losses).sum().item(), norm=math.sqrt(sum(squares)), skipped=skipped)

    def _parts(self, batch: Mapping[str, Tensor]) -> tuple[list[dict[str, Tensor]], int]:
        """The batch in parts, without those that have no label, and how many labels there are."""
        starts = range(0, len(batch["input_ids"]), self.micro_batch)
        counts = {start: int((batch["labels"][start : start + self.micro_batch] != NO_LABEL).sum()) for start in starts}
        if not any(counts.values()):
            raise PlanishError("no token of the batch has a label, so there is no loss; its answers are all masked")
        parts = [
            {key: value[start : start + self.micro_batch] for key, value in batch.items()}
            for start, count in counts.items()
            if count
        ]
        return parts, sum(counts.values())

    def _forward(self, number: int, part: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """Part `number` through the model: its loss / count, and the gradient for what leaves the last block."""
        part = {key: value.to(self.device, non_blocking=True) for key, value in part.items()}
        last = len(self.blocks) - 1
        standing = [_Forward(block, partial(self._keep, i, number), i == last) for i, block in enumerate(self.blocks)]
        with _replaced(self.blocks, standing):
            given = {key: part[key] for key in INPUTS if key in part}
            hidden = self.decoder(**given, use_cache=False).last_hidden_state
        loss = self.loss(hidden, part) / count
        loss.backward()
        leaf = standing[-1].output
        assert leaf is not None and leaf.grad is not None
        return loss.detach(), leaf.grad

    def _keep(self, index: int, number: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What enters block `index` with part `number`, for the backward; nothing is trained below `first`."""
        if index >= self.first:
            self.inputs.save((index, number), hidden)
            self.arguments[index, number] = args, kwargs

    def _backward(self, index: int, number: int, hidden: Tensor, gradient: Tensor | None) -> Tensor | None:
        """Run block `index` again; the gradient of what leaves it gives that of what enters it."""
        args, kwargs = self.arguments.pop((index, number))
        hidden.requires_grad_(index > self.first)
        output = _hidden_of(self.blocks[index](hidden, *args, **kwargs))
        torch.autograd.backward(output, gradient)
        return hidden.grad

    def _update(self, index: int) -> tuple[float, int]:
        """Update the parameters of a block; returns its gradient's squared norm, and how many were skipped."""
        trained = [parameter for parameter in self.trained[index] if parameter.grad is not None]
        if not trained:
            return 0.0, 0
        # the only wait for the device: once a block
        norms = torch.stack([torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in trained]).tolist()
        square = sum(norm**2 for norm in norms if math.isfinite(norm))
        factor = 1.0
        if self.clip is not None and square:
            factor = min(1.0, self.clip * math.sqrt(self.shares[index] / square))
        for parameter, norm in zip(trained, norms, strict=True):
            if math.isfinite(norm):
                self.optimizer.step_one(parameter, factor)
            parameter.grad = None
        return square, sum(not math.isfinite(norm) for norm in norms)

    def _remember(self, squares: list[float]) -> None:
        total = sum(squares)
        if total:
            kept = MEMORY if self.steps else 0.0
            self.shares = [
                kept * share + (1 - kept) * square / total for share, square in zip(self.shares, squares, strict=True)
            ]
            self.steps += 1

    def state_dict(self) -> dict[str, Tensor]:
        """What clipping remembers, for an exact resume; the optimizer keeps its own."""
        return {"shares": torch.tensor(self.shares, dtype=torch.float64), "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            PlanishError: if it is of another number of blocks.
        """
        shares = state_dict["shares"].tolist()
        if len(shares) != len(self.blocks):
            raise PlanishError(f"the trainer's state is of {len(shares)} blocks, the model has {len(self.blocks)}")
        self.shares, self.steps = shares, int(state_dict["steps"])


def _refuse_others(model: nn.Module, trained: Sequence[Sequence[nn.Parameter]]) -> None:
    inside = {parameter for block in trained for parameter in block}
    if not inside:
        raise PlanishError("nothing in the model's blocks is trainable; make the scales of its packed layers trainable")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in inside:
            raise PlanishError(f"{name} lies outside the blocks, which alone are trained here; freeze it")


class _Forward(Recorder):
    """Stands where a block was: hands on what enters it, and runs it without a graph.

    What leaves the last one is its `output`, where a graph begins anew.
    """

    def __init__(self, block: nn.Module, keep: Callable[..., None], last: bool) -> None:
        super().__init__(block, last)
        self.keep = keep
        self.output: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keep(hidden, args, kwargs)
        with torch.no_grad():
            output = self.block(hidden, *args, **kwargs)
        if self.last:
            self.output = _hidden_of(output).detach().requires_grad_()
            return (self.output, *output[1:]) if isinstance(output, tuple) else self.output
        return output


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _replaced(blocks: nn.ModuleList, others: Sequence[nn.Module]) -> Iterator[None]:
    original = list(blocks)
    try:
        for index, other in enumerate(others):
            blocks[index] = other
        yield
    finally:
        for index, block in enumerate(original):
            blocks[index] = block


class HostInputs:
    """Tensors of a device kept in pinned host memory, copied on a stream of their own; on a CPU, kept as they are.

    A tensor given to `save` must not be changed in place afterwards. Host memory is taken at the first
    save of a slot and used again by later ones of the same shape.
    """

    def __init__(self, device: torch.device) -> None:
        self.host: dict[Hashable, Tensor] = {}
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.device = device
        self.leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def save(self, slot: Hashable, value: Tensor) -> None:
        value = value.detach()
        if self.side is None:
            self.host[slot] = value
            return
        held = self.host.get(slot)
        if held is None or (held.shape, held.dtype) != (value.shape, value.dtype):
            held = self.host[slot] = torch.empty_like(value, device="cpu", pin_memory=True)
        # a source is let go only when the compute stream waits for its copy: its memory can't be written earlier
        self._let_go(IN_FLIGHT - 1)
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            held.copy_(value, non_blocking=True)
            self.leaving.append((value, self.side.record_event()))

    def replay(self, slots: Sequence[Hashable]) -> Iterator[Tensor]:
        """The tensors of the slots in this order, on the device; each is fetched while the one before is used."""
        self._let_go(0)
        ahead = self._fetch(slots[0])
        for following in [*slots[1:], None]:
            value, event = ahead
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)
            if following is not None:
                ahead = self._fetch(following)
            yield value

    def _fetch(self, slot: Hashable) -> tuple[Tensor, torch.cuda.Event | None]:
        if self.side is None:
            return self.host.pop(slot), None
        held = self.host[slot]
        # allocated on the compute stream, which frees it; what it did before with that memory must be over
        value = torch.empty_like(held, device=self.device)
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            value.copy_(held, non_blocking=True)
            return value, self.side.record_event()

    def _let_go(self, left: int) -> None:
        while len(self.leaving) > left:
            _, event = self.leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(event)
