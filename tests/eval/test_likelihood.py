"""Likelihoods against one request after another; answers against transformers' own, one prompt after another."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from planish.eval.answers import answers
from planish.eval.batches import TOKENS, batches, padded
from planish.eval.likelihood import likelihoods, rows_of

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32,
         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip


def tiny(config=None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from uniform, so that a wrong token would show
    return model


def plain(model, context, answer):
    ids = torch.tensor([*context, *answer])[-33:]
    with torch.no_grad():
        chances = model(ids[None, :-1]).logits[0].double().log_softmax(-1)[-len(answer) :]
    wanted = torch.tensor(answer)
    return chances.gather(1, wanted[:, None]).sum().item(), bool((chances.argmax(-1) == wanted).all())


def some_requests(model):
    drawn = torch.Generator().manual_seed(1)
    lengths = [(3, 2), (20, 1), (1, 1), (7, 4), (40, 3)]  # the last is longer than the model's positions
    requests = [([int(i) for i in torch.randint(2, 64, (c,), generator=drawn)],
                 [int(i) for i in torch.randint(2, 64, (a,), generator=drawn)]) for c, a in lengths]  # fmt: skip
    requests += [(requests[1][0], [token]) for token in (2, 5, 9)]  # share a row with the second
    with torch.no_grad():
        best = int(model(torch.tensor([requests[0][0]])).logits[0, -1].argmax())
    return [*requests, (requests[0][0], [best])]


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Gemma2Config(**SIZES, final_logit_softcapping=0.5)],
                         ids=["plain head", "capped logits"])  # fmt: skip
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_matches_one_request_after_another(config, batch_size):
    model = tiny(config)
    requests = some_requests(model)
    found = likelihoods(model, requests, batch_size=batch_size)
    expected = [plain(model, *request) for request in requests]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[-1][1] and not found[0][1]
    assert likelihoods(model, []) == []


def test_answers_of_one_token_share_a_row():
    context = [3, 4, 5]
    rows = rows_of([(context, [7]), (context, [8]), (context, [7, 8]), ([9], [7])], longest=32)
    assert rows == {(3, 4, 5): [0, 1], (3, 4, 5, 7): [2], (9,): [3]}
    assert list(rows_of([(list(range(2, 12)), [1])], longest=4)) == [(8, 9, 10, 11)]


def test_batches_hold_about_as_many_tokens():
    lengths = [10, TOKENS["cpu"], 500, 600, 1, 5000]
    found = list(batches(lengths, torch.device("cpu")))
    assert found[:3] == [[5], [1], [3, 2, 0]] and sorted(sum(found, [])) == list(range(6))
    assert [len(batch) for batch in batches(lengths, torch.device("cpu"), 4)] == [4, 2]


def test_padding_lies_behind_or_before():
    ids, mask = padded([[5, 6], [7]])
    assert ids.tolist() == [[5, 6], [7, 0]] and mask.tolist() == [[1, 1], [1, 0]]
    ids, mask = padded([[5, 6], [7]], left=True, fill=9)
    assert ids.tolist() == [[5, 6], [9, 7]] and mask.tolist() == [[1, 1], [0, 1]]


def test_answers_are_those_of_one_prompt_at_a_time():
    model = tiny()
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [2, 3]]
    alone = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                             max_new_tokens=6)[0, len(prompt) :].tolist()  # fmt: skip
        alone.append(out[: out.index(1)] if 1 in out else out)
    assert answers(model, prompts, new_tokens=6) == alone
    assert answers(model, prompts, new_tokens=6, batch_size=3) == alone
    assert any(alone) and answers(model, [], new_tokens=6) == []
