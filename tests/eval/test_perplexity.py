"""Perplexity against the plain formula: whole logits, one window after another."""

import sys

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

import planish
from planish.errors import PlanishError
from planish.eval import perplexity
from planish.folder import tokenizer_of

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def tiny(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from uniform, so that a wrong token would show
    return model


def plain(model, ids, seqlen):
    losses = []
    for window in ids[: len(ids) // seqlen * seqlen].view(-1, seqlen):
        with torch.no_grad():
            logits = model(window[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return torch.cat(losses).mean().exp().item()


# Gemma 2 caps its logits: they aren't the head's output, which is the case for the slow path
@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Gemma2Config(**SIZES, final_logit_softcapping=0.5)],
                         ids=["plain head", "capped logits"])
def test_matches_the_formula(config):
    model = tiny(config)
    ids = torch.randint(0, 64, (50,), generator=torch.Generator().manual_seed(1))
    expected = plain(model, ids, 16)  # 3 windows, 2 tokens left out
    for batch_size in (1, 2, 8):
        assert perplexity(model, ids, seqlen=16, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, ids, seqlen=16, limit=2) == pytest.approx(plain(model, ids[:32], 16), rel=1e-5)


def test_the_head_runs_on_few_rows_at_once(monkeypatch):
    # by name: the package has a function of that name
    monkeypatch.setattr(sys.modules["planish.eval.perplexity"], "LOGIT_ROWS", 8)
    model = tiny(LlamaConfig(**SIZES))
    ids = torch.randint(0, 64, (64,), generator=torch.Generator().manual_seed(2))
    rows = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[-2]))
    found = perplexity(model, ids, seqlen=32)
    hook.remove()
    assert max(rows) == 8 and found == pytest.approx(plain(model, ids, 32), rel=1e-5)


def test_leaves_the_model_without_gradients_or_cache():
    model = tiny(LlamaConfig(**SIZES))
    perplexity(model, torch.arange(32), seqlen=16)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refuses_what_it_cannot_measure():
    model = tiny(LlamaConfig(**SIZES))
    with pytest.raises(PlanishError, match="the text has 10 tokens, less than one window of 2048"):
        perplexity(model, torch.arange(10))
    with pytest.raises(PlanishError, match="no tokenizer in ''; pass tokenizer=, or token ids"):
        perplexity(model, "embedded-eval")


def test_bos_stands_before_the_text_once(tiny_llama, tmp_path):
    """GPTQ's protocol: BOS opens the first window, every other one begins a token earlier; none where none is added."""
    folder = tiny_llama(initializer_range=0.2)
    text = tmp_path / "text.txt"
    text.write_text("0123456789" * 5)
    model, tokenizer = planish.load(folder, device="cpu", dtype=torch.float32), tokenizer_of(planish.load(folder))
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])
    assert perplexity(model, str(text), seqlen=16, bos=True) == perplexity(model, ids, seqlen=16), "it adds none"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", pair="$A $B", special_tokens=[("<eos>", 256)]
    )
    assert tokenizer("0")["input_ids"][0] == 256 == tokenizer.bos_token_id
    found = perplexity(model, str(text), tokenizer=tokenizer, seqlen=16, bos=True)
    # 1e-5: the model computes in fp32, the formula in fp64
    assert found == pytest.approx(plain(model, torch.cat([torch.tensor([256]), ids]), 16), rel=1e-5)
    assert found != perplexity(model, str(text), tokenizer=tokenizer, seqlen=16)
