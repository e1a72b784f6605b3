"""Captured: a loss and its gradients, replayed as a CUDA graph, for models that are bound by launches.

A small model trained on packed weights waits for the launches of some ten thousand kernels a pass, not for their
arithmetic. After WARM_UP ordinary passes a whole one, forward and backward, is captured on fixed buffers; to
autograd it is one function. Both do the same arithmetic in the same order. What can't be captured goes
on as before. Knows nothing of quantizers, optimizers or trainers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.stream import Recorder, record

WARM_UP = 3

Loss = Callable[..., Tensor]


class Captured:
    """Calls `loss(**batch)`; backward() of what it gives adds to the parameters' gradients.

    Args:
        loss: a scalar of a batch of tensors; it launches the same work for every batch of the same shapes.
        parameters: leaves that learn; all of them take part.
        standing: made of a batch before the capture, and in force during it.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Sequence[nn.Parameter],
        standing: Callable[[dict[str, Tensor]], AbstractContextManager[None]],
    ) -> None:
        self.loss, self.parameters, self.standing = loss, list(parameters), standing
        # what autograd sees: with the parameters themselves it would know them from two streams, and spoil the capture
        self.anchor = torch.zeros((), requires_grad=True)
        self.side: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: dict[str, Tensor] = {}
        self.result: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self.calls, self.fails = 0, False

    def __call__(self, **batch: Tensor) -> Tensor:
        if self.fails or (self.batch and _shapes(batch) != _shapes(self.batch)):
            return self.loss(**batch)
        total: Tensor = _Replayed.apply(self, batch, self.anchor)
        return total

    def pass_of(self, batch: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a batch and its gradients, which the next call may overwrite."""
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._aside(batch)
        if self.graph is None:
            self._capture(batch)
        if self.graph is None:
            return self._once(batch)
        for name, value in batch.items():
            self.batch[name].copy_(value, non_blocking=True)
        self.graph.replay()
        assert self.result is not None
        return self.result

    @torch.enable_grad()
    def _once(self, batch: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        total = self.loss(**batch)
        return total.detach(), torch.autograd.grad(total, self.parameters)

    def _aside(self, batch: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        # a capture must not meet work of its own first allocations: warm up where it will be captured
        self.side = self.side or torch.cuda.Stream()
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            result = self._once(batch)
        torch.cuda.current_stream().wait_stream(self.side)
        return result

    def _capture(self, batch: dict[str, Tensor]) -> None:
        held = {name: value.clone() for name, value in batch.items()}
        try:
            with self.standing(held), torch.cuda.graph(graph := torch.cuda.CUDAGraph(), stream=self.side):
                self.result = self._once(held)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, PlanishError):  # it waits for the device somewhere, or has blocks of another kind
            self.fails = True
            return
        self.graph, self.batch = graph, held


class _Replayed(torch.autograd.Function):
    """A pass whose gradients are there as soon as its loss is."""

    @staticmethod
    def forward(ctx: Any, captured: Captured, batch: dict[str, Tensor], anchor: Tensor) -> Tensor:
        total, ctx.gradients = captured.pass_of(batch)
        ctx.parameters = captured.parameters
        return total.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:  # type: ignore[override]
        for parameter, gradient in zip(ctx.parameters, torch._foreach_mul(ctx.gradients, factor), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return None, None, None


def _shapes(batch: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in batch.items()}


class _Fixed(Recorder):
    """Stands where a block was and gives it arguments that were recorded, whatever it is called with."""

    def __init__(self, block: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__(block, last=False)
        self.__dict__["fixed"] = arguments

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Any:
        return self.block(hidden, **self.fixed)


@contextmanager
def fixed_arguments(decoder: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> Iterator[None]:
    """For as long as it lasts blocks are given the positions and masks that they are given for `ids` [batch, tokens]:
    while a graph is captured, models make others, which aren't known to be plainly causal."""
    _, arguments = record(decoder, blocks, ids, every_block=True)
    original = list(blocks)
    try:
        for index, (block, own) in enumerate(zip(original, arguments, strict=True)):
            blocks[index] = _Fixed(block, own)
        yield
    finally:
        for index, block in enumerate(original):
            blocks[index] = block
