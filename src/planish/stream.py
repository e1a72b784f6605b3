"""BlockStream: what every calibration sample looks like before the current block, twice.

`fp` is what the float model computes there, `quant` what the model computes whose earlier blocks are
quantized already. The model's embedding runs once; each block's other arguments (position embeddings,
masks) are recorded then, block by block, since they differ between layers in some models. Both streams
live on the device, in host memory or in mapped files, and are read and written in slices of samples.

A run that shall survive a kill keeps two files of each stream: a span reads one and writes the other, so
that what stood before it is whole until `settle` says that the other one is.

Knows nothing of quantizers: a block is any module that maps hidden states to hidden states.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish.checkpoint import sync
from planish.errors import PlanishError
from planish.feed import Drain, Feed

STORAGES = ("device", "host", "disk")


class _Reached(Exception):
    """The forward pass has come as far as was asked; not an error."""


class Recorder(nn.Module):
    """Stands where a block was: records its arguments and hands the hidden states on unchanged."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self.last = last
        self.hidden: Tensor | None = None
        self.arguments: dict[str, Any] = {}
        self.__dict__["block"] = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # models read attributes of their blocks, such as attention_type
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise PlanishError(
                f"{type(self.block).__name__} takes positional arguments besides its hidden states; "
                "such models aren't supported"
            )
        self.hidden, self.arguments = hidden, kwargs
        if self.last:
            raise _Reached
        return hidden


def record(
    model: nn.Module, blocks: nn.ModuleList, ids: Tensor, every_block: bool
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Hidden states before block 0, and the arguments of the blocks (of block 0 alone, or of every one)."""
    original = list(blocks)
    recorders = [Recorder(block, i == len(original) - 1 or not every_block) for i, block in enumerate(original)]
    try:
        for i, recorder in enumerate(recorders):
            blocks[i] = recorder
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except _Reached:
        pass
    finally:
        for i, block in enumerate(original):
            blocks[i] = block
    hidden = recorders[0].hidden
    assert hidden is not None
    return hidden, [recorder.arguments for recorder in recorders]


class BlockStream:
    """The float and the quantized stream of activations, [samples, tokens, hidden] each.

    Args:
        model: the decoder whose embedding is loaded (blocks may be on meta).
        blocks: its decoder blocks.
        ids: token ids int64 [samples, tokens], every window full.
        device: where blocks run. storage: where the streams live, one of STORAGES; see `plan` for a choice.
        micro_batch: samples in one forward pass.
        quantized: whether the quantized stream is needed too; if not, `quant` is empty.
        directory: of the files of storage "disk"; unlinked as soon as they are mapped, unless
        keep: they shall outlive the process, two of each stream.
        generation: which of those two to begin from, as `settle` gave it; None begins at the embedding.

    Raises:
        PlanishError: if there is no such storage, no room in `directory`, or a file to begin from is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        ids: Tensor,
        *,
        device: torch.device,
        storage: str = "host",
        micro_batch: int = 8,
        quantized: bool = True,
        directory: str | os.PathLike[str] | None = None,
        keep: bool = False,
        generation: int | None = None,
    ) -> None:
        if storage not in STORAGES:
            raise PlanishError(f"no storage {storage!r}; use one of {', '.join(STORAGES)}")
        assert not keep or (storage == "disk" and directory is not None), "only files can be kept"
        self.device, self.storage, self.micro_batch = device, storage, micro_batch
        self.directory, self.generation = Path(directory or tempfile.gettempdir()), generation or 0
        self._kept: dict[str, list[Tensor]] | None = {} if keep else None
        # one sample, so that masks and positions broadcast over any batch
        first, self.arguments = record(model, blocks, ids[:1].to(device), every_block=True)
        shape, names = (len(ids), *first.shape[1:]), ("fp", "quant") if quantized else ("fp",)
        self.fp, *rest = [self._allocate(shape, first.dtype, name, must_exist=generation is not None) for name in names]
        self.quant = rest[0] if rest else self.fp[:0]
        if generation is None:
            for part in self.parts():
                self.fp[part] = record(model, blocks, ids[part].to(device), every_block=False)[0].to(self.fp.device)
            if quantized:
                self.quant.copy_(self.fp)

    def __len__(self) -> int:
        return len(self.fp)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, name: str = "", must_exist: bool = False) -> Tensor:
        if self.storage == "device":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self.storage == "host":
            # not pinned: batches go through pinned buffers, and a system short of memory can page this out
            return torch.empty(shape, dtype=dtype)
        if self._kept is not None and name:
            self._kept[name] = [_mapped(path, shape, dtype, must_exist) for path in self._files(name)]
            return self._kept[name][self.generation]
        # mapped, then unlinked: the room is given back with the tensor, or when the process dies
        with tempfile.NamedTemporaryFile(prefix="planish-stream-", dir=self.directory) as file:
            return _mapped(Path(file.name), shape, dtype, must_exist=False)

    def _files(self, name: str) -> list[Path]:
        return [self.directory / f"{name}.{generation}" for generation in (0, 1)]

    def copy(self, stream: Tensor) -> Tensor:
        """A copy of a stream, where streams live."""
        return self._allocate(tuple(stream.shape), stream.dtype).copy_(stream)

    def parts(self) -> Iterator[slice]:
        for start in range(0, len(self), self.micro_batch):
            yield slice(start, min(start + self.micro_batch, len(self)))

    def run(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Block `index` on hidden states [batch, tokens, hidden] of the device."""
        output = block(hidden, **self.arguments[index])
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def advance(self, stream: Tensor, block: nn.Module, index: int) -> None:
        """Put in a stream's place what the block makes of it; reads ahead and writes behind the device.

        The tensor is overwritten, or, if its file is the one that survives a kill, `fp` or `quant` is another
        tensor afterwards.
        """
        into = self._successor(stream)
        with Feed((stream,), self.parts(), self.device) as feed, Drain(into, self.device) as drain:
            for part, (hidden,) in zip(self.parts(), feed, strict=True):
                drain.put(part, self.run(block, index, hidden))
        if stream is self.fp:
            self.fp = into
        elif stream is self.quant:
            self.quant = into

    def _successor(self, stream: Tensor) -> Tensor:
        pairs = (self._kept or {}).values()
        return next((pair[1 - self.generation] for pair in pairs if stream is pair[self.generation]), stream)

    def settle(self) -> int:
        """Make kept streams, all of them advanced, durable as they are; the next span writes the other files.

        Returns:
            The generation to begin from after a kill, once the caller has made that known.
        """
        assert self._kept is not None, "only kept streams settle"
        self.generation = 1 - self.generation
        for name in self._kept:
            sync(self._files(name)[self.generation])
        return self.generation


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype, must_exist: bool) -> Tensor:
    """A file as a tensor, shared with the page cache: it takes no memory that the system can't have back."""
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    if must_exist and not (path.is_file() and path.stat().st_size == size):
        raise PlanishError(f"{path}, which this run goes on from, is missing or cut; delete its folder to start anew")
    with path.open("ab") as file:
        _reserve(file.fileno(), size, path.parent)
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)


def _reserve(file: int, size: int, folder: Path) -> None:
    """Make a file so long; on a full disk that fails here, where a hole in a mapped file would kill the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
    except OSError as error:
        raise PlanishError(
            f"no room for {size / 1e9:.2f} GB of activations in {folder} ({error.strerror}); "
            "name a folder on a larger disk with --stream-dir, or use --storage host"
        ) from error
