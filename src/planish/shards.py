"""Shards: where each tensor of a checkpoint lies, from the headers of its safetensors files alone; and one, written.

What an index and the headers promise is checked against each other and bounded (see `guard`). Knows nothing of models.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from planish.errors import PlanishError, first_line
from planish.guard import MAX_TENSORS, Stored, check_header, read_index

# dtypes of parameters, as safetensors spells them
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# every dtype that a file may hold, in the order in which safetensors puts tensors
DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

# bytes at a time: for more, Linux looks for huge pages for its cache, which may take several times as long as writing
PIECE = 1 << 20


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
    except RuntimeError as error:  # torch couldn't map it: a file larger than what a host lets one process have
        raise PlanishError(f"{first_line(error)}; save the model in smaller shards (max_shard_size)") from error


def stored_dtype(places: dict[str, Place]) -> torch.dtype:
    """The first floating-point dtype on disk, as transformers does where config.json names none."""
    return next((FLOATS[place.dtype] for place in places.values() if place.dtype in FLOATS), torch.float32)


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors on the CPU as one file: the bytes of safetensors' `save_file`, in small pieces.

    Raises:
        OSError: if it can't be written.
    """
    places = {dtype: place for place, dtype in enumerate(DTYPES)}
    names = sorted(tensors, key=lambda name: (places[tensors[name].dtype], name))
    said: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        said[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            data = tensors[name].reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), PIECE):
                out.write(data[start : start + PIECE])
