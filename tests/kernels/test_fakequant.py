"""The fused fake quantizer against its eager twin, the op on CPU tensors: forward, gradients, CUDA graphs.

Without a GPU the same tests run in Triton's interpreter, in a process of their own: Triton reads
TRITON_INTERPRET when it is imported.
"""

import os

import pytest
import torch

from planish.qtensor import fake_quantize, fake_quantize_backward, midpoint

pytest.importorskip("triton")
from planish.kernels import fakequant  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(),
                                  reason="needs a CUDA device or Triton's interpreter")
# weight's dtype, result's dtype
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
          (torch.float32, torch.bfloat16)]
GROUPS = [8, 24, 64, 2056] if INTERPRETED else [8, 24, 32, 64, 128, 576, 2056, 28672]

each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
each_rounding = pytest.mark.parametrize("rounded", [True, False], ids=["offset", "nearest"])


@pytest.mark.skipif(INTERPRETED, reason="this is what it starts")
def test_all_of_this_in_the_interpreter(interpreted):
    assert "passed" in interpreted


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel leaves unwritten holds NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda like, **kwargs: torch.full_like(like, torch.nan, **kwargs))


def inputs(bits, group, symmetric, rounded, dtype=torch.float32, rows=None):
    """weight, rounding, scale, zero on the CPU: scales of both signs, ties, and codes that are clamped."""
    generator = torch.Generator().manual_seed(bits * group)
    rows = rows or ((3, 7) if group < 1024 else (1, 3))
    grid = (*rows, 1)
    sign = 1 - 2 * torch.randint(0, 2, grid, generator=generator)
    scale = sign * (torch.rand(grid, generator=generator) + 0.5) / 2**bits
    weight = torch.randn(*rows, group, generator=generator)
    weight[..., 0] = 2.5 * scale[..., 0]
    weight[..., 1] = 1e4
    rounding = torch.rand(*rows, group, generator=generator) - 0.5 if rounded else None
    random = torch.randint(0, 2**bits, grid, generator=generator).float()
    zero = torch.full(grid, float(midpoint(bits))) if symmetric else random
    return weight.to(dtype), rounding, scale, zero


def on(device, tensors):
    return [tensor.to(device) if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", GROUPS)
@each_grid
@each_rounding
def test_forward_is_the_twin_bit_for_bit(bits, group, symmetric, rounded):
    for weight_dtype, dtype in DTYPES:
        arguments = inputs(bits, group, symmetric, rounded, weight_dtype)
        expected = fake_quantize(*arguments, bits, dtype)
        result = fakequant.forward(*on(DEVICE, arguments), bits, dtype).cpu()
        assert result.dtype == dtype
        if INTERPRETED and dtype == torch.bfloat16:  # the interpreter truncates where a GPU rounds
            torch.testing.assert_close(result, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(result, expected), (weight_dtype, dtype)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", GROUPS)
@each_grid
@each_rounding
@pytest.mark.parametrize("need_weight", [True, False], ids=["weight", "fixed"])
def test_backward_is_the_twin_within_the_order_of_sums(bits, group, symmetric, rounded, need_weight):
    for weight_dtype, dtype in DTYPES:
        weight, rounding, scale, zero = inputs(bits, group, symmetric, rounded, weight_dtype)
        grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        arguments = grad, weight, rounding, scale, zero
        expected = fake_quantize_backward(*arguments, bits, need_weight)
        result = [tensor.cpu() for tensor in fakequant.backward(*on(DEVICE, arguments), bits, need_weight)]
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
        # the sum of the sizes of the terms: codes less than 2^bits apart, ratios where they aren't clamped
        terms = (grad.float().abs() * 2 ** (bits + 1)).sum(-1, keepdim=True)
        assert ((result[2] - expected[2]).abs() <= 1e-6 * terms).all()
        assert ((result[3] - expected[3]).abs() <= 1e-6 * terms * scale.abs()).all()


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("rows", [(1, 1), (1, 64), (65, 1), (0, 3)], ids=str)
def test_any_number_of_groups(rows):
    arguments = inputs(4, 64, False, True, rows=rows)
    assert torch.equal(fakequant.forward(*on(DEVICE, arguments), 4, torch.float32).cpu(),
                       fake_quantize(*arguments, 4, torch.float32))


@pytest.mark.gpu
@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_come_through():
    weight, rounding, scale, zero = inputs(4, 64, False, True)
    weight[0, 0, 5], weight[1, 2, 9], weight[2, 1, 7] = torch.nan, torch.inf, -torch.inf
    expected = fake_quantize(weight, rounding, scale, zero, 4, torch.float32)
    result = fakequant.forward(*on(DEVICE, (weight, rounding, scale, zero)), 4, torch.float32).cpu()
    assert expected.isnan().sum() == 1
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@needs_triton
def test_layout_of_the_inputs_does_not_matter():
    weight, rounding, scale, zero = inputs(4, 32, False, True, rows=(4, 4))
    turned = [tensor.transpose(0, 1) for tensor in on(DEVICE, (weight, rounding, scale, zero))]
    expected = fake_quantize(weight, rounding, scale, zero, 4, torch.float32).transpose(0, 1)
    assert torch.equal(fakequant.forward(*turned, 4, torch.float32).cpu(), expected)


@pytest.mark.gpu
@needs_gpu
@each_rounding
def test_gradients_reach_every_trainable(rounded):
    def grads(where):
        tensors = on(where, inputs(3, 64, False, rounded, torch.bfloat16))
        trained = [tensor.detach().requires_grad_() for tensor in tensors if tensor is not None]
        arguments = trained if rounded else [trained[0], None, *trained[1:]]
        (fake_quantize(*arguments, 3, torch.bfloat16).float() ** 2).sum().backward()
        return [tensor.grad.cpu() for tensor in trained]

    for found, expected in zip(grads(DEVICE), grads("cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
@needs_gpu
def test_repeats_itself_bit_for_bit():
    arguments = on(DEVICE, inputs(2, 576, False, True, rows=(64, 8)))
    grad = torch.randn_like(arguments[0])
    first = fakequant.backward(grad, *arguments, 2, True)
    for _ in range(5):
        again = fakequant.backward(grad, *arguments, 2, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_cuda_graph_replays_on_new_values():
    held = on(DEVICE, inputs(4, 64, False, True, rows=(64, 8)))
    grad = torch.randn_like(held[0])

    def step():
        return fake_quantize(*held, 4, torch.bfloat16), *fake_quantize_backward(grad, *held, 4, True)

    step()  # compiles: not while a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    held[0].copy_(torch.randn_like(held[0]))
    held[1].copy_(torch.rand_like(held[1]) - 0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("group", [32, 64, 128, 4096])
def test_runs_at_the_speed_of_memory(group):
    # a projection of 4096 x 4096; within twice the time of a plain copy of as many bytes
    weight = torch.randn(4096, 4096 // group, group, device=DEVICE, dtype=torch.bfloat16)
    rounding = torch.zeros_like(weight, dtype=torch.float32)
    scale = torch.full((*weight.shape[:2], 1), 0.1, device=DEVICE)
    zero = torch.full_like(scale, 8.0)
    source = torch.randn_like(rounding)  # 4 bytes read and 4 written, as V is read and W read and written
    target = torch.zeros_like(source)

    quantized = milliseconds(lambda: fakequant.forward(weight, rounding, scale, zero, 4, torch.bfloat16))
    copied = milliseconds(lambda: target.copy_(source))
    assert quantized < 2 * copied, (quantized, copied)


def milliseconds(work, repeats=50):
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(5):
        work()
    start.record()
    for _ in range(repeats):
        work()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / repeats
