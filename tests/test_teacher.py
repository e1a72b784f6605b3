"""The model to distil from: its hidden states and head are its own, and what it can't read is told."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import planish.teacher as teacher_module
from planish.errors import PlanishError
from planish.fit.loss import NO_LABEL
from planish.log import Event
from planish.source import open_source
from planish.teacher import Teacher, check_vocabulary, teacher_of

CPU = torch.device("cpu")
IDS = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(0))


@functools.cache
def float_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def made(**changed: Any) -> Teacher:
    about: Any = {"device": CPU, "dtype": torch.float32, "micro_batch": 5, "directory": Path(".")}
    return teacher_of(open_source(float_model()), IDS, **about, **changed)


def test_the_teacher_is_the_float_model_itself() -> None:
    teacher = made()
    with torch.no_grad():
        assert torch.allclose(teacher.hidden, float_model().model(input_ids=IDS)[0], atol=1e-6)
        logits = teacher.logits(teacher.hidden[0])
        assert torch.allclose(logits, float_model()(IDS[:1]).logits[0], atol=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_a_teacher_that_cannot_read_the_text_is_told(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """By its perplexity, which a wrong tokenizer shows in; tokens without a label don't count."""
    labels, events = IDS.clone(), list[Event]()
    labels[:, : IDS.shape[1] // 2] = NO_LABEL
    with torch.no_grad():
        logits = float_model()(IDS[:4]).logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, labels[:4, 1:].flatten(), ignore_index=NO_LABEL).exp().item()
    monkeypatch.setattr(teacher_module, "STRANGE", wanted * (1.01 if known else 0.99))
    assert made(labels=labels, progress=events.append).perplexity(labels, CPU) == pytest.approx(wanted, rel=1e-4)
    assert f"on 4 windows: {wanted:.1f}" in events[-1].note
    assert ("is this its tokenizer" in events[-1].note) is not known


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    other = LlamaForCausalLM(LlamaConfig(**{**float_model().config.to_dict(), "vocab_size": 65}))
    with pytest.raises(PlanishError, match="the teacher has a vocabulary of 65, the model one of 64"):
        check_vocabulary(float_model(), other)
