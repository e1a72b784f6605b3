"""SignSGD: p -= lr * sign(grad), by groups, with a rate that may live on the device."""

from typing import Any

import pytest
import torch
from torch import nn

from planish.fit.optim import OPTIMIZERS, Rated, SignSGD


def test_one_step_is_the_sign() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([3.0, -1e-9, 0.0, -7.0])
    SignSGD([p], lr=0.25).step()
    assert p.tolist() == [-0.25, 0.25, 0.0, 0.25]


@pytest.mark.parametrize("tensor", [True, False])
def test_groups_have_their_own_rates(tensor: bool) -> None:
    first, second, idle = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    rates = [torch.tensor(rate) if tensor else rate for rate in (0.5, 0.125)]
    optimizer = SignSGD([{"params": [first, idle], "lr": rates[0]}, {"params": [second], "lr": rates[1]}])
    for p in (first, second):
        p.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    assert (first.tolist(), second.tolist(), idle.tolist()) == ([-0.5, 0.5], [-0.125, 0.125], [0, 0])


def test_a_tensor_rate_is_read_at_each_step() -> None:
    p, rate = nn.Parameter(torch.zeros(1)), torch.tensor(1.0)
    optimizer = SignSGD([{"params": [p], "lr": rate}])
    for factor in (1.0, 0.5):
        optimizer.param_groups[0]["lr"].fill_(factor)
        p.grad = torch.ones(1)
        optimizer.step()
    assert p.item() == -1.5


def test_a_falling_rate_travels_at_most_half_of_the_first_times_the_steps() -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = SignSGD([p], lr=0.0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = (1 - step / 200) / 200
        p.grad = -torch.ones(1)
        optimizer.step()
    assert p.item() == pytest.approx(0.5, abs=0.01)


def test_it_minimises() -> None:
    p = nn.Parameter(torch.randn(50))
    optimizer = SignSGD([p], lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        (p - 1).square().sum().backward()
        optimizer.step()
    assert bool((p - 1).abs().max() <= 0.0101)


def test_without_gradients_nothing_happens() -> None:
    p = nn.Parameter(torch.ones(2))
    SignSGD([p]).step()
    assert p.tolist() == [1, 1] and OPTIMIZERS["signsgd"] is SignSGD


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rated_is_adamw_with_a_rate_for_each(decay: float) -> None:
    torch.manual_seed(0)
    rates, sizes = (0.3, 2e-3, 1e-4), ((5, 3), (4,), (2, 2))
    ours, theirs = ([nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1))) for size in sizes]
                    for _ in range(2))  # fmt: skip
    how: dict[str, Any] = {"betas": (0.9, 0.95)}
    rated = Rated([{"params": ours, "rates": list(rates), "weight_decay": decay}], **how)
    groups = [{"params": [p], "lr": rate} for p, rate in zip(theirs, rates, strict=True)]
    plain = torch.optim.AdamW(groups, weight_decay=decay, **how)
    for step in range(6):
        factor = 1 - step / 6
        rated.param_groups[0]["lr"] = factor
        for group, rate in zip(plain.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = other.grad = None
            if index != 1 or step % 2:  # one has a gradient now and then, and counts its own steps
                mine.grad = torch.randn_like(mine) * 10.0 ** (step - 3)
                other.grad = mine.grad.clone()
        rated.step()
        plain.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_rated_goes_on_from_its_state_and_leaves_what_has_no_gradient() -> None:
    def made() -> tuple[list[nn.Parameter], Rated]:
        parts = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
        return parts, Rated([{"params": parts, "rates": [0.1, 0.1], "weight_decay": 0.0}])

    (whole, whole_way), (cut, cut_way) = made(), made()
    for step in range(4):
        for parts, way in ((whole, whole_way), (cut, cut_way)):
            parts[0].grad = torch.arange(3.0) - step
            way.step()
        if step == 1:
            saved, (fresh, fresh_way) = cut_way.state_dict(), made()
            fresh[0].data.copy_(cut[0])
            fresh_way.load_state_dict(saved)
            cut, cut_way = fresh, fresh_way
    assert torch.equal(whole[0], cut[0]) and whole[1].tolist() == [1.0, 1.0]
