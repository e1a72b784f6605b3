"""Captured passes: the same gradients as autograd's; on a GPU the same as those of ordinary passes."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from planish.errors import PlanishError
from planish.fit.captured import WARM_UP, Captured, fixed_arguments

IDS = torch.arange(24).view(2, 12) % 60


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class OnCpu(Captured):
    """Passes as they are made before a capture."""

    def _aside(self, batch):
        return self._once(batch)


@contextmanager
def nothing(batch):
    yield


def loss_of(parameter, other):
    def loss(x, count):
        return ((x @ parameter).square() + other.sum() * x.sum()).sum() / count

    return loss


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_gradients_are_autograds(factor):
    parameter, other = (nn.Parameter(torch.randn(4, 3)) for _ in range(2))
    loss, batch = loss_of(parameter, other), {"x": torch.randn(5, 4), "count": torch.tensor(7)}
    wanted = loss(**batch)
    gradients = torch.autograd.grad(factor * wanted, [parameter, other])
    captured = OnCpu(loss, [parameter, other], nothing)
    for _ in range(2):
        got = captured(**batch)
        (factor * got).backward()
    assert torch.equal(got, wanted)
    for leaf, gradient in zip((parameter, other), gradients, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient)  # of two passes, added up


@pytest.mark.parametrize("reason", [RuntimeError("it waits"), PlanishError("positional arguments")])
def test_what_cannot_be_captured_goes_on_as_before(reason):
    def refuse(batch):
        raise reason

    parameter = nn.Parameter(torch.randn(4, 3))
    loss, batch = loss_of(parameter, parameter), {"x": torch.randn(5, 4), "count": torch.tensor(7)}
    captured = OnCpu(loss, [parameter], refuse)
    captured._capture(batch)
    assert captured.fails and captured.graph is None
    captured(**batch).backward()
    assert torch.equal(parameter.grad, torch.autograd.grad(loss(**batch), parameter)[0])


def test_fixed_arguments_change_nothing():
    model = tiny_model()
    decoder, blocks = model.model, model.model.layers
    own, wanted = list(blocks), decoder(input_ids=IDS, use_cache=False)[0]
    with fixed_arguments(decoder, blocks, IDS.flip(0)):
        assert not any(block is mine for block, mine in zip(blocks, own, strict=True))
        got = decoder(input_ids=IDS, use_cache=False)[0]
    assert all(block is mine for block, mine in zip(blocks, own, strict=True))
    assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replays_are_ordinary_passes():
    model = tiny_model().to("cuda")
    decoder, blocks = model.model, model.model.layers
    parameters = list(blocks.parameters())

    def loss(ids, count):
        return decoder(input_ids=ids, use_cache=False)[0].square().sum() / count

    captured = Captured(loss, parameters, lambda batch: fixed_arguments(decoder, blocks, batch["ids"]))
    for turn in range(WARM_UP + 3):
        batch = {"ids": IDS.to("cuda").roll(turn, 1), "count": torch.tensor(5 + turn, device="cuda")}
        got = captured(**batch)
        got.backward()
        gradients = [parameter.grad for parameter in parameters]
        model.zero_grad()
        wanted = loss(**batch)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(gradients, list(torch.autograd.grad(wanted, parameters)))
        del got, wanted
    assert captured.graph is not None
    shorter = {"ids": IDS[:, :7].to("cuda"), "count": torch.tensor(3, device="cuda")}
    assert torch.equal(captured(**shorter), loss(**shorter))
