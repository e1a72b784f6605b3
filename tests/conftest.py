"""Fixtures that several tests share: the real model, and a tiny random one with a tokenizer."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct's folder: $PLANISH_SMOLLM2, or models/smollm2; else the test skips."""
    folder = Path(os.environ.get("PLANISH_SMOLLM2", Path(__file__).parents[1] / "models" / "smollm2"))
    if not (folder / "config.json").is_file():
        pytest.skip("needs SmolLM2-135M-Instruct; set PLANISH_SMOLLM2 to its folder")
    return folder


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """The folder of Gemma 3 270M, which has terms of its own: $PLANISH_GEMMA3; else the test skips."""
    folder = Path(os.environ.get("PLANISH_GEMMA3", ""))
    if not (folder / "config.json").is_file():
        pytest.skip("needs Gemma 3 270M; set PLANISH_GEMMA3 to its folder")
    return folder


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Callable[..., Path]:
    """tiny_llama(name="tiny", **config) -> folder of a random Llama and a byte-level tokenizer."""

    def save(name: str = "tiny", **overrides: object) -> Path:
        settings = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
                    "tie_word_embeddings": False, "bos_token_id": 256, "eos_token_id": 256}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**settings | overrides)).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        _byte_tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def held_as_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where models are loaded with records in place of codes."""
    for home in ("records", "siblings"):
        monkeypatch.setattr(f"planish.kernels.{home}.reads", lambda device, dtype: True)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and <eos> as token 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>")
