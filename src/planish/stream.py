"""BlockStream: what every calibration sample looks like before the current block, twice.

`fp` is what the float model computes there, `quant` what the model computes whose earlier blocks are
quantized already. The model's embedding runs once; each block's other arguments (position embeddings,
masks) are recorded then, block by block, since they differ between layers in some models. Both streams
live on the device, in host memory or in a file, and are read and written in slices of samples.

Knows nothing of quantizers: a block is any module that maps hidden states to hidden states.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError

STORAGES = ("auto", "device", "host", "disk")


class _Reached(Exception):
    """The forward pass has come as far as was asked; not an error."""


class _Recorder(nn.Module):
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
    recorders = [_Recorder(block, i == len(original) - 1 or not every_block) for i, block in enumerate(original)]
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
        device: where blocks run. storage: where the streams live, one of STORAGES; "auto" is the device
            if both take less than a third of its free memory, else the host.
        micro_batch: samples in one forward pass.
        quantized: whether the quantized stream is needed too; if not, `quant` is empty.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        ids: Tensor,
        *,
        device: torch.device,
        storage: str = "auto",
        micro_batch: int = 8,
        quantized: bool = True,
        directory: str | None = None,
    ) -> None:
        if storage not in STORAGES:
            raise PlanishError(f"no storage {storage!r}; use one of {', '.join(STORAGES)}")
        self.device, self.micro_batch, self._directory = device, micro_batch, directory
        # one sample, so that masks and positions broadcast over any batch
        first, self.arguments = record(model, blocks, ids[:1].to(device), every_block=True)
        shape = (len(ids), *first.shape[1:])
        self.storage = _choose(storage, shape, first.dtype, device)
        self.fp = self._allocate(shape, first.dtype)
        for part in self.parts():
            self.fp[part] = record(model, blocks, ids[part].to(device), every_block=False)[0].to(self.fp.device)
        self.quant = self.copy(self.fp) if quantized else self.fp[:0]

    def __len__(self) -> int:
        return len(self.fp)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.storage == "device":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self.storage == "host":
            return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        # mapped, then unlinked: the room is given back with the tensor, or when the process dies
        size = torch.Size(shape).numel()
        with tempfile.NamedTemporaryFile(prefix="planish-stream-", dir=self._directory) as file:
            _reserve(file.fileno(), size * dtype.itemsize, Path(file.name).parent)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)

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
        """Overwrite a stream by what the block makes of it."""
        for part in self.parts():
            hidden = stream[part].to(self.device, non_blocking=True)
            stream[part] = self.run(block, index, hidden).to(stream.device)


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
            "set TMPDIR to a larger disk, or use --storage host"
        ) from error


def _choose(storage: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    if storage != "auto":
        return "host" if storage == "device" and device.type == "cpu" else storage
    if device.type != "cuda":
        return "host"
    needed = 2 * torch.Size(shape).numel() * dtype.itemsize
    return "device" if needed < torch.cuda.mem_get_info(device)[0] / 3 else "host"
