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

from planish.kernels.token_loss import NO_LABEL as NO_LABEL
from planish.kernels.token_loss import token_loss

# every 211th element estimates the threshold; a prime, so that it isn't always the same channel
STRIDE = 211


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
    if distill == 0 or temperature == 1:
        return token_loss(logits, labels, teacher, distill)[0].sum()
    assert teacher is not None
    likeness = token_loss(logits / temperature, labels, teacher / temperature, 1.0)[0].sum()
    return distill * temperature**2 * likeness + (1 - distill) * token_loss(logits, labels, None, 0.0)[0].sum()


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
