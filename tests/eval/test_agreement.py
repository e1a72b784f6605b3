"""Agreement against the plain formula; nothing between a model and itself; what it refuses."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from planish.errors import PlanishError
from planish.eval.agreement import _ratio, agreement, reference
from planish.eval.prompts import PROMPTS

CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<eos>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def pair(tiny_llama):
    """(float model, one that is a little off, tokenizer)"""
    folder = tiny_llama(initializer_range=0.3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model, other, tokenizer


@pytest.fixture
def chats(tmp_path):
    rows = [{"instruction": f"Say {word}", "output": word * 2} for word in ("anvil", "hammer", "tongs")]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "chats.jsonl"


def test_matches_the_formula(pair, chats):
    model, other, tokenizer = pair
    kls, same = [], []
    for row in map(json.loads, chats.read_text().splitlines()):
        prompt = tokenizer(f"<|user|>{row['instruction']}<eos><|assistant|>", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f"{row['output']}<eos>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (model, other))
        kls.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
    found = agreement(other, reference(model, chats, tokenizer=tokenizer), batch_size=2)
    assert (found.prompts, found.tokens) == (3, sum(map(len, kls)))
    assert found.kl == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4) and found.kl > 0.01
    assert found.top1 == pytest.approx(torch.cat(same).mean().item()) and 0 < found.top1 < 1
    sums, counts = torch.stack([kl.sum() for kl in kls]), torch.tensor([float(len(kl)) for kl in kls])
    spread = ((sums - found.kl * counts) ** 2).sum() * 3 / 2
    assert found.kl_stderr == pytest.approx(float(spread.sqrt() / counts.sum()), rel=1e-3)


def test_a_model_agrees_with_itself_on_answers_of_its_own(pair):
    model, _, tokenizer = pair
    said = reference(model, tokenizer=tokenizer, limit=4, new_tokens=5)
    found = agreement(model, said)
    # an end at once is an answer without a token, which is left out
    assert 1 <= found.prompts <= 4 and found.tokens <= 20
    assert found.kl == pytest.approx(0, abs=1e-6) and found.top1 == 1 and found.top1_stderr == 0


def test_the_standard_error_takes_prompts_as_the_sample():
    # equal lengths: the mean of the means, and their standard deviation over the root of their number
    mean, stderr = _ratio(torch.tensor([2.0, 4.0, 9.0]), torch.tensor([10.0, 10.0, 10.0]))
    values = torch.tensor([0.2, 0.4, 0.9])
    assert mean == pytest.approx(0.5) and stderr == pytest.approx(float(values.std() / 3**0.5))
    assert _ratio(torch.tensor([3.0]), torch.tensor([6.0])) == (0.5, 0.0)


def test_the_default_prompts_differ():
    assert len(set(PROMPTS)) == len(PROMPTS) == 32


def test_refusals(pair, chats, tmp_path):
    model, other, tokenizer = pair
    said = reference(model, chats, tokenizer=tokenizer)
    other.config.vocab_size = 300
    with pytest.raises(PlanishError, match="vocabulary of 300, the float one of 272"):
        agreement(other, said)
    with pytest.raises(PlanishError, match="the first 0 prompts are none"):
        reference(model, chats, tokenizer=tokenizer, limit=0)
    (tmp_path / "text.txt").write_text("no conversation")
    with pytest.raises(PlanishError, match="text.txt holds text, no conversations"):
        reference(model, tmp_path / "text.txt", tokenizer=tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(PlanishError, match="has no chat template"):
        reference(model, chats, tokenizer=tokenizer)
    model.config.name_or_path = ""
    with pytest.raises(PlanishError, match="no tokenizer in ''"):
        reference(model, chats)
