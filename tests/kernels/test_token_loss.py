"""The loss of next tokens against autograd, and its fused kernel against its eager twin.

Without a GPU the kernel runs in Triton's interpreter, as that of the fused fake quantizer.
"""

import os

import pytest
import torch
from torch.nn import functional

from planish.kernels.token_loss import NO_LABEL, token_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(),
                                  reason="needs a CUDA device or Triton's interpreter")
# more than a chunk of the kernel, not a multiple of it, fewer than one
each_width = pytest.mark.parametrize("width", [7, 64, 4099] if INTERPRETED else [7, 64, 4096, 49152, 262144])
each_share = pytest.mark.parametrize("distill", [0.0, 0.3, 1.0])


@pytest.mark.skipif(INTERPRETED, reason="this is what it starts")
def test_all_of_this_in_the_interpreter(interpreted):
    pytest.importorskip("triton")
    assert "passed" in interpreted


def inputs(width, dtype=torch.float32):
    """Ordinary tokens, flat, sharp and far from 0; the first and last word as labels, and none."""
    generator = torch.Generator().manual_seed(width)
    logits, teacher = (torch.randn(6, width, generator=generator) * 3 for _ in range(2))
    logits[1], teacher[2], logits[3] = 0.0, teacher[2] * 20, logits[3] + 90
    labels = torch.tensor([0, width - 1, 2, NO_LABEL, 1, 3])
    return logits.to(dtype), labels, teacher.to(dtype)


@each_share
@pytest.mark.parametrize("width", [7, 64])
def test_gradient_is_autograd_s(distill, width):
    logits, labels, teacher = inputs(width, torch.float64)
    whole = logits.clone().requires_grad_()
    ours, theirs = whole.log_softmax(-1), teacher.log_softmax(-1)
    likeness = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    text = functional.cross_entropy(whole, labels, ignore_index=NO_LABEL, reduction="none")
    expected = (1 - distill) * text + distill * torch.where(labels == NO_LABEL, 0, likeness)
    weights = torch.arange(1.0, 7)
    (expected_grad,) = torch.autograd.grad((weights * expected).sum(), whole)
    found = logits.float().requires_grad_()
    loss, _ = token_loss(found, labels, None if distill == 0 else teacher.float(), distill)
    (grad,) = torch.autograd.grad((weights * loss).sum(), found)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-6)
    assert grad[3].abs().max() == 0 == loss[3]


@pytest.mark.gpu
@needs_triton
@each_width
@each_share
def test_kernel_is_the_twin_within_the_order_of_sums(width, distill):
    from planish.kernels import triton_loss

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits, labels, teacher = inputs(width, dtype)
        teacher = None if distill == 0 else teacher
        loss, grad = token_loss(logits, labels, teacher, distill)
        given = [None if part is None else part.to(DEVICE) for part in (logits, labels, teacher)]
        found, found_grad = (part.cpu() for part in triton_loss.forward(*given, distill))
        assert found_grad.dtype == dtype and found.dtype == torch.float32
        torch.testing.assert_close(found, loss, rtol=2e-5, atol=2e-5)
        # the interpreter truncates bf16 where a GPU rounds
        step = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(found_grad, grad, rtol=step, atol=1e-6)


@pytest.mark.gpu
@needs_triton
def test_no_tokens_and_what_is_no_number():
    from planish.kernels import triton_loss

    logits, labels, teacher = (part.to(DEVICE) for part in inputs(64))
    loss, grad = triton_loss.forward(logits[:0], labels[:0], teacher[:0], 0.5)
    assert loss.shape == (0,) and grad.shape == (0, 64)
    logits[0, 5], logits[3, 5] = torch.nan, torch.nan
    loss, grad = triton_loss.forward(logits, labels, teacher, 0.5)
    assert loss.isnan().tolist() == [True] + 5 * [False]  # one has no label
    assert grad.isnan().any(-1).tolist() == [True] + 5 * [False]


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
def test_repeats_itself_bit_for_bit():
    given = [part.cuda() for part in inputs(49152, torch.bfloat16)]
    first, second = (token_loss(*given, 0.5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
