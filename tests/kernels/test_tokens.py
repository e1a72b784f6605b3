"""The fused rounding of tokens against its eager twin, the ops on CPU tensors: forward, gradients, CUDA graphs.

Without a GPU the same tests run in Triton's interpreter, as those of the fused fake quantizer.
"""

import os

import pytest
import torch

from planish.quant.activation import round_tokens, round_tokens_backward

pytest.importorskip("triton")
from planish.kernels import tokens  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(),
                                  reason="needs a CUDA device or Triton's interpreter")
WIDTHS = [24, 576, 2056] if INTERPRETED else [24, 64, 576, 1536, 2056, 11008, 28672]
each_bits = pytest.mark.parametrize("bits", [4, 6, 8])
each_width = pytest.mark.parametrize("width", WIDTHS)
each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


@pytest.mark.skipif(INTERPRETED, reason="this is what it starts")
def test_all_of_this_in_the_interpreter(interpreted):
    assert "passed" in interpreted


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel leaves unwritten holds NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda like, **kwargs: torch.full_like(like, torch.nan, **kwargs))


def rows_of(width, dtype=torch.float32):
    """Ordinary tokens, a tiny and a huge one, one of zeros, two of one sign, one whose ends come often."""
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    x[1] *= 1e-6
    x[2] *= 1e4
    x[3] = 0
    x[4], x[5] = x[4].abs() + 3, -x[5].abs() - 3
    x[6] = x[6].round().clamp(-1, 1)
    return x.to(dtype)


@pytest.mark.gpu
@needs_triton
@each_bits
@each_width
@each_grid
def test_forward_is_the_twin_bit_for_bit(bits, width, symmetric):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = rows_of(width, dtype)
        expected, result = round_tokens(x, bits, symmetric), tokens.forward(x.to(DEVICE), bits, symmetric).cpu()
        assert result.dtype == dtype
        if INTERPRETED and dtype == torch.bfloat16:  # the interpreter truncates where a GPU rounds
            torch.testing.assert_close(result, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(result, expected), dtype


@pytest.mark.gpu
@needs_triton
@each_bits
@each_width
@each_grid
def test_gradients_are_the_twins(bits, width, symmetric):
    x = rows_of(width)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    expected = round_tokens_backward(grad, x, bits, symmetric)
    result = tokens.backward(grad.to(DEVICE), x.to(DEVICE), bits, symmetric).cpu()
    # sums of up to 28672 terms in fp32, in another order; 4e-6 at most was seen
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@needs_triton
def test_a_number_that_is_none_comes_through():
    x = rows_of(64)
    x[0, 5] = torch.nan
    assert torch.isnan(tokens.forward(x.to(DEVICE), 4, False)[0, 5])


@pytest.mark.gpu
@needs_gpu
def test_the_op_takes_the_kernel_and_can_be_captured():
    x = rows_of(576, torch.bfloat16).cuda()
    expected, graph, out = round_tokens(x, 4, False), torch.cuda.CUDAGraph(), torch.zeros_like(x)
    assert torch.equal(expected, tokens.forward(x, 4, False))
    with torch.cuda.graph(graph):
        out.copy_(round_tokens(x, 4, False))
    graph.replay()
    assert torch.equal(out, expected)
