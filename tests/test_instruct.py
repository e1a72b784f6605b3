"""Instruction data: exactly the answers and what ends them carry loss, whatever the template; nothing is cut unsaid."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from planish import data, instruct
from planish.errors import PlanishError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# marks its answers itself, the turn's end not among them
MARKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
# drops the reasoning of past turns, as templates of reasoning models do
FORGETTING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if not loop.last and '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# ends the whole, not each turn, by <eos>
ENDING = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
# of a multimodal model: sees parts only
PARTS = CHATML.replace(
    "message['content'] +",
    "(message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join) +",
)
THINKING = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + CHATML


@pytest.fixture
def tokenizer(tiny_llama) -> Any:
    """A token a byte, <eos> 256, <|im_start|> and <|im_end|> after it, ChatML."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(*contents: str) -> dict:
    """A row of messages: user, assistant, user, ..."""
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def answers(tokenizer: Any, ids: torch.Tensor, labels: torch.Tensor) -> list[str]:
    """The texts that carry loss, run by run."""
    assert ids.shape == labels.shape and ids.dtype == labels.dtype == torch.int64
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    runs: list[list[int]] = [[]]
    for label in labels.flatten().tolist():
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def label(tokenizer: Any, row: dict, tmp_path: Path) -> list[tuple[str, list[str]]]:
    """Of each piece of a row: its text, and its answers."""
    (conversation,) = data.documents(write(tmp_path / "row.jsonl", [row]))
    pieces = instruct.label(data.Chat(tokenizer, "row.jsonl"), conversation)
    tensors = [(torch.tensor(ids), torch.tensor(labels)) for ids, labels in pieces]
    return [(tokenizer.decode(ids), answers(tokenizer, ids, labels)) for ids, labels in tensors]


def test_answers_carry_loss_with_the_end_of_their_turn(tokenizer, tmp_path):
    ((text, found),) = label(tokenizer, turns("one?", "1\n", "two?", "2 é", "thanks"), tmp_path)
    assert text == (
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n1\n<|im_end|>\n"
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n2 é<|im_end|>\n<|im_start|>user\nthanks<|im_end|>\n"
    )
    assert found == ["1\n<|im_end|>", "2 é<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        (
            MARKING,
            [
                (
                    "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
                    "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n",
                    ["b", "d"],
                )
            ],
        ),
        (
            PARTS,
            [
                (
                    "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
                    "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n",
                    ["b<|im_end|>", "d<|im_end|>"],
                )
            ],
        ),
        (
            ENDING,
            [
                ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<eos>", ["b<|im_end|>\n<eos>"]),
                (
                    "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
                    "<|im_start|>assistant\nd<|im_end|>\n<eos>",
                    ["d<|im_end|>\n<eos>"],
                ),
            ],
        ),
    ],
)
def test_templates_of_other_habits(tokenizer, tmp_path, template, pieces):
    tokenizer.chat_template = template
    assert label(tokenizer, turns("a", "b", "c", "d"), tmp_path) == pieces


def test_templates_that_forget_reasoning_give_a_piece_for_each_answer(tokenizer, tmp_path):
    tokenizer.chat_template = FORGETTING
    first, second = label(tokenizer, turns("a", "<think>hm</think>b", "c", "<think>so</think>d"), tmp_path)
    assert first[1] == ["<think>hm</think>b<|im_end|>"] and second[1] == ["<think>so</think>d<|im_end|>"]
    assert "hm" in first[0] and "hm" not in second[0] and "assistant\nb<|im_end|>" in second[0]


def test_an_answer_to_nothing_carries_no_loss(tokenizer, tmp_path):
    row = {
        "conversations": [
            {"from": "gpt", "value": "hello"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ]
    }
    ((text, found),) = label(tokenizer, row, tmp_path)
    assert text.startswith("<|im_start|>assistant\nhello") and found == ["a<|im_end|>"]


def test_whole_conversations_are_packed_in_a_shuffled_order_and_padded(tokenizer, tmp_path):
    rows = [turns(f"question {i}", f"answer {i}") for i in range(10, 40)]
    path = write(tmp_path / "rows.jsonl", rows)
    one = len(tokenizer.apply_chat_template(rows[0]["messages"])["input_ids"])
    got = instruct.examples(tokenizer, path, 4, 3 * one + 7, seed=1)
    assert got.ids.shape == got.labels.shape == (4, 3 * one + 7) and got.note == ""
    assert torch.equal(got.ids[:, -7:], torch.full((4, 7), tokenizer.eos_token_id))
    assert torch.equal(got.labels[:, -7:], torch.full((4, 7), -100))
    found = answers(tokenizer, got.ids, got.labels)
    assert len(set(found)) == len(found) == 12 and found != sorted(found)
    assert set(found) <= {f"answer {i}<|im_end|>" for i in range(10, 40)}
    for text in tokenizer.batch_decode(got.ids):
        assert text.count("<|im_start|>user\nquestion") == 3 and text.count("<|im_end|>\n") == 6
    assert torch.equal(got.ids, instruct.examples(tokenizer, path, 4, 3 * one + 7, seed=1).ids)
    assert not torch.equal(got.ids, instruct.examples(tokenizer, path, 4, 3 * one + 7, seed=2).ids)


def test_what_is_cut_and_left_out_is_said(tokenizer, tmp_path):
    rows = [turns("q" * 20, "a" * 100), turns("q" * 100, "a"), turns("no answer"), turns("q", "a")]
    path = write(tmp_path / "rows.jsonl", rows)
    got = instruct.examples(tokenizer, path, 8, 80)
    assert got.note == (
        f"conversations of {path}: 1 longer than 80 tokens are cut; 2 without an answer in their first 80 tokens are "
        f"left out; they fill 2 windows of 80 tokens, not 8: using 2"
    )
    cut, whole = sorted(answers(tokenizer, got.ids, got.labels), key=len, reverse=True)
    assert set(cut) == {"a"} and 20 < len(cut) < 80 and whole == "a<|im_end|>"


def test_small_pieces_fill_earlier_windows():
    pieces = [([number] * length, [number] * length) for number, length in enumerate((60, 70, 30, 20, 90, 20))]
    filled = instruct._fill(iter(pieces), 3, 100)
    assert [sorted(set(ids)) for ids, _ in filled] == [[0, 2], [1, 3], [4]]
    assert all(ids == labels and len(ids) == 90 for ids, labels in filled)


def test_text_carries_loss_everywhere(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "x" * 100}])
    got = instruct.load_examples(tokenizer, path, 8, 32)
    assert got.note == f"{path} holds 3 windows of 32 tokens, not 8: using 3"
    assert got.ids.shape == (3, 32) and torch.equal(got.ids, got.labels) and got.ids is not got.labels
    ready = torch.arange(64).view(2, 32)
    assert torch.equal(instruct.load_examples(tokenizer, ready, 2, 32).labels, ready)


