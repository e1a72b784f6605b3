"""The header of a GGUF file: where each tensor lies. Nothing of it is believed before it was checked.

Counts, strings, arrays and tensors must lie within the file, and what gguf's own reader would take for them within
bounds. That reader gives the same, but takes seconds for a vocabulary, believes what it reads, and knows no type
newer than itself. Knows nothing of what tensors mean.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from planish.guard import Stored, check_count, reading, short

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_ALIGNMENT = 32
# bytes that gguf's reader takes for a field or tensor and for an element of an array; what it may take in all, by the
# file's size
_OF_ENTRY, _OF_STRING, _OF_SCALAR = 3000, 1400, 750
_READER, _READER_PER_BYTE = 150 << 20, 32


class Place(NamedTuple):
    """Where a tensor lies: the number of its type, its shape as torch has it, its offset in the file."""

    kind: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """Where each tensor lies, by name, and what they come to."""

    places: dict[str, Place]
    stored: Stored


class _Cursor:
    """Reads little-endian values one after the other; past the end is a struct.error or a ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def skip(self, length: int) -> None:
        if length > len(self.data) - self.at:
            raise ValueError(f"{length} bytes are promised at {self.at} of {len(self.data)}")
        self.at += length

    def text(self) -> str:
        length = self.number("Q")
        self.skip(length)
        return self.data[self.at - length : self.at].decode("utf-8")


def read_header(path: Path, newer: Mapping[int, tuple[int, int]] | None = None) -> Header:
    """Walk a GGUF's header.

    Args:
        newer: (weights, bytes) of a block of types that the gguf package may not know, by their number.

    Raises:
        PlanishError: if something lies outside of the file, two tensors share a name or a byte, or a count can't be.
    """
    from gguf import GGML_QUANT_SIZES  # here, not above: GGUF is an extra

    sizes = {**(newer or {}), **{int(kind): size for kind, size in GGML_QUANT_SIZES.items()}}
    with reading(f"{path} is truncated or damaged", "get it again"), path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("it is shorter than a header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _walk(_Cursor(data), path, sizes)


def _walk(cursor: _Cursor, path: Path, sizes: Mapping[int, tuple[int, int]]) -> Header:
    magic, version = cursor.number("4s"), cursor.number("I")
    if magic != b"GGUF" or version not in _VERSIONS:
        raise ValueError(f"it starts with {magic!r}, version {version}; known is b'GGUF', version 2 or 3")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    budget = max(_READER, _READER_PER_BYTE * len(cursor.data)) - (tensors + pairs) * _OF_ENTRY
    if budget < 0:
        raise ValueError(f"it promises {pairs} fields and {tensors} tensors in {len(cursor.data)} bytes")
    values = _metadata(cursor, pairs, budget)
    alignment = values.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise ValueError(f"its alignment is {short(alignment)}")
    header = _tensors(cursor, tensors, alignment, sizes)
    for key, value in values.items():
        if isinstance(value, int):
            check_count(key, value, header.stored, path)
            if key.endswith(".block_count") and value > tensors:
                raise ValueError(f"{key} is {short(value)}, but it has {tensors} tensors")
    return header


def _metadata(cursor: _Cursor, pairs: int, budget: int) -> dict[str, Any]:
    """Every key with its number; None for strings and arrays, which are skipped."""
    values: dict[str, Any] = {}
    for _ in range(pairs):
        key, kind = cursor.text(), cursor.number("I")
        if key in values:
            raise ValueError(f"it has {short(key)} twice")
        values[key] = cursor.number(_SCALARS[kind]) if kind in _SCALARS else None
        if kind == _ARRAY:
            budget -= _array(cursor, key, budget)
        elif kind == _STRING:
            cursor.text()
        elif kind not in _SCALARS:
            raise ValueError(f"{short(key)} has type {kind}, which GGUF hasn't")
    return values


def _array(cursor: _Cursor, key: str, budget: int) -> int:
    """Skip an array; what gguf's reader will take for it."""
    kind, length = cursor.number("I"), cursor.number("Q")
    cost = length * (_OF_STRING if kind == _STRING else _OF_SCALAR)
    if cost > budget:
        raise ValueError(f"{short(key)} has {length} elements, too many for a file of {len(cursor.data)} bytes")
    if kind == _STRING:
        for _ in range(length):
            cursor.text()
    elif kind in _SCALARS:
        cursor.skip(length * struct.calcsize("<" + _SCALARS[kind]))
    else:
        raise ValueError(f"{short(key)} is an array of type {kind}, which Planish doesn't read")
    return cost


def _tensors(cursor: _Cursor, count: int, alignment: int, sizes: Mapping[int, tuple[int, int]]) -> Header:
    found: dict[str, Place] = {}
    spans, largest = [], 0
    for _ in range(count):
        name, dims = cursor.text(), cursor.number("I")
        if name in found or not 1 <= dims <= _MAX_DIMS:
            raise ValueError(f"the tensor {short(name)} is there twice, or has {dims} dimensions")
        shape = [cursor.number("Q") for _ in range(dims)]
        kind, offset = cursor.number("I"), cursor.number("Q")
        block, size = sizes.get(kind, (0, 0))
        if not block or not all(shape) or shape[0] % block or offset % alignment:
            raise ValueError(f"the tensor {short(name)} of type {kind} can't be {shape} at {offset}")
        spans.append((offset, offset + math.prod(shape) // block * size, name))
        found[name] = Place(kind, tuple(reversed(shape)), offset)
        largest = max(largest, *shape)
    start = cursor.at + -cursor.at % alignment
    end = 0
    for first, last, name in sorted(spans):
        if first < end or start + last > len(cursor.data):
            raise ValueError(f"the tensor {short(name)} overlaps another or the end of the file")
        end = last
    places = {name: place._replace(offset=start + place.offset) for name, place in found.items()}
    return Header(places, Stored(tensors=count, largest=largest, bytes=end))
