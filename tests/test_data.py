"""Text to tokens to windows: nothing dropped, nothing overlapping, nothing silent, every refusal by name."""

import builtins
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlavaConfig, MambaConfig, PreTrainedTokenizerFast

from planish import data, embedded
from planish.errors import PlanishError

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}[end]\n{% endfor %}"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_short_documents_are_packed_not_dropped(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "three"}])
    assert tokenizer.decode(data.tokens(tokenizer, path)) == "one\n\ntwo\n\nthree"


def test_jsonl_field_by_name_and_unusual_line_ends(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"body": "a\u2028b"}, {"body": "c"}])
    assert tokenizer.decode(data.tokens(tokenizer, f"{path}#body")) == "a\u2028b\n\nc"


def test_windows_do_not_overlap_and_follow_the_seed(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(32 + i % 90 for i in range(1000)))
    ids = data.tokens(tokenizer, path)
    everything, note = data.windows(tokenizer, path, 62, 16, seed=3)
    assert note == "" and everything.shape == (62, 16) and everything.dtype == torch.int64
    in_order = ids[: 62 * 16].view(62, 16)
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, in_order.tolist()))
    assert not torch.equal(everything, in_order)
    assert torch.equal(everything, data.windows(tokenizer, path, 62, 16, seed=3)[0])
    assert not torch.equal(everything, data.windows(tokenizer, path, 62, 16, seed=4)[0])
    assert torch.equal(everything[:5], data.windows(tokenizer, path, 5, 16, seed=3)[0])


def test_fewer_windows_are_used_and_said(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("x" * 100)
    got, note = data.windows(tokenizer, path, 128, 32)
    assert got.shape == (3, 32)
    assert note == f"{path} holds 3 windows of 32 tokens, not 128: using 3"


def test_ready_windows_pass_through(tokenizer):
    ready = torch.arange(40).view(5, 8)
    got, note = data.windows(None, ready, 3, 8)
    assert torch.equal(got, ready[:3]) and note == ""
    _, note = data.windows(None, ready, 9, 8)
    assert note == "the given tensor holds 5 windows of 8 tokens, not 9: using 5"
    with pytest.raises(PlanishError, match=r"torch.int64 \[5, 8\], not int64 \[n, 16\]"):
        data.windows(None, ready, 3, 16)
    with pytest.raises(PlanishError, match="torch.float32"):
        data.windows(None, ready.float(), 3, 8)


def test_hash_is_of_the_ids_alone():
    ids = torch.arange(12)
    assert data.sha256(ids) == data.sha256(ids.view(3, 4)) == data.sha256(ids.to(torch.int32))
    assert data.sha256(ids) != data.sha256(ids + 1)


def test_rows_of_raw_files_are_joined(tmp_path, tokenizer):
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = Title = \n \n A line . \n")
    assert data.join_rows(path.read_text()) == "\n\n = Title = \n\n\n\n\n A line . \n"
    assert tokenizer.decode(data.tokens(tokenizer, path)) == "\n\n = Title = \n\n\n\n\n A line . \n"


@pytest.mark.shared
def test_wikitext_protocol(smollm2):
    path = SHARED / "data/wikitext2/wiki.test.raw"
    if not path.is_file():
        pytest.skip("no WikiText-2 beside the repository")
    (text,) = data.documents(path)
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert text == "\n\n".join(row if row.strip() else "" for row in rows)
    assert len(text) == 1_294_336
    ids = data.tokens(AutoTokenizer.from_pretrained(smollm2), path)
    assert len(ids) == 304_978 and len(data.split(ids, 2048)) == 148


def test_embedded_texts_suffice_and_are_disjoint():
    assert list(embedded.MODULES) == sorted(set(embedded.MODULES))
    calibration, evaluation = "\n".join(embedded.calibration()), "\n".join(embedded.evaluation())
    # a byte-level BPE has at most some 5 characters a token on such prose
    assert len(calibration) > 5 * 128 * 512 and len(evaluation) > 5 * 32 * 512
    read = set(evaluation.split("\n"))
    assert [line for line in calibration.split("\n") if len(line) > 40 and line in read] == []


def test_embedded_text_is_parsed_as_far_as_needed(tokenizer):
    whole, part = embedded.calibration(), embedded.calibration(50_000)
    assert 50_000 <= sum(map(len, part)) < 150_000 and len(part) >= 5
    assert [document for document in whole if document in part] == part
    assert embedded.calibration(10**9) == whole
    all_of_it, _ = data.windows(tokenizer, "embedded", 16, 512)
    windows, note = data.windows(tokenizer, "embedded", 16, 512, brief=True)
    assert windows.shape == (16, 512) and note == "" and not torch.equal(windows, all_of_it)
    cut = data.split(data.tokens(tokenizer, "embedded"), 512)
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))
    assert torch.equal(all_of_it, cut[order][:16]), "without it, of all that there is"


