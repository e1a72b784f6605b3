"""Shards: where each tensor of a checkpoint lies, from the headers of its safetensors files alone.

What an index and the headers promise is checked against each other and bounded (see `guard`). Knows nothing of models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from planish.errors import PlanishError, first_line
from planish.guard import MAX_TENSORS, Stored, check_header, read_index

# dtypes of parameters, as safetensors spells them
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: its file, its name there, its shape, its dtype as safetensors spells it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def scan(folder: Path, label: str) -> dict[str, Place]:
    """Every tensor of the checkpoint by its name on disk, from the headers alone."""
    index, named = folder / "model.safetensors.index.json", {}
    if index.is_file():
        named = read_index(index)
        files = sorted(set(named.values()))
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f"only pickled weights ({pickled[0]})" if pickled else "no model.safetensors"
        raise PlanishError(f"{label} holds {found}; load it with transformers and save_pretrained() it first")
    places: dict[str, Place] = {}
    for file in files:
        for key, place in header(folder / file):
            if key in places:
                raise PlanishError(f"{label}: {key} is in {places[key].file.name} and in {file}; get it again")
            places[key] = place
        if len(places) > MAX_TENSORS:
            raise PlanishError(f"{label} has more than {MAX_TENSORS} tensors; give a smaller model")
    for key, file in named.items():
        if key not in places or places[key].file.name != file:
            raise PlanishError(f"{index} puts {key} in {file}, which hasn't got it; get the checkpoint again")
    return places


def header(file: Path) -> Iterator[tuple[str, Place]]:
    """(name, place) of every tensor in a file."""
    with opened(file) as handle:
        for key in sorted(handle.keys()):
            part = handle.get_slice(key)
            yield key, Place(file, key, tuple(part.get_shape()), part.get_dtype())


def total(places: dict[str, Place]) -> Stored:
    files = {place.file for place in places.values()}
    return Stored(
        tensors=len(places),
        largest=max((size for place in places.values() for size in place.shape), default=0),
        bytes=sum(file.stat().st_size for file in files),
    )


def opened(file: Path) -> safe_open:
    """A safetensors file, mapped into memory until it is left: copy what shall stay."""
    try:
        check_header(file)
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PlanishError(f"{file} is truncated or damaged ({first_line(error)}); get it again") from error


def stored_dtype(places: dict[str, Place]) -> torch.dtype:
    """The first floating-point dtype on disk, as transformers does where config.json names none."""
    return next((FLOATS[place.dtype] for place in places.values() if place.dtype in FLOATS), torch.float32)
