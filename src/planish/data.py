"""Data: a source becomes documents, documents become token ids, token ids become windows of equal length.

    source:    embedded | embedded-eval | FILE | FILE.jsonl[#field] | FILE.json[#field]
               | HUB-NAME[:config][@split][#field]
    document:  a text, or a conversation; the first row of a source decides for all of them
    tokens:    texts in order, joined by blank lines: packed, so that short ones aren't lost;
               conversations rendered by the tokenizer's chat template, end to end
    windows:   the tokens cut into non-overlapping pieces of seqlen, shuffled by a seed, the first n

A row is a conversation if it has messages (role, content), conversations (from, value: ShareGPT), instruction
and output (alpaca), prompt and completion or response, or question and answer; else it has a text. Fewer
windows than asked for are used, and said so, rather than overlapping ones. No token is added (no BOS but the
template's own). A `.raw` file is read as the field reads WikiText (see `join_rows`), so that perplexities
compare with published ones. Which tokens carry loss is `planish.instruct`'s; of models this file knows nothing.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish import embedded
from planish.errors import PlanishError, first_line

_HUB = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)"
    r"(?::(?P<config>[^@#]+))?(?:@(?P<split>[^#]+))?(?:#(?P<field>.+))?"
)

# a hub data set may be endless, and parsing all of the embedded text is a good part of a run that trains nothing: read
# this many times the characters asked for, so that the seed has a choice
CHOICE = 4
_CHARACTERS_A_TOKEN = 4

# the names that data sets give to who speaks
_ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "tool_response", "observation"), "tool"),
}
_LISTS = ("messages", "conversations")
_PAIRS = (
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)


@dataclass(frozen=True)
class Conversation:
    """Turns {"role", "content", ...} in order, at least one; `where` names the row for messages to the user."""

    messages: list[dict[str, Any]]
    where: str


Row = dict[str, Any]
Document = str | Conversation


class Chat:
    """A tokenizer's chat template: what makes a conversation one text. `special` are the ids of its control tokens.

    Args:
        tokenizer: of transformers.
        source: what is to be rendered, named if it can't be.

    Raises:
        PlanishError: if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, source: str | Path) -> None:
        self.tokenizer = tokenizer
        self.name = str(getattr(tokenizer, "name_or_path", "")) or "the tokenizer"
        try:
            self.template: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise PlanishError(
                f"{source} holds conversations, and {self.name} has no chat template: put the chat_template.jinja of "
                f"an instruction-tuned sibling into its folder, or name a field of plain text as SOURCE#FIELD"
            ) from error
        self.special = frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
        # templates of multimodal models see nothing in a plain string: they want a list of parts
        self._parts = not self._shows("planish") and self._shows([{"type": "text", "text": "planish"}])

    def render(self, conversation: Conversation, turns: int | None = None, **settings: Any) -> Any:
        """Text of the first `turns` turns (of all), or what `settings` ask of `apply_chat_template`.

        Raises:
            PlanishError: if the template refuses the conversation; both are named.
        """
        messages = conversation.messages[:turns]
        if self._parts:
            messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        try:
            return self.tokenizer.apply_chat_template(messages, **{"tokenize": False, **settings})
        except Exception as error:
            # a template is a program: it raises what it likes
            said = first_line(error)
            raise PlanishError(f"{conversation.where}: the chat template of {self.name} refuses it: {said}") from error

    def _shows(self, content: Any) -> bool:
        try:
            probe = [{"role": "user", "content": content}]
            return "planish" in self.tokenizer.apply_chat_template(probe, tokenize=False)
        except Exception:
            return False


