"""Query, key and value rounded: the same in a fit, after loading, with a cache and without; or refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import planish
from planish.errors import PlanishError

IDS = torch.randint(1, 200, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def gradients_again() -> Iterator[None]:
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("scheme", ["w8kv4", "w8a8kv4", "w4a4skv8"])
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
    name = "planish_kv8s" if "s" in scheme else f"planish_kv{scheme[-1]}"
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


def test_refusals(tiny_llama: Any) -> None:
    with pytest.raises(PlanishError, match="rounded alike in all layers; give one kv in all schemes"):
        planish.resolve(tiny_llama(), "rtn", "w8g32kv4", layers=["down_proj=w8g32kv8"])
    config = AutoConfig.for_model("falcon", hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=64)
    falcon = AutoModelForCausalLM.from_config(config)
    with pytest.raises(PlanishError, match="FalconForCausalLM has an attention of its own"):
        planish.resolve(falcon, "rtn", "w8g32kv4")
    assert all(not name.startswith("planish_kv") or name[-1] in "48s" for name in ALL_ATTENTION_FUNCTIONS)
