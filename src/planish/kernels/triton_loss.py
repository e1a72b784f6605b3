"""A Triton kernel of the loss of next tokens, registered for CUDA under the op of `kernels.token_loss`.

A program takes a token: once through both rows of logits for the logarithms of their sums, once more, from the cache
as a rule, for the loss and the gradient. The op's eager definition is the slow twin: the same terms summed in another,
fixed order. Needs triton: `planish.kernels` imports it where there is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from planish.kernels.token_loss import NO_LABEL, token_loss

CHUNK = 4096


@triton.jit
def _row(pointer, at, columns, other, CHUNK: tl.constexpr):
    column = at + tl.arange(0, CHUNK)
    return tl.load(pointer + column, mask=column < columns, other=other).to(tl.float32)


@triton.jit
def _log_sum(pointer, columns, CHUNK: tl.constexpr):
    # of exp over a row; a sum for each place of a chunk, joined at the end
    most = tl.full([CHUNK], float("-inf"), tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    for start in range(0, columns, CHUNK):
        values = _row(pointer, start, columns, float("-inf"), CHUNK)
        higher = tl.maximum(most, values, propagate_nan=tl.PropagateNan.ALL)
        # -inf less -inf is no number, where a place has had none yet
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - base) + tl.exp(values - base)
        most = higher
    highest = tl.max(most, 0)
    total = tl.sum(total * tl.exp(most - highest), 0)
    return highest + tl.log(total)


@triton.jit
def _loss_kernel(
    logits_ptr, labels_ptr, teacher_ptr, loss_ptr, grad_ptr, columns, distill, NO_LABEL: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + token)
    counts = (label != NO_LABEL).to(tl.float32)
    logits_ptr += token * columns
    grad_ptr += token * columns
    ours_sum = _log_sum(logits_ptr, columns, CHUNK)
    theirs_sum = 0.0
    if teacher_ptr is not None:
        teacher_ptr += token * columns
        theirs_sum = _log_sum(teacher_ptr, columns, CHUNK)
    divergence = tl.zeros([CHUNK], tl.float32)
    entropy = tl.zeros([CHUNK], tl.float32)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        live = column < columns
        ours = _row(logits_ptr, start, columns, 0.0, CHUNK) - ours_sum
        named = (column == label).to(tl.float32)
        grad = tl.exp(ours) - (1 - distill) * named
        entropy -= tl.where(column == label, ours, 0.0)
        if teacher_ptr is not None:
            theirs = _row(teacher_ptr, start, columns, 0.0, CHUNK) - theirs_sum
            share = tl.exp(theirs)
            divergence += tl.where(live, share * (theirs - ours), 0.0)
            grad -= distill * share
        # what has no label is 0 whatever it holds
        grad = tl.where(counts > 0, grad, 0.0)
        tl.store(grad_ptr + column, grad.to(grad_ptr.dtype.element_ty), mask=live)
    loss = (1 - distill) * tl.sum(entropy, 0) + distill * tl.sum(divergence, 0)
    tl.store(loss_ptr + token, tl.where(counts > 0, loss, 0.0))


def forward(logits: Tensor, labels: Tensor, teacher: Tensor | None, distill: float) -> tuple[Tensor, Tensor]:
    """`planish::token_loss` in one launch; arguments and results as in `token_loss`."""
    assert teacher is not None or distill == 0
    logits, labels = logits.contiguous(), labels.contiguous()
    teacher = None if teacher is None or distill == 0 else teacher.contiguous()
    loss, grad = logits.new_empty(len(logits), dtype=torch.float32), torch.empty_like(logits)
    chunk = min(CHUNK, triton.next_power_of_2(logits.shape[1]))
    if len(logits):
        with torch.cuda.device_of(logits):
            _loss_kernel[(len(logits),)](
                logits, labels, teacher, loss, grad, logits.shape[1], float(distill), NO_LABEL=NO_LABEL, CHUNK=chunk,
                num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
    return loss, grad


token_loss.register_kernel("cuda")(forward)
