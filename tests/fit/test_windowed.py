"""Attention in a sliding window, chunk by chunk, is torch's under the window's mask; and what is trained takes it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import planish
from planish.fit import windowed as module
from planish.fit.windowed import NAME, windowed

WINDOW = 8


@pytest.fixture
def model() -> Any:
    """Two blocks, of which the first looks back over 8 tokens; two heads share their keys."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=WINDOW, initializer_range=0.2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def outcome(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the gradients of their weighted sum."""
    logits = model(input_ids=ids, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    return logits.detach(), list(torch.autograd.grad((logits * weights).sum(), list(model.parameters())))


@pytest.mark.parametrize("tokens", [3, WINDOW, WINDOW + 1, 3 * WINDOW, 5 * WINDOW - 3])
def test_chunks_give_what_the_mask_gives(model: Any, tokens: int) -> None:
    ids = torch.randint(0, 64, (3, tokens), generator=torch.Generator().manual_seed(0))
    logits, grads = outcome(model, ids)
    with windowed(model):
        assert model.config._attn_implementation == NAME
        mine, theirs = outcome(model, ids)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-4)
    for grad, wanted in zip(theirs, grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-3)


def test_the_window_is_felt(model: Any) -> None:
    """A token beyond it changes nothing in the first block; so that what is equal above isn't plain attention."""
    ids = torch.randint(1, 64, (1, 2 * WINDOW), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 0] = 0
    with windowed(model), torch.no_grad():
        states = [model(input_ids=given, output_hidden_states=True).hidden_states[1][0] for given in (ids, other)]
    changed = (states[0] != states[1]).any(-1)
    assert changed.tolist() == [True] * WINDOW + [False] * WINDOW


def test_another_attention_stays(model: Any) -> None:
    model.set_attn_implementation("eager")
    with windowed(model):
        assert model.config._attn_implementation == "eager"


def test_blocks_and_the_whole_are_trained_with_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    chunks = module._chunks

    def noted(heads: Tensor, count: int, width: int) -> Tensor:
        seen.add((len(heads), count, width, torch.is_grad_enabled()))
        return chunks(heads, count, width)

    monkeypatch.setattr(module, "_chunks", noted)
    ids = torch.randint(0, 64, (12, 2 * WINDOW), generator=torch.Generator().manual_seed(0))
    how = {"data": ids, "samples": 12, "seqlen": 2 * WINDOW, "steps": 2, "e2e_epochs": 1, "e2e_batch_size": 3}
    made = planish.quantize(model, "planish", "w4g16", **how)
    assert {rows for rows, *_, trained in seen if trained} == {4, 3}
    assert {(count, width) for _, count, width, _ in seen} == {(2, WINDOW)}
    assert made.config._attn_implementation == "sdpa"


def off_by(device: str, dtype: torch.dtype) -> list[float]:
    """Relative error of the gradients of query, key and value at the shapes of Gemma 3, whose heads have 256 channels,
    against torch's attention in double precision."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 1200, 256), (1, 1, 1200, 256), (1, 1, 1200, 256)]
    heads = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    weights = torch.randn((1, 1200, 4, 256), generator=generator)
    back = torch.arange(1200).unsqueeze(1) - torch.arange(1200)
    part = nn.Module()

    def gradients(attention: Any, device: str, dtype: torch.dtype) -> list[Tensor]:
        given = [head.to(device, dtype).requires_grad_() for head in heads]
        grads = torch.autograd.grad((attention(*given) * weights.to(device, dtype)).sum(), given)
        return [grad.cpu().double() for grad in grads]

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = (back >= 0) & (back < 512)
        return functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)

    def chunked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return module.attend(part, query, key, value, None, sliding_window=512)[0]

    pairs = zip(gradients(chunked, device, dtype), gradients(masked, "cpu", torch.float64), strict=True)
    return [float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs]


def test_gradients_are_those_of_double_precision() -> None:
    assert max(off_by("cpu", torch.float32)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_so_they_are_on_a_gpu() -> None:
    assert max(off_by("cuda", torch.bfloat16)) < 0.02