def test_the_source_decides(tokenizer, tmp_path):
    alpaca = {"instruction": "q", "input": "", "output": "a", "text": "Below is an instruction." * 4}
    path = write(tmp_path / "alpaca.jsonl", [alpaca])
    got = instruct.load_examples(tokenizer, path, 1, 64)
    assert answers(tokenizer, got.ids, got.labels) == ["a<|im_end|>"]
    named = instruct.load_examples(tokenizer, f"{path}#text", 1, 64)
    assert torch.equal(named.ids, named.labels) and tokenizer.decode(named.ids[0]).startswith("Below is")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([turns("a question alone")], "rows.jsonl holds no answer to a question: this would be a loss over nothing"),
        ([turns("q" * 64, "a")], "no answer within the first 32 tokens of a conversation: .* give a larger --seqlen"),
        ([{"text": "plain"}], "rows.jsonl holds text, no conversations; rows of them have messages"),
        ([], "rows.jsonl holds no answer"),
    ],
)
def test_loss_over_nothing(tokenizer, tmp_path, rows, message):
    with pytest.raises(PlanishError, match=message):
        instruct.examples(tokenizer, write(tmp_path / "rows.jsonl", rows), 4, 32)


def test_bad_rows_are_found_before_any_is_rendered(tokenizer, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [turns("q", "a")] * 3 + [{"instruction": "q", "output": "a"}])
    with pytest.raises(PlanishError, match=r"rows.jsonl line 4 has no turns in 'messages' \(it has: instruction"):
        instruct.examples(tokenizer, rows, 1, 32)
    with pytest.raises(PlanishError, match="0 samples of 32 tokens"):
        instruct.load_examples(tokenizer, rows, 0, 32)


def test_templates_that_cannot_be_used(tokenizer, tmp_path):
    system = {"messages": [{"role": "system", "content": "s"}, *turns("q", "a")["messages"]]}
    path = write(tmp_path / "rows.jsonl", [system])
    for template, message in [
        (None, "rows.jsonl holds conversations, and .*tiny has no chat template: put the chat_template.jinja"),
        (STRICT, "rows.jsonl line 1: the chat template of .*tiny refuses it: no system turn here"),
        (THINKING, "rows.jsonl line 1: the chat template of .*tiny renders an answer otherwise than after its gen"),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(PlanishError, match=message):
            instruct.load_examples(tokenizer, path, 1, 64)


def test_the_real_template(smollm2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    row = turns("What is 2 + 2?", "4", "And\n", "\nmore?  ")
    ((text, found),) = label(tokenizer, row, tmp_path)
    assert text == tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert found == ["4<|im_end|>", "\nmore?  <|im_end|>"]
    ((text, found),) = label(tokenizer, {"instruction": "Add.", "input": "1 and 2", "output": "3"}, tmp_path)
    assert "<|im_start|>user\nAdd.\n\n1 and 2<|im_end|>" in text and found == ["3<|im_end|>"]


def test_a_token_over_the_border_belongs_to_the_answer(smollm2, tmp_path):
    # its tokenizer joins the blank that ends the prompt with the answer's first word
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ {'user': 'Q: ', 'assistant': 'A: '}[message['role']] + message['content'] }}"
        "{{ '\n' if message['role'] == 'user' else '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    ((text, found),) = label(tokenizer, turns("Capital of France?", "Paris", "Thanks", "Welcome"), tmp_path)
    assert text == "Q: Capital of France?\nA: Paris<|im_end|>\nQ: Thanks\nA: Welcome<|im_end|>\n"
    assert found == [" Paris<|im_end|>", " Welcome<|im_end|>"]
