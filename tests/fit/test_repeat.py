"""Training on a GPU repeats itself bit for bit; the switches for it are put back."""

import hashlib
import os

import pytest
import torch
from torch import nn
from torch.utils import deterministic
from transformers import LlamaConfig, LlamaForCausalLM

import planish
from planish.fit import repeat
from planish.fit.repeat import repeatable
from planish.kernels.linear import packed_layers

GPU = torch.device("cuda")


def switches() -> tuple[bool, bool, bool, str | None]:
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), warns, filled, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_switches_are_put_back(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    before = switches()
    with pytest.raises(KeyError), repeatable(nn.Linear(2, 2), GPU):
        assert switches() == (True, False, False, given or ":4096:8")
        raise KeyError
    assert switches() == before


def test_experts_and_cpus_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    before = switches()
    with repeatable(nn.Linear(2, 2), torch.device("cpu")):
        assert switches() == before
    monkeypatch.setattr(repeat, "has_experts", lambda model: True)
    with repeatable(nn.Linear(2, 2), GPU):
        assert switches() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["planish", "signround", "l4q"])
def test_two_runs_give_the_same_bits(recipe: str) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1))
    ids = torch.randint(0, 512, (16, 1024), generator=torch.Generator().manual_seed(0))

    def digest() -> str:
        made = planish.quantize(model, recipe, "w3g64", data=ids, samples=16, seqlen=1024, steps=20, device="cuda")
        found = hashlib.sha256()
        for layer in packed_layers(made).values():
            q = layer.qtensor().to("cpu")
            found.update(q.codes.numpy().tobytes() + q.scale.numpy().tobytes())
        return found.hexdigest()

    assert digest() == digest()