def test_hub_data_sets_are_read_as_far_as_needed(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked, read = [], []

    def rows():
        for number in range(10_000):
            read.append(number)
            yield {"body": "0123456789"}

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got, note = data.windows(tokenizer, "someone/corpus:en@train[:1%]#body", 4, 25)
    assert asked == [("someone/corpus", "en", "train[:1%]", True)]
    assert got.shape == (4, 25) and note == "" and 100 < len(read) < 1000


def refuse_datasets(name, *args, **kwargs):
    if name == "datasets":
        raise ImportError(name)
    return real_import(name, *args, **kwargs)


real_import = builtins.__import__


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "no such file: missing.txt"),
        ("./missing", "no such file: ./missing"),
        ("wikitext", r"no such file: wikitext; .* pip install 'planish\[hub\]'"),
        ("what is this?", r"no such file, and no name of a data set: what is this\?"),
    ],
)
def test_sources_that_are_not_there(tokenizer, monkeypatch, source, message):
    monkeypatch.setattr(builtins, "__import__", refuse_datasets)
    with pytest.raises(PlanishError, match=message):
        data.tokens(tokenizer, source)


def test_texts_that_cannot_be_used(tmp_path, tokenizer):
    short, empty, latin = tmp_path / "short.txt", tmp_path / "empty.txt", tmp_path / "latin.txt"
    short.write_text("too short")
    empty.write_text(" \n")
    latin.write_bytes(b"caf\xe9")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"body": "x"}])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": ')
    for source, message in [
        (short, "short.txt has 9 tokens, less than one window of 32; give a longer text"),
        (empty, "holds no text"),
        (latin, "can't be read as UTF-8"),
        (rows, r"rows.jsonl line 1 has no text 'text' \(it has: body\)"),
        (broken, "broken.jsonl line 2 isn't JSON"),
        (tmp_path, "is a folder"),
    ]:
        with pytest.raises(PlanishError, match=message):
            data.windows(tokenizer, source, 4, 32)
    with pytest.raises(PlanishError, match="0 samples of 32 tokens"):
        data.windows(tokenizer, short, 0, 32)


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": messages(("user", "q"), ("assistant", "a"))}, [("user", "q"), ("assistant", "a")]),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]},
            [("system", "s"), ("user", "q")],
        ),
        (
            {"conversations": [{"from": name, "value": "v"} for name in ("user", "gpt", "chatgpt", "Bard", "tool")]},
            [("user", "v"), ("assistant", "v"), ("assistant", "v"), ("assistant", "v"), ("tool", "v")],
        ),
        ({"instruction": "q", "output": "a", "text": "t"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": "i", "output": "a"}, [("user", "q\n\ni"), ("assistant", "a")]),
        ({"instruction": "q", "input": "", "output": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"prompt": "q", "completion": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"prompt": "q", "response": "a", "system": "s"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
    ],
)
def test_shapes_of_conversations(tmp_path, row, wanted):
    path = write_jsonl(tmp_path / "rows.jsonl", [row, row])
    first, second = data.documents(path)
    assert [(turn["role"], turn["content"]) for turn in first.messages] == wanted
    assert first.messages == second.messages and second.where == f"{path} line 2"
    assert data.holds_conversations(path)


def test_a_field_of_another_name_and_what_turns_have_besides(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": "no", "chosen": [*messages(("user", "q")), call]}])
    ((_, answer),) = [document.messages for document in data.documents(f"{path}#chosen")]
    assert answer == {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}


def test_json_arrays_and_json_lines_of_that_name(tmp_path):
    rows = [{"instruction": "q", "output": f"a{i}"} for i in range(3)]
    array = tmp_path / "array.json"
    array.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    lines = write_jsonl(tmp_path / "lines.json", rows)
    found = list(data.documents(array))
    assert [document.messages for document in found] == [document.messages for document in data.documents(lines)]
    assert found[2].where == f"{array} row 3" and found[2].messages[1]["content"] == "a2"


def test_plain_text_is_no_conversation(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("x")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "x"}, {"what": "is never read"}])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    assert [data.holds_conversations(source) for source in (text, rows, empty, "embedded")] == [False] * 4


def test_conversations_are_rendered_and_packed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(9)])
    one = len("[user]q0[end]\n[assistant]a0[end]\n")
    ids = data.tokens(tokenizer, path)
    text = tokenizer.decode(ids)
    assert text == "".join(f"[user]q{i}[end]\n[assistant]a{i}[end]\n" for i in range(9))
    cut, note = data.windows(tokenizer, path, 4, 2 * one, seed=1)
    assert cut.shape == (4, 2 * one) and note == ""
    assert sorted(tokenizer.batch_decode(cut)) == [text[at : at + 2 * one] for at in range(0, 8 * one, 2 * one)]


