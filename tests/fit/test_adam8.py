"""Adam8: as good as Adam, its moments one byte each, its state flat tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.fit import adam8
from planish.fit.adam8 import BLOCK, Adam8, decode_positive, decode_signed, encode_positive, encode_signed


def spread(count: int, decades: float) -> Tensor:
    """Positive values over so many decades, one block a row."""
    generator = torch.Generator().manual_seed(0)
    return 10 ** (-decades * torch.rand(count, BLOCK, generator=generator))


def test_the_first_moment_keeps_signs_and_small_values() -> None:
    torch.manual_seed(0)
    values = spread(64, 3) * torch.randn(64, BLOCK).sign()
    found = decode_signed(*encode_signed(values))
    assert torch.equal(found.sign(), values.sign())
    # half a step of the root: 1 / 127 of the largest at the top, finer than a linear map below a quarter
    assert bool(((found - values).abs() <= (values.abs().sqrt() / 127 + 1 / 127**2 / 2)).all())


def test_the_second_moment_is_exact_in_expectation_and_never_0() -> None:
    generator = torch.Generator().manual_seed(0)
    values = spread(1, 6)
    found = torch.stack([decode_positive(*encode_positive(values, generator)) for _ in range(4000)])
    torch.testing.assert_close(found.mean(0), values, rtol=0.03, atol=0)
    # one draw is within a code of the truth: the root of v is good to a few per cent over 6 decades of v
    assert bool(((found[0].sqrt() / values.sqrt()).log().abs() < 0.35).all())
    codes, _ = encode_positive(torch.tensor([[1.0] + [0.0] * 255]), generator)
    assert int(codes.min()) == 1


def test_blocks_of_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    zeros = torch.zeros(2, BLOCK)
    assert torch.equal(decode_signed(*encode_signed(zeros)), zeros)
    assert torch.equal(decode_positive(*encode_positive(zeros, generator)), zeros)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_first_step_is_adamws(decay: float) -> None:
    # the moments are used before they are rounded
    torch.manual_seed(0)
    start, gradient = torch.randn(3, 300), torch.randn(3, 300)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    Adam8([ours], lr=0.1, weight_decay=decay).step_one(ours)
    torch.optim.AdamW([theirs], lr=0.1, weight_decay=decay).step()
    torch.testing.assert_close(ours, theirs)
    assert ours.grad is None


def regression(make: type[torch.optim.Optimizer], steps: int = 400) -> float:
    """Final loss of a small noisy regression whose inputs differ in size by 1000, in batches."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2048, 64, generator=generator) * torch.logspace(-2, 1, 64)
    hidden = torch.randn(64, 32, generator=generator)
    targets = torch.tanh(inputs @ hidden / 16) + 0.3 * torch.randn(2048, 32, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32))
    optimizer = make(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(0, 2048, (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return nn.functional.mse_loss(model(inputs), targets).item()


def test_as_good_as_adam_on_a_regression() -> None:
    ours, theirs = regression(Adam8), regression(torch.optim.Adam)
    assert theirs < 0.25 and ours == pytest.approx(theirs, rel=0.03)


def test_the_second_moment_follows_a_falling_gradient() -> None:
    # rounded to nearest it would stand still: v falls by 0.1 % a step, a code is 1 % to 10 % wide
    p = nn.Parameter(torch.zeros(4 * BLOCK))
    optimizer = Adam8([p], lr=0.0)
    generator = torch.Generator().manual_seed(0)
    size = torch.ones(4 * BLOCK)
    exact = torch.zeros(4 * BLOCK)
    for step in range(1500):
        size[1::2] = 1.0 if step < 300 else 0.1
        gradient = size * torch.randn(4 * BLOCK, generator=generator)
        exact.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        p.grad = gradient
        optimizer.step_one(p)
    state = optimizer.state[p]
    found = decode_positive(state["second"], state["second_max"]).view(-1)
    ratio = found / exact
    assert float(ratio[1::2].mean()) == pytest.approx(1, abs=0.05)
    assert float(ratio[::2].mean()) == pytest.approx(1, abs=0.05)
    assert bool((ratio.log().abs() < 1).all())


def test_groups_have_their_own_rates_and_factors_scale_the_gradient() -> None:
    first, second = (nn.Parameter(torch.zeros(5)) for _ in range(2))
    optimizer = Adam8([{"params": [first], "lr": 0.5}, {"params": [second], "lr": 0.125}], eps=1.0)
    first.grad, second.grad = torch.full((5,), 2.0), torch.full((5,), 2.0)
    optimizer.step_one(first)
    optimizer.step_one(second, factor=0.5)
    # with eps 1 a step is lr * g / (|g| + 1)
    torch.testing.assert_close(first.detach(), torch.full((5,), -0.5 * 2 / 3))
    torch.testing.assert_close(second.detach(), torch.full((5,), -0.125 * 1 / 2))
    optimizer.param_groups[0]["lr"] = 0.0
    before = first.detach().clone()
    first.grad = torch.ones(5)
    optimizer.step()
    assert torch.equal(first, before) and first.grad is None


def test_as_a_hook_of_the_backward() -> None:
    p = nn.Parameter(torch.ones(8))
    optimizer = Adam8([p], lr=0.1)
    p.register_post_accumulate_grad_hook(optimizer.step_one)
    for _ in range(50):
        p.square().sum().backward()
        assert p.grad is None
    assert float(p.detach().abs().max()) < 0.2


def steps_of(parameters: dict[str, nn.Parameter], optimizer: Adam8, first: int, count: int) -> None:
    for step in range(first, first + count):
        for number, parameter in enumerate(parameters.values()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def parameters_of() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"a.scale": nn.Parameter(torch.randn(7, 100)), "b.scale": nn.Parameter(torch.randn(33))}


def test_resuming_from_a_file_is_exact(tmp_path: Path) -> None:
    whole = parameters_of()
    steps_of(whole, Adam8(whole.items(), lr=0.01), 0, 9)

    parts = parameters_of()
    optimizer = Adam8(parts.items(), lr=0.01)
    steps_of(parts, optimizer, 0, 5)
    save_file(optimizer.state_dict(), tmp_path / "optimizer.safetensors")
    again = Adam8(parts.items(), lr=0.01)
    again.load_state_dict(load_file(tmp_path / "optimizer.safetensors"))
    steps_of(parts, again, 5, 4)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert set(again.state_dict()) == {
        f"{name}.{key}" for name in whole for key in ("first", "first_max", "second", "second_max", "step")
    }


def test_a_state_of_something_else_is_refused() -> None:
    parts = parameters_of()
    optimizer = Adam8(parts.items())
    steps_of(parts, optimizer, 0, 1)
    state = optimizer.state_dict()
    other = Adam8([("a.scale", nn.Parameter(torch.zeros(7, 200))), ("b.scale", nn.Parameter(torch.zeros(33)))])
    with pytest.raises(PlanishError, match="doesn't fit a.scale"):
        other.load_state_dict(state)
    with pytest.raises(PlanishError, match="holds b.scale.first, which isn't trained"):
        Adam8([("a.scale", parts["a.scale"])]).load_state_dict(state)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_chunks_give_the_same_as_the_whole(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # of the deterministic parts: random numbers are drawn chunk by chunk
    torch.manual_seed(0)
    start, gradient = torch.randn(count), torch.randn(count)
    found = []
    for chunk in (1, 2**12):
        monkeypatch.setattr(adam8, "CHUNK", chunk)
        p = nn.Parameter(start.clone())
        p.grad = gradient.clone()
        optimizer = Adam8([p])
        optimizer.step()
        found.append((p.detach(), optimizer.state[p]["first"], optimizer.state[p]["second_max"]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_state_takes_two_bytes_an_element() -> None:
    p = nn.Parameter(torch.zeros(100 * BLOCK))
    p.grad = torch.ones_like(p)
    optimizer = Adam8([p])
    optimizer.step()
    assert sum(value.nbytes for value in optimizer.state_dict().values()) <= 2.04 * p.numel()
