"""Law 3 for training on packed weights: the op against the reference and against autograd in fp64, and the
Triton kernels against the op's own definition.

Without a GPU the kernels run in Triton's interpreter, in a process of their own: Triton reads
TRITON_INTERPRET when it is imported. The interpreter multiplies no bf16.
"""

import dataclasses
import importlib.util
import itertools
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planish.kernels import reference, train
from planish.kernels.pack import Packed
from planish.qtensor import QTensor, midpoint, to_groups

if importlib.util.find_spec("triton"):
    from planish.kernels import triton_train

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# the first backward pass of a process multiplies in a thread that has no context yet
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
needs_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device or Triton's interpreter"
)
on_cpu = pytest.mark.skipif(INTERPRETED, reason="runs outside of the interpreter")

SHAPES = [(48, 192), (37, 200)]  # (out, in)
GROUPS = [32, 64, 128, None]
LEADS = [(), (5,), (2, 3)]  # what x has before its last dimension
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2**-18, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # of sums of sizes of terms
SUMS = 2**-18  # the same for ds and dz, which are summed in fp32

each_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8])
each_grid = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def random_weight(shape, bits, group=None, symmetric=True, offset=False, device="cpu"):
    """A Packed with scales of both signs, and its QTensor."""
    made = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    grid = (shape[0], -(-shape[1] // (group or shape[1])))
    scale = (torch.rand(grid, **made) + 0.5) * (1 - 2 * torch.randint(0, 2, grid, **made))

    def integers(size):
        return torch.randint(0, 2**bits, size, dtype=torch.uint8, **made)

    q = QTensor(
        codes=integers(shape),
        scale=(scale / 2**bits).half(),
        bits=bits,
        group_size=group or shape[1],
        zero=None if symmetric else integers(grid),
        offset=torch.randn(grid, **made) * 0.01 if offset else None,
    )
    return Packed.from_qtensor(q), q


def random_values(*shape, dtype=torch.float32, seed=1, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def learning(weight):
    """The same weight with fp32 leaves for scale and zero."""
    zero = None if weight.zero is None else weight.zero.float().requires_grad_()
    return dataclasses.replace(weight, scale=weight.scale.float().requires_grad_(), zero=zero)


def wide(grid, q):
    """A grid's value for each weight, [out, in]."""
    return grid.repeat_interleave(q.group_size, dim=1)[:, : q.shape[1]]


def group_sums(values, q):
    """[out, in] -> [out, G]"""
    return to_groups(values, q.group_size).sum(-1)


def expected_gradients(x, q, grad):
    """(dX, ds, dz) by autograd in fp64 through the dense weight as it was rounded; and the sizes of their terms."""
    x, scale = x.double().requires_grad_(), q.scale.double().requires_grad_()
    zero = torch.full_like(scale, midpoint(q.bits)) if q.zero is None else q.zero.double()
    zero = zero.detach().requires_grad_()
    exact = wide(scale, q) * (q.codes - wide(zero, q))
    rounded = exact + (q.dequantize(grad.dtype).double() - exact).detach()
    (x @ rounded.T).backward(grad.double())
    size = grad.double().abs()
    steps = (q.codes - wide(zero, q)).abs().detach()
    terms = size.reshape(-1, q.shape[0]).T @ x.detach().abs().reshape(-1, q.shape[1])
    sizes = size @ rounded.detach().abs(), group_sums(terms * steps, q), group_sums(terms, q) * scale.detach().abs()
    return (x.grad, scale.grad, zero.grad), sizes


def assert_near(found, expected, size, tolerance):
    worst = ((found.double() - expected).abs() / (size + 1e-30)).max().item()
    assert worst <= tolerance, worst


@on_cpu
@each_bits
@each_grid
def test_forward_is_the_reference_bit_for_bit(bits, symmetric):
    for shape, group, lead, dtype, more in itertools.product(SHAPES, GROUPS, LEADS, DTYPES, [True, False]):
        weight, _ = random_weight(shape, bits, group, symmetric, offset=more)
        x = random_values(*lead, shape[1], dtype=dtype)
        bias = random_values(shape[0]) if more else None
        found = train.matmul(x, learning(weight), bias, {})
        assert found.dtype == dtype and found.shape == (*lead, shape[0])
        assert torch.equal(found, reference.matmul(x, weight, bias, {})), (shape, group, lead, dtype)


@on_cpu
@each_bits
@each_grid
def test_gradients_are_those_of_the_dense_weight(bits, symmetric):
    for shape, group, lead, dtype in itertools.product(SHAPES, GROUPS, LEADS, DTYPES):
        weight, q = random_weight(shape, bits, group, symmetric)
        x, grad = random_values(*lead, shape[1], dtype=dtype), random_values(*lead, shape[0], dtype=dtype, seed=2)
        expected, sizes = expected_gradients(x, q, grad)
        x, learner, bias = x.requires_grad_(), learning(weight), torch.zeros(shape[0], requires_grad=True)
        train.matmul(x, learner, bias, {}).backward(grad)
        assert x.grad.dtype == dtype and learner.scale.grad.dtype == torch.float32
        assert_near(x.grad, expected[0], sizes[0], ROUNDING[dtype])
        assert_near(learner.scale.grad, expected[1], sizes[1], SUMS)
        if not symmetric:
            assert_near(learner.zero.grad, expected[2], sizes[2], SUMS)
        total = grad.double().reshape(-1, shape[0])
        assert_near(bias.grad, total.sum(0), total.abs().sum(0), ROUNDING[dtype])


@on_cpu
def test_an_offset_changes_neither_ds_nor_dz():
    weight, _ = random_weight((16, 96), 3, 32, symmetric=False, offset=True)
    x, grad = random_values(4, 96), random_values(4, 16, seed=2)
    shifted, plain = learning(weight), learning(dataclasses.replace(weight, offset=None))
    for learner in (shifted, plain):
        train.matmul(x, learner, None, {}).backward(grad)
    assert torch.equal(shifted.scale.grad, plain.scale.grad) and torch.equal(shifted.zero.grad, plain.zero.grad)


class Seen(TorchDispatchMode):
    """Names of the ops that ran, and how many elements the largest float result had."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **kwargs or {})
        self.names.add(op.name())
        for part in result if isinstance(result, tuple) else (result,):
            if isinstance(part, torch.Tensor) and part.is_floating_point():
                self.largest = max(self.largest, part.numel())
        return result


@on_cpu
def test_only_what_is_asked_for_is_computed_and_held():
    weight, _ = random_weight((32, 64), 2, 32, symmetric=False)

    def ran(x, weight):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.shape) or t, lambda t: t):
            y = train.matmul(x, weight, None, {})
        assert (32, 64) not in held, "a dense weight lives in the graph"
        with Seen() as seen:
            y.sum().backward()
        return (9, 64) in held, {name.split("::")[1] for name in seen.names if name.startswith("planish::packed")}

    x = random_values(9, 64)
    learner = learning(weight)
    assert ran(x, learner) == (True, {"packed_grid_grad"})
    assert ran(x, dataclasses.replace(learner, zero=weight.zero)) == (True, {"packed_grid_grad"})
    assert ran(x.clone().requires_grad_(), weight) == (False, {"packed_input_grad"})
    assert ran(x.clone().requires_grad_(), learner) == (True, {"packed_input_grad", "packed_grid_grad"})


@on_cpu
def test_the_whole_gradient_of_the_weight_is_never_made(monkeypatch):
    weight, q = random_weight((256, 512), 4, 64, symmetric=False)
    x, grad = random_values(8, 512), random_values(8, 256, seed=2)
    whole = train.grid_gradients(grad, x, weight, True)
    _, sizes = expected_gradients(x, q, grad)
    for block in (1, 512 * 7, 512 * 32):
        monkeypatch.setattr(train, "BLOCK", block)
        with Seen() as seen:
            parts = train.grid_gradients(grad, x, weight, True)
        assert seen.largest <= max(block, x.numel())
        for found, expected, size in zip(parts, whole, sizes[1:], strict=True):
            assert_near(found, expected.double(), size, SUMS)


@on_cpu
@pytest.mark.parametrize("rows", [3, 0])
def test_torch_knows_the_op(rows):
    weight, _ = random_weight((16, 72), 3, 32, symmetric=False)
    learner = learning(weight)
    x, bias = random_values(rows, 72).requires_grad_(), random_values(16).requires_grad_()
    arguments = x, learner.codes, learner.scale, learner.zero, None, bias, 3, 32, 72
    torch.library.opcheck(train.packed_matmul, arguments)


@on_cpu
def test_torch_compile_traces_it_whole():
    weight, _ = random_weight((16, 64), 4, 32, symmetric=False)

    def gradients(function):
        x, learner = random_values(3, 64).requires_grad_(), learning(weight)
        function(x, learner, None, {}).square().sum().backward()
        return x.grad, learner.scale.grad, learner.zero.grad

    compiled = torch.compile(train.matmul, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, gradients(compiled), gradients(train.matmul)))


@on_cpu
def test_under_autocast_it_multiplies_as_a_linear_does():
    weight, _ = random_weight((16, 64), 4, 32)
    x = random_values(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = train.matmul(x, learning(weight), None, {})
    assert y.dtype == torch.bfloat16 and torch.equal(y, reference.matmul(x.bfloat16(), weight, None, {}))


@pytest.mark.skipif(INTERPRETED or not importlib.util.find_spec("triton"), reason="this is what it starts")
def test_the_kernels_in_the_interpreter(interpreted):
    assert "passed" in interpreted


# (out, in), tokens, group: ragged everywhere, groups of several tiles and of part of one
KERNEL_SHAPES = [((70, 72), 18, 32), ((40, 96), 5, 48), ((16, 264), 20, None)]
if not INTERPRETED:
    KERNEL_SHAPES += [((300, 264), 150, 64), ((4096, 11008), 2000, 128), ((11008, 4096), 64, None)]
# each bit width in one dtype, and one of them in all: a kernel is compiled for each
KERNEL_CASES = [(bits, torch.float16 if INTERPRETED else torch.bfloat16) for bits in (2, 3, 4, 6, 8)]
KERNEL_CASES += [(3, torch.float32)] + ([] if INTERPRETED else [(3, torch.float16)])
each_case = pytest.mark.parametrize("bits, dtype", KERNEL_CASES, ids=str)


@pytest.mark.gpu
@needs_triton
@each_case
@each_grid
def test_kernels_decode_the_reference_bit_for_bit(bits, dtype, symmetric):
    for shape, _, group in KERNEL_SHAPES:
        weight, q = random_weight(shape, bits, group, symmetric, offset=symmetric, device=DEVICE)
        assert torch.equal(triton_train.dense(weight, dtype), q.dequantize(dtype)), (shape, group)
        assert torch.equal(triton_train.dense(learning(weight), dtype), q.dequantize(dtype)), (shape, group)


@pytest.mark.gpu
@needs_triton
@each_case
@each_grid
def test_kernels_match_the_definition(bits, dtype, symmetric):
    for shape, tokens, group in KERNEL_SHAPES:
        weight, q = random_weight(shape, bits, group, symmetric, device=DEVICE)
        x = random_values(tokens, shape[1], dtype=dtype, device=DEVICE)
        grad = random_values(tokens, shape[0], dtype=dtype, seed=2, device=DEVICE)
        bias = random_values(shape[0], dtype=dtype, device=DEVICE)
        expected, sizes = expected_gradients(x, q, grad)
        exact = q.dequantize(dtype).double()
        size = x.double().abs() @ exact.abs().T + bias.abs()
        for through_dense in (False, True):
            y = triton_train.multiply(x, weight, bias, through_dense)
            assert_near(y, x.double() @ exact.T + bias, size, ROUNDING[dtype])
            grad_x = triton_train.multiply_back(grad, weight, through_dense)
            assert_near(grad_x, expected[0], sizes[0], ROUNDING[dtype])
        grad_scale, grad_zero = triton_train.grid_gradients(grad, x, weight, True)
        assert_near(grad_scale, expected[1], sizes[1], SUMS)
        assert_near(grad_zero, expected[2], sizes[2], SUMS)
        alone, nothing = triton_train.grid_gradients(grad, x, weight, False)
        assert torch.equal(alone, grad_scale) and nothing.numel() == 0


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("tokens", [64, 150, 193])
def test_programs_share_the_tokens_of_a_small_matrix(monkeypatch, tokens):
    weight, q = random_weight((40, 96), 3, 32, symmetric=False, device=DEVICE)
    x, grad = (random_values(tokens, size, seed=size, device=DEVICE) for size in (96, 40))
    expected, sizes = expected_gradients(x, q, grad)
    monkeypatch.setattr(triton_train, "SHORTEST", 64)
    for mine, right, size in zip(
        triton_train.grid_gradients(grad, x, weight, True), expected[1:], sizes[1:], strict=True
    ):
        assert_near(mine, right, size, SUMS)


@pytest.mark.gpu
@needs_triton
def test_kernels_add_an_offset():
    weight, q = random_weight((40, 96), 4, 48, symmetric=False, offset=True, device=DEVICE)
    exact, x = q.dequantize(), random_values(9, 96, device=DEVICE)
    y = triton_train.multiply(x, weight, None)
    assert_near(y, (x @ exact.T).double(), x.abs() @ exact.abs().T, ROUNDING[torch.float32])
    grad_x = triton_train.multiply_back(y, weight)
    assert_near(grad_x, (y @ exact).double(), y.abs() @ exact.abs(), ROUNDING[torch.float32])


@pytest.mark.gpu
@needs_triton
def test_kernels_take_no_tokens_and_any_layout():
    held, none = random_weight((48, 64), 4, 32, device=DEVICE)[0], torch.zeros(0, 64, device=DEVICE)
    assert triton_train.multiply(none, held, None).shape == (0, 48)
    assert not triton_train.grid_gradients(none.new_zeros(0, 48), none, held, False)[0].any()
    x, grad = random_values(64, 9, device=DEVICE), random_values(1, 48, device=DEVICE)
    assert torch.equal(triton_train.multiply(x.T, held, None), triton_train.multiply(x.T.contiguous(), held, None))
    spread = grad.expand(9, 48)
    assert torch.equal(triton_train.multiply_back(spread, held), triton_train.multiply_back(spread.clone(), held))


@pytest.mark.gpu
@needs_gpu
@each_grid
def test_the_op_trains_on_a_gpu(symmetric):
    weight, q = random_weight((192, 576), 2, 64, symmetric, device=DEVICE)
    for dtype in (torch.bfloat16, torch.float64):  # the second is for the definition, not for a kernel
        x = random_values(2, 50, 576, dtype=dtype, device=DEVICE)
        grad = random_values(2, 50, 192, dtype=dtype, seed=2, device=DEVICE)
        expected, sizes = expected_gradients(x, q, grad)
        x, learner = x.requires_grad_(), learning(weight)
        train.matmul(x, learner, None, {}).backward(grad)
        assert_near(x.grad, expected[0], sizes[0], ROUNDING[torch.bfloat16])
        assert_near(learner.scale.grad, expected[1], sizes[1], SUMS)
        if not symmetric:
            assert_near(learner.zero.grad, expected[2], sizes[2], SUMS)


@pytest.mark.gpu
@needs_gpu
def test_repeats_itself_bit_for_bit():
    held, _ = random_weight((1024, 4096), 2, 64, symmetric=False, device=DEVICE)
    x, grad = (random_values(3000, n, dtype=torch.bfloat16, device=DEVICE) for n in (4096, 1024))

    def step():
        back = triton_train.multiply_back(grad, held, False)
        return triton_train.multiply(x, held, None, False), back, *triton_train.grid_gradients(grad, x, held, True)

    first = step()
    for _ in range(5):
        assert all(map(torch.equal, first, step()))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("through_dense", [False, True])
def test_no_gradient_of_the_weight_takes_memory(monkeypatch, through_dense):
    monkeypatch.setattr(triton_train, "writes_dense", lambda tokens: through_dense)
    held, _ = random_weight((8192, 8192), 2, 64, device=DEVICE)
    x = random_values(64, 8192, dtype=torch.bfloat16, device=DEVICE).requires_grad_()

    def step():
        learner = learning(held)
        train.matmul(x, learner, None, {}).sum().backward()

    step()  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    taken = torch.cuda.max_memory_allocated() - before
    grids, dense = 4 * held.scale.numel(), 2 * 8192 * 8192
    # scale, its gradient and the sums; activations of 64 tokens are small; W_hat in 16 bits where it is written
    assert taken <= 4 * grids + 16 * x.numel() + (dense if through_dense else 0), taken
