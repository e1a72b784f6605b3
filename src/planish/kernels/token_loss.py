"""The loss of next tokens, with its gradient made in the same pass.

    (1 - distill) * CE(label) + distill * KL(teacher || model)
    d/dlogits = softmax(logits) - (1 - distill) * onehot(label) - distill * softmax(teacher)

By autograd each operation is a pass over logits in fp32, which are the largest tensors of a small model's step. This
definition is for any device; `kernels.triton_loss` registers itself for CUDA, which reads both logits twice and writes
the gradient once, in their own dtype. Knows nothing of models.
"""

import torch
from torch import Tensor

NO_LABEL = -100  # label of a token without loss, as the field has it


@torch.library.custom_op("planish::token_loss", mutates_args=())
def token_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None, distill: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient of each token.

    Args:
        logits: [tokens, vocabulary], any float dtype. labels: int64 [tokens], or NO_LABEL.
        teacher: logits of the other model, the same shape; needed if `distill` is above 0.
        distill: share of distillation, from 0 to 1.

    Returns:
        Loss, fp32 [tokens], and its gradient in the dtype of the logits; both 0 where there is no label.
    """
    counts = labels != NO_LABEL
    found = logits.float().log_softmax(-1)
    grad, loss = found.exp(), torch.zeros_like(found[:, 0])
    if distill < 1:
        at = labels.clamp(min=0).unsqueeze(-1)
        loss = loss - (1 - distill) * found.gather(-1, at).squeeze(-1)
        grad = grad.scatter_add(-1, at, torch.full_like(at, distill - 1, dtype=grad.dtype))
    if distill > 0:
        assert teacher is not None
        wanted = teacher.float().log_softmax(-1)
        loss = loss + distill * (wanted.exp() * (wanted - found)).sum(-1)
        grad = grad - distill * wanted.exp()
    return torch.where(counts, loss, 0), torch.where(counts[:, None], grad, 0).to(logits.dtype)


@token_loss.register_fake
def _(logits: Tensor, labels: Tensor, teacher: Tensor | None, distill: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.float32), torch.empty_like(logits)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    (found,) = ctx.saved_tensors
    return found * grad.to(found.dtype)[:, None], None, None, None


token_loss.register_autograd(_backward, setup_context=_save)