def tokens(tokenizer: Any, source: str | Path, *, at_most: int | None = None) -> Tensor:
    """Token ids of a source, without special tokens but those of the chat template.

    Args:
        tokenizer: of transformers.
        source: see the top of this file.
        at_most: stop reading a hub data set or the embedded text at about this many tokens; files are always read
            whole.

    Returns:
        int64 [n].

    Raises:
        PlanishError: if there is no such source, it holds no text, or the tokenizer can't render its conversations.
    """
    found = list(documents(source, at_most))
    conversations = [document for document in found if isinstance(document, Conversation)]
    if conversations:
        chat = Chat(tokenizer, source)
        ids = [token for conversation in conversations for token in encode(tokenizer, chat.render(conversation))]
    else:
        text = "\n\n".join(document for document in found if isinstance(document, str))
        if not text.strip():
            raise PlanishError(f"{source} holds no text")
        ids = encode(tokenizer, text)
    return torch.tensor(ids, dtype=torch.int64)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, none added."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def windows(
    tokenizer: Any, source: str | Path | Tensor, samples: int, seqlen: int, seed: int = 0, *, brief: bool = False
) -> tuple[Tensor, str]:
    """Windows to calibrate on, and a note for the user ("" if there is nothing to say).

    Args:
        tokenizer: of transformers; unused if source is a tensor.
        source: text or conversations, or windows that are ready: int64 [n, seqlen], of which the first
            `samples` are taken.
        samples: how many windows, fewer if the text is shorter.
        seqlen: tokens of a window.
        seed: of the shuffle.
        brief: parse no more of the embedded text than that takes; what is trained on it needs its variety.

    Returns:
        int64 [n, seqlen], n <= samples, and the note.

    Raises:
        PlanishError: if not even one window can be had.
    """
    check_size(samples, seqlen)
    if isinstance(source, Tensor):
        cut, name = _checked(source, seqlen), "the given tensor"
    else:
        whole = str(source) == "embedded" and not brief
        ids = tokens(tokenizer, source, at_most=None if whole else samples * seqlen * CHOICE)
        cut, name = split(ids, seqlen, str(source)), str(source)
        order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))
        cut = cut[order]
    note = ""
    if len(cut) < samples:
        note = f"{name} holds {len(cut)} windows of {seqlen} tokens, not {samples}: using {len(cut)}"
    return cut[:samples], note


def split(ids: Tensor, seqlen: int, name: str = "the text") -> Tensor:
    """Token ids [n] -> non-overlapping windows [n // seqlen, seqlen] in order; the rest is left out.

    Raises:
        PlanishError: if the ids are shorter than one window.
    """
    if len(ids) < seqlen:
        raise PlanishError(
            f"{name} has {len(ids)} tokens, less than one window of {seqlen}; give a longer text or a smaller --seqlen"
        )
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)


def check_size(samples: int, seqlen: int) -> None:
    """Raises PlanishError if there is nothing to choose: no sample, or none that predicts a token."""
    if samples < 1 or seqlen < 2:
        raise PlanishError(f"{samples} samples of {seqlen} tokens; at least 1 sample of 2 tokens is needed")


def check_seqlen(config: Any, seqlen: int) -> None:
    """Raises PlanishError if windows are longer than the model's positions.

    Args:
        config: of transformers; of a multimodal model, its text part counts. One that names no longest
            sequence (recurrent models, ALiBi) has none.
        seqlen: tokens of a window.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and seqlen > limit:
        raise PlanishError(f"seqlen {seqlen} is above the model's max_position_embeddings; give at most {limit}")


def sha256(ids: Tensor) -> str:
    """Hash of token ids, whatever their shape; what run.json records of the data."""
    return hashlib.sha256(ids.to(torch.int64).cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def documents(source: str | Path, at_most: int | None = None) -> Iterator[Document]:
    """What a source holds, in order, all texts or all conversations.

    Args:
        source: see the top of this file.
        at_most: stop reading a hub data set or the embedded text at about this many tokens.

    Raises:
        PlanishError: if there is no such source; while reading, if a row is malformed: by file and line.
    """
    name = str(source)
    if name == "embedded":
        return iter(embedded.calibration(at_most and at_most * _CHARACTERS_A_TOKEN))
    if name == "embedded-eval":
        return iter(embedded.evaluation())
    path, _, field = name.partition("#")
    if Path(path).is_file():
        return _file(Path(path), field)
    if Path(path).is_dir():
        raise PlanishError(f"{path} is a folder; give one text file, .jsonl file or hub data set")
    if Path(path).suffix in (".txt", ".raw", ".jsonl", ".json", ".md") or path.startswith((".", "/", "~")):
        raise PlanishError(f"no such file: {path}")
    return _hub(name, at_most)


def holds_conversations(source: str | Path) -> bool:
    """Whether the first row of a source is a conversation; reads no further than that row.

    Raises:
        PlanishError: as `documents`.
    """
    return isinstance(next(documents(source, at_most=1), ""), Conversation)


def join_rows(text: str) -> str:
    """WikiText's raw file as the field reads it: each line a row, blank rows empty, joined by blank lines."""
    rows = text.removesuffix("\n").split("\n")
    return "\n\n".join(f"{row}\n" if row.strip() else "" for row in rows)


def _checked(ready: Tensor, seqlen: int) -> Tensor:
    if ready.dim() != 2 or ready.shape[1] != seqlen or len(ready) == 0 or ready.is_floating_point():
        raise PlanishError(f"ready windows are {ready.dtype} {list(ready.shape)}, not int64 [n, {seqlen}]")
    return ready.to(torch.int64)


