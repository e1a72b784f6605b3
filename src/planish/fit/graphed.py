"""The forward and backward pass of a training step as one CUDA graph.

    step = Graphed(objective)
    loss = step(batch)              the gradients are added to each parameter's `grad`

A step of a small model is some ten thousand launches, for which Python takes longer than the GPU. The first step runs
as it is, the second is captured, and from then on it is replayed: the same kernels in the same order, so the same bits.
Batches must be alike. What can't be captured, since it looks at values on the way, or has no memory for a second set
of activations, goes on as it was. Knows nothing of optimizers, nor of what is trained.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import masking_utils

from planish.errors import first_line
from planish.fit.step import side_stream


class Graphed:
    """Forward and backward pass of a module whose forward gives {"loss": a number}.

    Args:
        objective: on one GPU.
    Attributes:
        graph: of a step, from the second one on; None where there is none.
    """

    def __init__(self, objective: nn.Module) -> None:
        self.objective = objective
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: dict[str, Tensor] = {}
        self.trained: list[nn.Parameter] = []
        self.grads: list[tuple[nn.Parameter, Tensor]] = []

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch, detached; gradients are added to what `grad` holds."""
        self.calls += 1
        self.objective.train()
        if self.calls == 1:
            return self._on_side_stream(batch)
        if self.calls == 2:
            self._capture(batch)
        if self.graph is None:
            return self._once(batch)
        for name, held in self.held.items():
            held.copy_(batch[name])
        self._place_gradients()
        self.graph.replay()
        return self.loss.clone()

    def _once(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.objective(**batch)["loss"]
        loss.backward()
        return loss.detach()

    def _on_side_stream(self, batch: Mapping[str, Tensor]) -> Tensor:
        side = side_stream(next(iter(batch.values())).device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = self._once(batch)
        torch.cuda.current_stream().wait_stream(side)
        self.trained = [part for part in self.objective.parameters() if part.grad is not None]
        return loss

    def _capture(self, batch: Mapping[str, Tensor]) -> None:
        before = [part.grad for part in self.trained]
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < torch.cuda.max_memory_allocated():
            return  # the memory of a captured step is lent to nothing else
        self.held = {name: value.clone() for name, value in batch.items()}
        self.grads = [(part, torch.zeros_like(part)) for part in self.trained]
        for part, place in self.grads:
            part.grad = place
        graph, chances = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
        kept = chances.clone_state()
        try:
            with _one_text_a_row(), torch.cuda.graph(graph):
                self.loss = self._once(self.held)
            self.graph = graph
        except RuntimeError as error:
            self.held, self.grads = {}, []
            chances.graphsafe_set_state(kept.graphsafe_get_state())  # else it waits for the capture to go on
            warnings.warn(f"a step can't be a CUDA graph ({first_line(error)}); training goes on without", stacklevel=2)
        for part, grad in zip(self.trained, before, strict=True):
            part.grad = grad

    def _place_gradients(self) -> None:
        """Where the graph adds to them."""
        fresh = [place for part, place in self.grads if part.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for part, place in self.grads:
            if part.grad is not None and part.grad is not place:
                place.copy_(part.grad)
            part.grad = place


@contextmanager
def _one_text_a_row() -> Iterator[None]:
    """transformers looks at positions for rows that hold several texts, which would need a mask. While a stream is
    captured it can't look, and would make the mask of any row; ours hold one text each."""
    kept = masking_utils.find_packed_sequence_indices, masking_utils.is_tracing
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, masking_utils.is_tracing = kept
