"""SignSGD: p -= lr * sign(grad), by groups, with a rate that may live on the device."""

import pytest
import torch
from torch import nn

from planish.fit.optim import OPTIMIZERS, SignSGD


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
