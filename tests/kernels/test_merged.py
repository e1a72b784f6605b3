"""Factors inside the quantizer in Triton: the same bits in every kernel, and gradients of the definition.

Without a GPU the same tests run in Triton's interpreter, in a process of their own: Triton reads
TRITON_INTERPRET when it is imported.
"""

import os

import pytest
import torch

from planish.qtensor import fake_quantize, fake_quantize_backward, from_groups, midpoint, to_groups
from planish.quant import low_rank as slow

pytest.importorskip("triton")
from planish.kernels import merged as fused  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device or Triton's interpreter"
)
# (out, in), group, rank, held in 8 bits: ragged everywhere, several walks of tiles, a group of a whole tile
CASES = [((40, 200), 32, 3, False), ((300, 136), 64, 16, False), ((33, 264), 128, 20, True), ((8, 64), 32, 1, True)]
each_case = pytest.mark.parametrize(("shape", "group", "rank", "int8"), CASES, ids=str)
ALPHA = 0.7


@pytest.mark.skipif(INTERPRETED, reason="this is what it starts")
def test_all_of_this_in_the_interpreter(interpreted):
    assert "passed" in interpreted


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel leaves unwritten holds NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda like, **kwargs: torch.full_like(like, torch.nan, **kwargs))
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: torch.full(size, torch.nan, **kwargs))


def inputs(shape, group, rank, int8, bits, symmetric):
    """What `merged` takes, and a grid that clamps some codes; scales of both signs."""
    made = torch.Generator().manual_seed(rank)
    grid = shape[0], -(-shape[1] // group), 1
    base, a, b = (torch.randn(size, generator=made) for size in (shape, (rank, shape[1]), (shape[0], rank)))
    unit = None
    if int8:
        base = torch.randint(-127, 128, shape, generator=made).to(torch.int8)
        unit = torch.rand(grid, generator=made) / 64
    sign = 1 - 2 * torch.randint(0, 2, grid, generator=made)
    scale = sign * (torch.rand(grid, generator=made) + 0.5) * 3 / 2**bits
    zero = torch.randint(0, 2**bits, grid, generator=made).float()
    zero = torch.full(grid, float(midpoint(bits))) if symmetric else zero
    parts = base if int8 else base.half(), unit, a, 0.1 * b, ALPHA, group
    moved = [part.to(DEVICE) if isinstance(part, torch.Tensor) else part for part in parts]
    return moved, scale.to(DEVICE), zero.to(DEVICE)


@pytest.mark.gpu
@needs_triton
@each_case
def test_the_sum_is_the_definition_s(shape, group, rank, int8):
    parts, _, _ = inputs(shape, group, rank, int8, 4, True)
    base, unit, a, b, _, _ = parts
    frozen = slow.frozen(base, unit, group)
    size = frozen.abs() + ALPHA * (b.abs() @ a.abs())
    worst = (fused.add(*parts) - (frozen.double() + ALPHA * (b.double() @ a.double()))).abs() / size
    assert worst.max() <= 2**-22 * (rank + 2)


@pytest.mark.gpu
@needs_triton
@each_case
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4])
def test_what_is_multiplied_by_is_what_is_converted(shape, group, rank, int8, symmetric, bits):
    parts, scale, zero = inputs(shape, group, rank, int8, bits, symmetric)
    groups = to_groups(fused.add(*parts), group)  # what codes are made of
    for dtype in (torch.float32, torch.float16):
        found = fused.add_round(*parts, scale, zero, bits, dtype)
        wanted = from_groups(fake_quantize(groups, None, scale, zero, bits, dtype), shape[1])
        assert found.dtype == dtype and torch.equal(found, wanted)


@pytest.mark.gpu
@needs_triton
@each_case
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_gradients_are_the_definition_s(shape, group, rank, int8, symmetric):
    parts, scale, zero = inputs(shape, group, rank, int8, 3, symmetric)
    _, _, a, b, _, _ = parts
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(9)).half().to(DEVICE)
    groups = to_groups(fused.add(*parts), group)
    moved, _, *of_grid = fake_quantize_backward(to_groups(grad, group), groups, None, scale, zero, 3, True)
    moved = from_groups(moved, shape[1])
    assert 0.05 < (moved == 0).float().mean() < 0.95, "some codes are clamped, others not"
    found = fused.add_backward(grad, *parts, scale, zero, 3)
    wanted = ALPHA * (b.T.double() @ moved.double()), ALPHA * (moved.double() @ a.T.double()), *of_grid
    for mine, theirs, given in zip(found, wanted, (a, b, scale, zero), strict=True):
        assert mine.shape == given.shape and mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-4)
    again = fused.add_backward(grad, *parts, scale, zero, 3)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("group", "rank"), [(24, 3), (264, 3), (32, 70)])
def test_other_groups_and_high_ranks_take_the_definitions(group, rank, monkeypatch):
    parts, scale, zero = inputs((10, 264), group, rank, True, 4, False)
    monkeypatch.setattr(fused, "_backward_kernel", None)
    base, unit, a, b, _, _ = parts
    frozen = slow.frozen(base, unit, group)
    torch.testing.assert_close(fused.add(*parts), torch.addmm(frozen, b, a, alpha=ALPHA), rtol=1e-5, atol=1e-4)
    assert fused.add_round(*parts, scale, zero, 4, torch.float16).isfinite().all()
    assert all(part.isfinite().all() for part in fused.add_backward(frozen, *parts, scale, zero, 4))


@pytest.mark.gpu
@needs_triton
def test_how_a_tensor_lies_in_memory_changes_nothing():
    parts, scale, zero = inputs((40, 200), 32, 3, False, 4, False)
    base, *rest = parts
    grad = torch.randn(base.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)

    def everything(base, scale, zero, grad):
        ours = base, *rest
        rounded = fused.add_round(*ours, scale, zero, 4, torch.float32)
        return fused.add(*ours), rounded, *fused.add_backward(grad, *ours, scale, zero, 4)

    given = base, scale, zero, grad
    turned = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in given]
    assert not any(part.is_contiguous() for part in turned)
    assert all(torch.equal(one, other) for one, other in zip(everything(*given), everything(*turned), strict=True))