def test_templates_of_multimodal_models_get_parts(tmp_path, tokenizer, monkeypatch):
    parts = TEMPLATE.replace("message['content']", "message['content'][0]['text']")
    monkeypatch.setattr(tokenizer, "chat_template", parts)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "quiz", "completion": "ok"}])
    assert tokenizer.decode(data.tokens(tokenizer, path)) == "[user]quiz[end]\n[assistant]ok[end]\n"


def test_hub_data_sets_of_conversations(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    read = []

    def rows():
        for number in range(10_000):
            read.append(number)
            yield {"messages": messages(("user", "01234"), ("assistant", "56789"))}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows())
    assert data.holds_conversations("someone/chats") and len(read) == 1
    got, note = data.windows(tokenizer, "someone/chats", 4, 25)
    assert got.shape == (4, 25) and note == "" and 100 < len(read) < 1000
    (first, *_) = data.documents("someone/chats")
    assert first.where == "someone/chats row 1"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["text"], "rows.jsonl line 1 is str, not an object with named fields"),
        ([{"messages": []}], r"line 1 has no turns in 'messages' \(it has: messages\)"),
        ([{"messages": messages(("user", "q"))}, {"text": "t"}], r"line 2 has no turns in 'messages' \(it has: text\)"),
        ([{"messages": ["q"]}], "line 1 has a turn that is str, not role and content"),
        (
            [{"conversations": [{"from": "narrator", "value": "v"}]}],
            "line 1 has a turn of role 'narrator'; there is: sy",
        ),
        ([{"messages": [{"role": "user"}]}], "line 1 has a turn of 'user' whose content is NoneType, not text"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "'user' whose content is list, not text"),
        ([{"prompt": "q", "completion": 7}], r"line 1 has no text 'completion' \(it has: completion, prompt\)"),
        (
            [{"instruction": "q", "output": "a"}, {"instruction": "q"}],
            r"line 2 has no text 'output' \(it has: instruct",
        ),
        ([{"instruction": "q", "input": 3, "output": "a"}], "line 1 has no text 'input'"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, tokenizer, rows, message):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(PlanishError, match=message):
        data.tokens(tokenizer, path)


def test_json_arrays_that_cannot_be_used(tmp_path, tokenizer):
    broken = tmp_path / "broken.json"
    broken.write_text('[{"prompt": "q"')
    with pytest.raises(PlanishError, match="broken.json isn't JSON: .* line 1"):
        data.tokens(tokenizer, broken)
    broken.write_text('{\n"prompt": "q"\n}')
    with pytest.raises(PlanishError, match="broken.json line 1 isn't JSON"):
        data.tokens(tokenizer, broken)


def test_conversations_need_a_chat_template(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(
        PlanishError, match="rows.jsonl holds conversations, and the tokenizer has no chat template: put"
    ):
        data.windows(tokenizer, path, 4, 8)
    assert tokenizer.decode(data.tokens(tokenizer, f"{path}#completion")) == "a"
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('not today') }}")
    with pytest.raises(
        PlanishError, match="rows.jsonl line 1: the chat template of the tokenizer refuses it: not today"
    ):
        data.windows(tokenizer, path, 4, 8)


def test_windows_fit_the_models_positions():
    text = LlamaConfig(max_position_embeddings=64)
    for config in (text, LlavaConfig(text_config=text)):
        data.check_seqlen(config, 64)
        with pytest.raises(
            PlanishError, match="seqlen 65 is above the model's max_position_embeddings; give at most 64"
        ):
            data.check_seqlen(config, 65)
    data.check_seqlen(MambaConfig(), 1_000_000)
