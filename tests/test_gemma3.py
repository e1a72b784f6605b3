"""Gemma 3's real weights: norms before and behind, their own rotary tables by layer, activations that reach far."""

import math
from pathlib import Path
from typing import Any

import pytest

import planish

REQUEST: dict[str, Any] = {"samples": 16, "seqlen": 256, "steps": 20, "batch_size": 4, "holdout": 4, "device": "cpu"}


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["omniquant", "signround"])
def test_real_weights_are_quantized_loaded_and_near_their_16_bits(gemma3: Path, tmp_path: Path, recipe: str) -> None:
    text: dict[str, Any] = {"text": "embedded-eval", "seqlen": 256, "limit": 8}
    start = planish.perplexity(planish.load(gemma3, device="cpu"), **text)
    planish.quantize_to(gemma3, tmp_path / "out", recipe, "w4g64", **REQUEST)
    found = planish.perplexity(planish.load(tmp_path / "out", device="cpu"), **text)
    # 4 bits at groups of 64 cost models of this size a few per cent
    assert math.isfinite(found) and found < 1.25 * start, (found, start)
