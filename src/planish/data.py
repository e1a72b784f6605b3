"""Data: a text becomes token ids, token ids become windows of equal length.

    source:   embedded | embedded-eval | FILE | FILE.jsonl[#field] | HUB-NAME[:config][@split][#field]
    tokens:   every document, in order, joined by blank lines: packed, so that short ones aren't lost
    windows:  the tokens cut into non-overlapping pieces of seqlen, shuffled by a seed, the first n

Fewer windows than asked for are used, and said so, rather than overlapping ones. No token is added to the
text (no BOS). A `.raw` file is read as the field reads WikiText (see `join_rows`), so that perplexities
compare with published ones. This file knows nothing of models.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish import embedded
from planish.errors import PlanishError

_HUB = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)"
    r"(?::(?P<config>[^@#]+))?(?:@(?P<split>[^#]+))?(?:#(?P<field>.+))?"
)

# a hub data set may be endless: read this many times the characters asked for, so that the seed has a choice
_HUB_CHOICE = 4
_CHARACTERS_A_TOKEN = 4


def tokens(tokenizer: Any, source: str | Path, *, at_most: int | None = None) -> Tensor:
    """Token ids of a text, without special tokens.

    Args:
        tokenizer: of transformers.
        source: see the top of this file.
        at_most: stop reading a hub data set at about this many tokens; local texts are always read whole.

    Returns:
        int64 [n].

    Raises:
        PlanishError: if there is no such source, or it holds no text.
    """
    text = "\n\n".join(documents(source, at_most))
    if not text.strip():
        raise PlanishError(f"{source} holds no text")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def windows(
    tokenizer: Any, source: str | Path | Tensor, samples: int, seqlen: int, seed: int = 0
) -> tuple[Tensor, str]:
    """Windows to calibrate on, and a note for the user ("" if there is nothing to say).

    Args:
        tokenizer: of transformers; unused if source is a tensor.
        source: a text, or windows that are ready: int64 [n, seqlen], of which the first `samples` are taken.
        samples: how many windows, fewer if the text is shorter.
        seqlen: tokens of a window.
        seed: of the shuffle.

    Returns:
        int64 [n, seqlen], n <= samples, and the note.

    Raises:
        PlanishError: if not even one window can be had.
    """
    if samples < 1 or seqlen < 2:
        raise PlanishError(f"{samples} samples of {seqlen} tokens; at least 1 sample of 2 tokens is needed")
    if isinstance(source, Tensor):
        cut, name = _checked(source, seqlen), "the given tensor"
    else:
        ids = tokens(tokenizer, source, at_most=samples * seqlen * _HUB_CHOICE)
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


def sha256(ids: Tensor) -> str:
    """Hash of token ids, whatever their shape; what run.json records of the data."""
    return hashlib.sha256(ids.to(torch.int64).cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def documents(source: str | Path, at_most: int | None = None) -> Iterable[str]:
    """The texts of a source, in order; `at_most` tokens (about) of a hub data set."""
    name = str(source)
    if name == "embedded":
        return embedded.calibration()
    if name == "embedded-eval":
        return embedded.evaluation()
    path, _, field = name.partition("#")
    if Path(path).is_file():
        return _file(Path(path), field)
    if Path(path).is_dir():
        raise PlanishError(f"{path} is a folder; give one text file, .jsonl file or hub data set")
    if Path(path).suffix in (".txt", ".raw", ".jsonl", ".json", ".md") or path.startswith((".", "/", "~")):
        raise PlanishError(f"no such file: {path}")
    return _hub(name, at_most)


def join_rows(text: str) -> str:
    """WikiText's raw file as the field reads it: each line a row, blank rows empty, joined by blank lines."""
    rows = text.removesuffix("\n").split("\n")
    return "\n\n".join(f"{row}\n" if row.strip() else "" for row in rows)


def _checked(ready: Tensor, seqlen: int) -> Tensor:
    if ready.dim() != 2 or ready.shape[1] != seqlen or len(ready) == 0 or ready.is_floating_point():
        raise PlanishError(f"ready windows are {ready.dtype} {list(ready.shape)}, not int64 [n, {seqlen}]")
    return ready.to(torch.int64)


def _file(path: Path, field: str) -> Iterable[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise PlanishError(f"{path} can't be read as UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        # not splitlines(): JSON strings may hold U+2028 and the like
        return list(_json_lines(path, text.split("\n"), field or "text"))
    return [join_rows(text) if path.suffix == ".raw" else text]


def _json_lines(path: Path, lines: list[str], field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PlanishError(f"{path} line {number} isn't JSON: {error}") from error
        yield _field(row, field, f"{path} line {number}")


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        has = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise PlanishError(f"{where} has no text {field!r} (it has: {has}); name another one as SOURCE#FIELD")
    return row[field]


def _hub(name: str, at_most: int | None) -> Iterator[str]:
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
        reason = str(error).strip().partition("\n")[0]
        raise PlanishError(f"{name} is no file, and no data set that the hub gives: {reason}") from error
    return _first_characters(chain([first], rows), match["field"] or "text", name, at_most)


def _first_characters(rows: Iterable[Any], field: str, name: str, at_most: int | None) -> Iterator[str]:
    left = None if at_most is None else at_most * _CHARACTERS_A_TOKEN
    for row in rows:
        text = _field(row, field, name)
        yield text
        if left is not None and (left := left - len(text)) <= 0:
            return
