"""Query, key and value rounded: the same in a fit, after loading, with a cache and without; or refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import planish
from planish.attention import heads_of
from planish.errors import PlanishError
from planish.quant.activation import fake_quantize_tokens
from planish.quant.hadamard import turn
from planish.scheme import Activations, Scheme

IDS = torch.randint(1, 200, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def gradients_again() -> Iterator[None]:
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("scheme", ["w8kv4", "w8a8kv4", "w4a4skv8", "w8a8kv4h"])
@pytest.mark.parametrize("recipe", ["rtn", "omniquant"])
def test_heads_are_rounded_wherever_the_model_runs(tmp_path: Path, tiny_llama: Any, scheme: str, recipe: str) -> None:
    model, ids = tiny_llama(), torch.randint(1, 200, (12, 16), generator=torch.Generator().manual_seed(1))
    scheme = scheme.replace("w8kv4", "w8g32kv4")
    asked: dict[str, Any] = {"data": ids, "samples": 12, "seqlen": 16, "device": "cpu"}
    asked |= {"steps": 4} if recipe == "omniquant" else {}
    made: Any = planish.quantize(model, recipe, scheme, **asked)
    planish.quantize_to(model, tmp_path / "out", recipe, scheme, **asked)
    loaded: Any = planish.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    torch.set_grad_enabled(False)
    name = "planish_kv8s" if "s" in scheme else f"planish_{scheme[scheme.index('kv') :]}"
    assert made.config._attn_implementation == loaded.config._attn_implementation == name
    planish.save(made, tmp_path / "saved")
    again: Any = planish.load(tmp_path / "saved", device="cpu", dtype=torch.float32)
    logits = loaded(IDS).logits
    assert torch.equal(again(IDS).logits, logits)
    # token by token from a cache: the same but for the order of sums
    cache, parts = None, []
    for at in range(IDS.shape[1]):
        output = loaded(IDS[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache, parts = output.past_key_values, [*parts, output.logits]
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-3, atol=1e-3)
    loaded.set_attn_implementation("sdpa")
    assert not torch.allclose(loaded(IDS).logits, logits, rtol=1e-3, atol=1e-3), "heads were rounded"


def test_turned_query_and_key_keep_their_products_and_round_better() -> None:
    query, key = torch.randn(2, 1, 4, 12, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    key[..., 3] *= 20  # a channel that is large for every token, as keys have them
    wanted = query @ key.mT
    torch.testing.assert_close(turn(query) @ turn(key).mT, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
    lost = []
    for how in (Activations(bits=4), Activations(bits=4, turned=True)):
        given = fake_quantize_tokens(query, how) @ fake_quantize_tokens(key, how).mT
        lost.append(float((given - wanted).square().mean()))
    assert lost[1] < 0.5 * lost[0], "0.36 was seen"
    with pytest.raises(PlanishError, match="rounded alike in all layers"):
        heads_of({"a": Scheme.parse("w8a8kv4"), "b": Scheme.parse("w8a8kv4h")})


def test_refusals(tiny_llama: Any) -> None:
    with pytest.raises(PlanishError, match="rounded alike in all layers; give one kv in all schemes"):
        planish.resolve(tiny_llama(), "rtn", "w8g32kv4", layers=["down_proj=w8g32kv8"])
    config = AutoConfig.for_model("falcon", hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=64)
    falcon = AutoModelForCausalLM.from_config(config)
    with pytest.raises(PlanishError, match="FalconForCausalLM has an attention of its own"):
        planish.resolve(falcon, "rtn", "w8g32kv4")
    assert all(not name.startswith("planish_kv") or name[-1] in "48sh" for name in ALL_ATTENTION_FUNCTIONS)
