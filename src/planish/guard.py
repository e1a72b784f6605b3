"""Guard: checks of what came with a checkpoint, before anything is built of it.

A checkpoint is a stranger's data: its JSON, headers and counts may promise anything. Everything here reads a bounded
number of bytes, and no number is allocated for, counted up to or sought before it was held against what lies on
disk. What is wrong becomes one PlanishError that names file and field.

Knows nothing of models, formats or what tensors mean.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from planish.errors import PlanishError, first_line

AGAIN = "get the checkpoint again"
MAX_DEPTH = 32
MAX_TENSORS = 100_000
MAX_PATTERN = 1000

_MB = 1 << 20
_HEADER = 8 * _MB  # of a safetensors file: 80,000 tensors
_VALUES = 25_000  # in a megabyte of JSON; real files have fewer than 15,000
# keys of a configuration whose integers are looped over when a model is made
_COUNT = re.compile("layer|depth|block|expert|stage|head|label")
_NUMBER_OF_LAYERS = re.compile(r"n(um)?_.*layers?")  # others, such as vision_feature_layer, may count from the end
_COUNTS_OF_ANY = 256  # such a count is no danger, whatever lies on disk


@dataclass(frozen=True)
class Stored:
    """What lies on disk, to hold the numbers of a configuration against.

    Args:
        tensors: how many.
        largest: the largest dimension of any.
        bytes: of all together.
    """

    tensors: int
    largest: int
    bytes: int

    @property
    def calls(self) -> int:
        """Calls of torch that making a model of so many tensors may take: an honest one takes 3 to 6 a parameter."""
        return 10_000 + 20 * self.tensors

    @property
    def buffer_bytes(self) -> int:
        """What a model's buffers, which no file holds, may take: causal masks of old models take megabytes."""
        return max(32 * _MB, self.bytes)


@contextmanager
def reading(what: str, mend: str = AGAIN) -> Iterator[None]:
    """Turn whatever other code raises on odd data, asserts too, into one PlanishError.

    Args:
        what: starts the message, such as "DIR: tokenizer.json can't be read".
    """
    try:
        yield
    except PlanishError:
        raise
    except Exception as error:
        raise PlanishError(f"{what} ({first_line(error)[:300]}); {mend}") from error


def read_json(path: Path, megabytes: int = 4, unique: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        megabytes: a larger file is refused, and one with more values than such a file ever has.
        unique: refuse an object that has a key twice.

    Raises:
        PlanishError: if it is no such file.
    """
    if not path.is_file():
        raise PlanishError(f"{path} is missing or no file; {AGAIN}")
    with reading(f"{path} is damaged"), path.open("rb") as file:
        raw = file.read(megabytes * _MB + 1)
        values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
        if len(raw) > megabytes * _MB or values > megabytes * _VALUES or not (raw.isascii() or len(raw) <= 4 * _MB):
            raise PlanishError(f"{path} is larger than any such file ought to be; {AGAIN}")
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    if not isinstance(found, dict):
        raise PlanishError(f"{path} is damaged (it holds no JSON object); {AGAIN}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file of an index of shards; each file a plain name, which can only lie beside the index."""
    named = read_json(path, 16, unique=True).get("weight_map")
    if not isinstance(named, dict):
        raise PlanishError(f"{path} is damaged (it has no weight_map); {AGAIN}")
    for tensor, file in named.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0:]+\.safetensors", file):
            raise PlanishError(
                f"{path} names {short(file)} for {short(tensor)}; shards are .safetensors files beside the index"
            )
    return named


def check_header(file: Path) -> None:
    """Refuse a safetensors file whose header is longer than the file, or than any header; the rest of it is
    checked by safetensors itself, which refuses holes, overlaps and overflows.

    Raises:
        PlanishError, OSError: if it can't be read.
    """
    if not file.is_file():
        raise PlanishError(f"{file} is missing; {AGAIN}")
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
    if length > min(_HEADER, file.stat().st_size - 8):
        raise PlanishError(f"{file} is truncated or damaged (a header of {length} bytes); get it again")


def check_config(config: Mapping[str, Any], stored: Stored, path: Path | str) -> None:
    """Refuse a configuration that would have a model made out of all proportion to its tensors, or run code.

    Args:
        config: the object in config.json.
        path: how messages call it.

    Raises:
        PlanishError: naming the field.
    """
    if "configuration_files" in config:
        raise PlanishError(f"{path} refers to other files (configuration_files); remove that field")
    how = config.get("quantization_config")
    if how is not None and not isinstance(how, dict):
        raise PlanishError(f"{path}: quantization_config is {short(how)}, not an object; {AGAIN}")
    todo: list[tuple[str, Any, int]] = [("", config, 0)]
    while todo:
        key, value, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise PlanishError(f"{path} is nested more than {MAX_DEPTH} deep; {AGAIN}")
        if isinstance(value, dict):
            todo += [(f"{key}.{name}".strip("."), inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            todo += [(key, inner, depth + 1) for inner in value]
        elif isinstance(value, int):
            check_count(key, value, stored, path)
        elif isinstance(value, str) and "implementation" in key and "/" in value:
            raise PlanishError(f"{path} asks for code of the hub ({key[-80:]} is {short(value)}); remove that field")


def check_count(key: str, value: int, stored: Stored, path: Path | str) -> None:
    """Refuse a number of layers, experts, heads, ... that can't be, by what lies on disk."""
    most, word = max(_COUNTS_OF_ANY, stored.tensors, stored.largest), key.rpartition(".")[2].lower()
    if (value > most and _COUNT.search(word)) or (value < 0 and _NUMBER_OF_LAYERS.fullmatch(word)):
        raise PlanishError(
            f"{path} says {key[-80:]} is {short(value)}, but there are {stored.tensors} tensors of at most "
            f"{stored.largest} rows or columns; {AGAIN}"
        )


def short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of more than 30 digits"
    return text if len(text) <= 60 else text[:57] + "..."


class Patterns:
    """Regular expressions that came with a checkpoint: `re`'s, but all matches of one object together end in time.

    Args:
        seconds: of the processor, for all of them.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self._left = seconds

    def search(self, pattern: str, text: str) -> bool:
        """Is it found anywhere in the text?"""
        return self._found("search", pattern, text)

    def match(self, pattern: str, text: str) -> bool:
        """Does it match from the start of the text?"""
        return self._found("match", pattern, text)

    def _found(self, how: str, pattern: str, text: str) -> bool:
        if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
            raise PlanishError(f"quantization_config has {short(pattern)} for a regular expression; name the layers")
        start = time.process_time()
        try:
            return getattr(regex, how)(pattern, text, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError as error:
            raise PlanishError(f"{short(pattern)} in quantization_config takes too long; name the layers") from error
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise PlanishError(
                f"quantization_config has a regular expression that isn't one: {short(pattern)} ({first_line(error)})"
            ) from error
        finally:
            self._left -= time.process_time() - start
