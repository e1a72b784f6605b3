"""One optimizer step on fixed buffers, replayed as a CUDA graph where there is a GPU.

A small block is bound by launches, not by arithmetic: after WARM_UP ordinary steps the whole step (forward,
backward, update) is captured once and replayed. The ordinary steps are real ones; both do the same
arithmetic in the same order. Knows nothing of quantizers or blocks, only of a loss of two tensors.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3

Loss = Callable[[Tensor, Tensor], Tensor]


class Step:
    """Minimises `loss(inputs, targets)` over the parameters, one batch a call.

    Args:
        loss: differentiable, mean over its samples.
        parameters: (parameters, rate) pairs; rates are multiplied by `factor` of the call.
        optimizer: class taking groups with a tensor `lr`.
        inputs: example batch; gives shape, dtype, device. targets: likewise.
        micro_batch: samples a backward pass; gradients are summed over them in order.
        capture: whether every step launches the same work, so that one can be captured on a GPU.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Sequence[tuple[list[Tensor], float]],
        optimizer: Callable[..., torch.optim.Optimizer],
        inputs: Tensor,
        targets: Tensor,
        micro_batch: int,
        capture: bool = True,
    ) -> None:
        self.loss, self.micro_batch, self.capture = loss, micro_batch, capture
        self.inputs, self.targets = torch.empty_like(inputs), torch.empty_like(targets)
        device = inputs.device
        self.rates = [rate for _, rate in parameters]
        groups: list[dict[str, Any]] = [
            {"params": params, "lr": torch.tensor(rate, device=device)} for params, rate in parameters
        ]
        self.optimizer = optimizer(groups)
        # sum of the losses since it was last read; read seldom, since reading waits for the device
        self.total = torch.zeros((), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def _once(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        count = len(self.inputs)
        for start in range(0, count, self.micro_batch):
            part = slice(start, min(start + self.micro_batch, count))
            loss = self.loss(self.inputs[part], self.targets[part]) * ((part.stop - part.start) / count)
            loss.backward()
            self.total += loss.detach()
        self.optimizer.step()

    def __call__(self, factor: float) -> None:
        """One step on what lies in `inputs` and `targets`, every rate multiplied by factor."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"].fill_(rate * factor)
        if self.inputs.device.type != "cuda" or not self.capture:
            self._once()
        elif self.calls < WARM_UP:
            self._on_side_stream()
        else:
            if self.graph is None:
                self.graph = self._capture()
            self.graph.replay()
        self.calls += 1

    def _on_side_stream(self) -> None:
        # a capture must not meet work of its own first allocations: warm up where it will be captured
        side = side_stream(self.inputs.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._once()
        torch.cuda.current_stream().wait_stream(side)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._once()
        return graph

    def forget(self) -> None:
        """Start the optimizer's moments anew, in place, since a captured step reads them where they lie."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def read_total(self) -> float:
        """Sum of the losses since the last reading."""
        value = self.total.item()
        self.total.zero_()
        return value


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all steps: each stream on which a matrix was ever multiplied keeps 64 MiB for cuBLAS."""
    return torch.cuda.Stream(device)