def _file(path: Path, field: str) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise PlanishError(f"{path} can't be read as UTF-8 text: {error}") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _read(_json_array(path, text), field)
    if path.suffix in (".jsonl", ".json"):
        return _read(_json_lines(path, text), field)
    return iter([join_rows(text) if path.suffix == ".raw" else text])


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # not splitlines(): JSON strings may hold U+2028 and the like
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path} line {number}", json.loads(line)
        except ValueError as error:
            raise PlanishError(f"{path} line {number} isn't JSON: {error}") from error


def _json_array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise PlanishError(f"{path} isn't JSON: {error}") from error
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


def _read(rows: Iterable[tuple[str, Any]], field: str) -> Iterator[Document]:
    """Rows, each with its place, to documents of the first row's shape."""
    reader = None
    for where, row in rows:
        if not isinstance(row, dict):
            raise PlanishError(f"{where} is {type(row).__name__}, not an object with named fields")
        reader = reader or _reader(row, field)
        yield reader(row, where)


def _reader(first: Row, field: str) -> Callable[[Row, str], Document]:
    if field:
        return partial(_turns if isinstance(first.get(field), list) else _text, field=field)
    for name in _LISTS:
        if name in first:
            return partial(_turns, field=name)
    for question, answer in _PAIRS:
        if question in first and answer in first:
            return partial(_pair, question=question, answer=answer)
    return partial(_text, field="text")


def _text(row: Row, where: str, field: str) -> str:
    if not isinstance(row.get(field), str):
        has = ", ".join(sorted(row))
        raise PlanishError(f"{where} has no text {field!r} (it has: {has}); name another one as SOURCE#FIELD")
    return row[field]


def _turns(row: Row, where: str, field: str) -> Conversation:
    turns = row.get(field)
    if not isinstance(turns, list) or not turns:
        raise PlanishError(f"{where} has no turns in {field!r} (it has: {', '.join(sorted(row))})")
    return Conversation(_system(row) + [_turn(turn, where) for turn in turns], where)


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """One turn by the names that chat templates know; what else it has (tool calls, reasoning) is kept."""
    if not isinstance(turn, dict):
        raise PlanishError(f"{where} has a turn that is {type(turn).__name__}, not role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise PlanishError(f"{where} has a turn of role {role!r}; there is: {', '.join(_ROLES)}")
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise PlanishError(f"{where} has a turn of {role!r} whose content is {type(content).__name__}, not text")
    known = ("role", "from", "content", "value")
    rest = {key: value for key, value in turn.items() if key not in known and value is not None}
    return {"role": _ROLES[role.lower()], "content": content, **rest}


def _pair(row: Row, where: str, question: str, answer: str) -> Conversation:
    asked, answered = _text(row, where, question), _text(row, where, answer)
    if question == "instruction" and row.get("input"):
        asked += "\n\n" + _text(row, where, "input")
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return Conversation(_system(row) + turns, where)


def _system(row: Row) -> list[dict[str, Any]]:
    """Some data sets keep the system's turn beside the others."""
    said = row.get("system")
    return [{"role": "system", "content": said}] if isinstance(said, str) and said else []


def _hub(name: str, at_most: int | None) -> Iterator[Document]:
    match = _HUB.fullmatch(name)
    if match is None:
        raise PlanishError(f"no such file, and no name of a data set: {name}")
    try:
        import datasets
    except ImportError as error:
        mend = "to read it as a data set of the hub: pip install 'planish[hub]'"
        raise PlanishError(f"no such file: {name}; {mend}") from error
    split_name = match["split"] or "train"
    try:
        rows = iter(datasets.load_dataset(match["name"], match["config"], split=split_name, streaming=True))
        first = next(rows)
    except StopIteration:
        return iter(())
    except Exception as error:
        # the library raises a dozen kinds for a missing name, config, split or network
        raise PlanishError(f"{name} is no file, and no data set that the hub gives: {first_line(error)}") from error
    placed = ((f"{name} row {number}", row) for number, row in enumerate(chain([first], rows), 1))
    return _first_characters(_read(placed, match["field"] or ""), at_most)


def _first_characters(found: Iterable[Document], at_most: int | None) -> Iterator[Document]:
    left = None if at_most is None else at_most * _CHARACTERS_A_TOKEN
    for document in found:
        yield document
        if isinstance(document, Conversation):
            length = sum(len(turn["content"]) for turn in document.messages)
        else:
            length = len(document)
        if left is not None and (left := left - length) <= 0:
            return
