"""What a float model writes itself: drawn with the chances it gives, by the seed, however many windows at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import planish
from planish import own_text
from planish.errors import PlanishError
from planish.own_text import GREEDY, drawn, own_windows
from planish.source import open_source

Tiny = Callable[..., Path]
HOW: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_tokens_are_drawn_with_their_chances() -> None:
    chances = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3])
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    found = drawn(chances.log().expand(1000, -1), draws)
    assert found.shape == (1000, 1) and torch.bincount(found.flatten(), minlength=5).tolist() == [0, 500, 200, 0, 300]
    ends = drawn(chances.log().expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ends.flatten().tolist() == [1, 4], "never a token without a chance"


def test_windows_follow_the_model_and_the_seed(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(initializer_range=0.3)
    source = open_source(folder)
    ids = own_windows(source, source.tokenizer(), 12, 24, seed=1, **HOW)
    assert ids.shape == (12, 24) and ids.dtype == torch.int64
    assert all(parameter.is_meta for parameter in source.skeleton().parameters()), "nothing is left in memory"
    assert torch.equal(ids, own_windows(source, source.tokenizer(), 12, 24, seed=1, **HOW))
    other = own_windows(source, source.tokenizer(), 12, 24, seed=2, **HOW)
    assert not torch.equal(ids, other) and 256 not in [*ids[:, 0].tolist(), *other[:, 0].tolist()], "no special token"
    monkeypatch.setattr(own_text, "MOST", 4)
    events: list[Any] = []
    again = own_windows(source, source.tokenizer(), 12, 24, seed=1, progress=events.append, **HOW)
    assert torch.equal(ids, again) and len(events) == 3
    # the cache gives what the whole window gives
    model = planish.load(folder, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        likeliest = model(input_ids=ids).logits.argmax(-1)
    assert torch.equal(ids[:, 1 : GREEDY + 1], likeliest[:, :GREEDY])
    assert not torch.equal(ids[:, GREEDY + 1 :], likeliest[:, GREEDY:-1]), "from there on they are drawn"


def test_a_model_with_sliding_windows_writes_too(tmp_path: Path) -> None:
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=4, pad_token_id=0, layer_types=["sliding_attention",
        "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    ids = own_windows(open_source(tmp_path / "gemma"), None, 3, 12, **HOW)
    model = planish.load(tmp_path / "gemma", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        likeliest = model(input_ids=ids).logits.argmax(-1)
    assert torch.equal(ids[:, 1 : GREEDY + 1], likeliest[:, :GREEDY])


def test_a_model_that_has_no_room_is_refused(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "host_memory", lambda: 1000)
    with pytest.raises(PlanishError, match=r"^data=self has .*tiny write text, which takes 0.0 GB for the whole model"):
        own_windows(open_source(tiny_llama()), None, 3, 12, **HOW)


def test_no_text_at_all(tiny_llama: Tiny, tmp_path: Path) -> None:
    about: dict[str, Any] = {"data": "self", "samples": 8, "seqlen": 16, "device": "cpu", "steps": 2}
    manifest = planish.quantize_to(tiny_llama(), tmp_path / "out", "signround", "w2g32", **about)
    assert (manifest.data, manifest.samples, manifest.watched) == ("self", 8, "")
    again = planish.quantize_to(tmp_path / "tiny", tmp_path / "again", "signround", "w2g32", **about)
    assert manifest.data_sha256 == again.data_sha256
