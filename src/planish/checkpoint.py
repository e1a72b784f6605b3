"""CheckpointWriter: a Hugging Face folder of safetensors shards that is either whole or isn't there.

Shards are written as tensors arrive, with fsync, into a hidden folder beside the final one; only when all
is written and verified does that folder get the final name, by one rename. Any exception removes it; a
killed process leaves a `.NAME.partial-*` folder behind, never a half-written NAME.

It knows nothing of models, formats or what the tensors mean.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from planish.errors import PlanishError
from planish.shards import write as write_shard

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

Content = str | bytes | Path | Mapping[str, Any]


class CheckpointWriter:
    """Write a checkpoint folder; use it as a context manager.

    Args:
        out: the final folder. Its parents are made.
        overwrite: replace a checkpoint that is there, once the new one is whole.
        inside: an existing folder beside `out`, nobody else's, to write in under fixed names; what a killed
            process left there is put right first.
        shard_bytes: tensors are held in memory until a shard of about this size is full.

    Raises:
        PlanishError: if `out` exists and isn't an empty folder (unless `overwrite`), or can't be written.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        inside: Path | None = None,
        shard_bytes: int = 1 << 29,
    ) -> None:
        self.out = Path(out).resolve()
        self.shard_bytes = shard_bytes
        _refuse_existing(self.out, overwrite)
        token = secrets.token_hex(4)
        self._partial = self.out.with_name(f".{self.out.name}.partial-{token}")
        self._replaced = self.out.with_name(f".{self.out.name}.replaced-{token}")
        if inside is not None:
            self._partial, self._replaced = inside / "partial", inside / "replaced"
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def __enter__(self) -> "CheckpointWriter":
        with self._reporting():
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._tidy()
            self._partial.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tidy()

    def _tidy(self) -> None:
        if self._replaced.exists() and not self.out.exists():  # interrupted between the two renames
            self._replaced.rename(self.out)
        shutil.rmtree(self._partial, ignore_errors=True)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor under its full name; a full shard is written at once.

        Args:
            name: unique in the checkpoint.
            tensor: any device; must not be changed afterwards if it is on the CPU.
        """
        assert name not in self._pending and not any(name in shard for shard in self._shards), name
        if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = _alone(tensor)
        self._pending_bytes += tensor.nbytes

    def finish(
        self,
        config: Mapping[str, Any],
        extra_files: Mapping[str, Content] | None = None,
        verify: Callable[[Path], None] | None = None,
    ) -> Path:
        """Complete the checkpoint and give it its final name.

        Args:
            config: config.json.
            extra_files: file name -> text or bytes, a file to copy, or a mapping to write as JSON.
            verify: called with the folder when it is whole but doesn't have its final name yet; what it
                raises leaves nothing behind.

        Returns:
            The final folder.
        """
        assert self._pending or self._shards, "a checkpoint without tensors"
        if self._pending:
            self._flush()
        with self._reporting():
            self._name_shards()
            for name, content in {"config.json": config, **(extra_files or {})}.items():
                _write(self._partial / name, content)
            sync(self._partial)
        if verify is not None:
            verify(self._partial)
        with self._reporting():
            self._publish()
        return self.out

    def _flush(self) -> None:
        shard = self._partial / f"shard-{len(self._shards)}"
        with self._reporting():
            write_shard(shard, self._pending)
            sync(shard)
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> None:
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self._partial / f"shard-{index}").rename(self._partial / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            metadata, weight_map = {"total_size": self._total_bytes}, dict(sorted(weight_map.items()))
            _write(self._partial / INDEX, {"metadata": metadata, "weight_map": weight_map})

    def _publish(self) -> None:
        """Rename into place; an old checkpoint steps aside first and comes back if that fails."""
        if self.out.exists():
            self.out.rename(self._replaced)
        self._partial.rename(self.out)
        sync(self.out.parent)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"can't write {self.out}: {error.strerror or error}; make room, or write elsewhere"
            raise PlanishError(message) from error


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not out.name or (out.exists() and not out.is_dir()):
        raise PlanishError(f"{out} can't be the output folder; choose another")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise PlanishError(f"{out} exists and isn't empty; choose another folder, or --overwrite")
    if not (out / "config.json").is_file():  # replacing deletes: never a folder of something else
        raise PlanishError(
            f"{out} is no checkpoint (it has no config.json) and won't be overwritten; choose another folder"
        )


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and not a view that keeps a larger storage alive."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def replace(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that at any moment either the old one or the new one is there, whole."""
    new = path.with_name(path.name + ".new")
    _write(new, content)
    new.replace(path)
    sync(path.parent)


def _write(path: Path, content: Content) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        path.write_text(content, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Make a file, what was written through a mapping too, or a folder's entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
