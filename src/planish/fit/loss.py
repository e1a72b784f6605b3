"""Losses. Of a block: between its output and its target, both [batch, tokens, hidden], computed in fp32.

`squared` is the mean squared error; `trimmed` leaves out the share of elements with the largest errors,
which at 2 bits belong to a few massive activations and drown the rest (arXiv 2512.04746).

Of a model: `next_token`, cross-entropy with the text and distillation from another model's logits, and
`in_chunks`, which goes through the tokens a few at a time, since fp32 logits of all tokens and their gradient
would take more memory than the model.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# every 211th element estimates the threshold; a prime, so that it isn't always the same channel
STRIDE = 211
# label of a token without loss, as the field has it
NO_LABEL = -100


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().mean()


def trimmed(output: Tensor, target: Tensor, share: float) -> Tensor:
    """Mean squared error without the `share` of largest errors.

    The threshold is read off a fixed subsample: exact order statistics of 10 million elements would cost
    more than the block.
    """
    error = (output.float() - target.float()).square()
    sample = error.detach().flatten()[::STRIDE]
    count = max(1, round(len(sample) * share))
    threshold = torch.topk(sample, count, sorted=True).values[-1]
    return (error * (error <= threshold)).mean()


def next_token(
    logits: Tensor, labels: Tensor, teacher: Tensor | None = None, distill: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """(1 - distill) * CE + distill * T^2 * KL(teacher || model), both with logits over T in the KL; summed.

    Args:
        logits: [tokens, vocabulary]. labels: int64 [tokens], the token that comes next, or NO_LABEL.
        teacher: logits of the other model, the same shape; needed if `distill` is above 0.
        distill: share of distillation, from 0 to 1.
        temperature: T; Hinton's factor T^2 keeps the gradient's size (arXiv 1503.02531).
    """
    logits = logits.float()
    total = logits.new_zeros(())
    if distill < 1:
        total = total + (1 - distill) * functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
    if distill > 0:
        assert teacher is not None
        # dividing by 1 would go once more through all of them
        ours, theirs = (part if temperature == 1 else part / temperature for part in (logits, teacher.float()))
        ours, theirs = functional.log_softmax(ours, -1), functional.log_softmax(theirs, -1)
        divergence = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        total = total + distill * temperature**2 * (divergence * (labels != NO_LABEL)).sum()
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, loss: Callable[[Tensor, slice], Tensor], size: int) -> Tensor:  # type: ignore[no-untyped-def, override]
        needed = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needed else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), size):
            part = slice(start, min(start + size, len(hidden)))
            with torch.set_grad_enabled(needed):
                piece = hidden[part].detach().requires_grad_(needed)
                value = loss(piece, part)
            if grad is not None:
                (grad[part],) = torch.autograd.grad(value, piece)
            total += value.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, factor: Tensor):  # type: ignore[no-untyped-def, override]
        (grad,) = ctx.saved_tensors
        return grad * factor.to(grad.dtype), None, None


def in_chunks(hidden: Tensor, loss: Callable[[Tensor, slice], Tensor], size: int = 1024) -> Tensor:
    """Sum of `loss(hidden[part], part)` over parts of `size` tokens, each part's graph freed at once.

    The gradient goes to `hidden` [tokens, width] alone: the head behind it is frozen.
    """
    return _Chunked.apply(hidden, loss, size)  # type: ignore[no-any-return]
