"""Journal: a hidden folder beside the output in which an unfinished run keeps what a kill must not cost it.

    .NAME.run/lock             held while a run is on: a second one is refused
    .NAME.run/blocks-00003     tensors of blocks finished in one go, as they will stand in the checkpoint
    .NAME.run/state.json       the request, how many blocks are finished, and what else the run wants to know again
    .NAME.run/streams/         activations before the next block; elsewhere if asked for

state.json is replaced by one rename after all that it speaks of is durable, so that it is true at any moment. Another
request than the journal's is refused by what differs. The folder is gone after success, and after a failure
before anything was finished. Knows nothing of what tensors and facts mean.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from planish.checkpoint import replace, sync
from planish.errors import PlanishError

# of a file of weights: so many pieces of so many bytes, evenly spread, are hashed
PIECES, PIECE = 64, 4096


class Journal:
    """What a run to the folder `out` has finished; a context manager, within which nobody else may run there.

    Args:
        out: the final folder. Nothing is touched before the context is entered.
        stream_dir: where the folder of activations shall be, if not inside the journal's.

    Attributes:
        streams: the folder for activations.
        blocks: how many are finished.
        digests: by name, kept with the tensors; the caller fills it.
        facts: what was given to the latest `commit`.
        published: the checkpoint got its name; only this folder was left to remove.

    Raises:
        PlanishError: on entering, if another process holds it, or it can't be written or read.
    """

    def __init__(self, out: str | os.PathLike[str], stream_dir: str | os.PathLike[str] | None = None) -> None:
        self.out = Path(out).resolve()
        self.folder = self.out.with_name(f".{self.out.name}.run")
        self.streams = self.folder / "streams"
        if stream_dir is not None:
            which = hashlib.sha256(str(self.out).encode()).hexdigest()[:8]
            self.streams = Path(stream_dir).resolve() / f".{self.out.name}-{which}.run"
        self.digests: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self.blocks = 0
        self._request: dict[str, Any] = {}
        self._files: dict[str, list[str]] = {}
        self._pending: dict[str, Tensor] = {}
        self._lock = -1

    @property
    def published(self) -> bool:
        state = self._read()
        return bool(state.get("published")) and self.out.is_dir() and not (self.folder / "partial").exists()

    @property
    def request(self) -> dict[str, Any]:
        """What was asked of the unfinished run; {} if there is none."""
        return dict(self._read().get("request", {}))

    def __enter__(self) -> "Journal":
        with self.reporting():
            self._lock = self._locked()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not self._read():
            shutil.rmtree(self.streams, ignore_errors=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def begin(self, request: Mapping[str, Any]) -> None:
        """Take up what is here if it was finished for the same request, else start anew where nothing was.

        Args:
            request: all that decides the result; values are compared as JSON.

        Raises:
            PlanishError: if something was finished for another request: says what differs.
        """
        state, self._request = self._read(), json.loads(json.dumps(request))
        if not state:
            self._clear()
            return
        changed = _differences(state["request"], self._request)
        if changed:
            raise PlanishError(
                f"{self.folder} holds an unfinished run of another request: {'; '.join(changed)}; "
                "give the same as then, or delete that folder to start anew"
            )
        self.blocks, self._files = state["blocks"], state["files"]
        self.digests, self.facts = state["digests"], state["facts"]

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor of the blocks in work, on any device; it is lost unless a `commit` follows."""
        self._pending[name] = tensor.detach().cpu().contiguous()

    def commit(self, blocks: int, facts: Mapping[str, Any]) -> None:
        """Make what was added durable, then make it known that so many blocks are finished.

        Args:
            facts: JSON that a run going on from here wants to know.
        """
        with self.reporting():
            if self._pending:
                file = self.folder / f"blocks-{self.blocks:05d}"
                save_file(self._pending, file)
                sync(file)
                self._files[file.name] = list(self._pending)
            self.blocks, self.facts, self._pending = blocks, dict(facts), {}
            self._write()

    def publish(self) -> None:
        """Make it known that the checkpoint is whole and about to get its name."""
        with self.reporting():
            self._write(published=True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all finished blocks, in the order in which they came."""
        for file, names in self._files.items():
            with self.reporting(), safe_open(self.folder / file, "pt") as handle:
                for name in names:
                    yield name, handle.get_tensor(name)

    def _write(self, published: bool = False) -> None:
        state = {"request": self._request, "blocks": self.blocks, "files": self._files, "facts": self.facts}
        replace(self.folder / "state.json", {**state, "digests": self.digests, "published": published})

    def _read(self) -> dict[str, Any]:
        path = self.folder / "state.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise PlanishError(f"{path} can't be read; delete {self.folder} to start anew") from error

    def _clear(self) -> None:
        """Remove what was left by a run that hadn't finished anything."""
        with self.reporting():
            shutil.rmtree(self.streams, ignore_errors=True)
            for entry in self.folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != "lock":
                    entry.unlink()

    def _locked(self) -> int:
        """An open file that this process alone has locked; the system frees the lock if the process dies."""
        import fcntl  # here, not above: only Unix has it

        path = self.folder / "lock"
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another run has just finished and removed it
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(handle).st_ino == path.stat().st_ino:
                        return handle
                except BlockingIOError as error:
                    os.close(handle)
                    raise PlanishError(
                        f"another run is writing {self.out}; wait for it, or choose another folder"
                    ) from error
                os.close(handle)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Disk errors within it are said in one line."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise PlanishError(
                f"can't keep what is finished in {self.folder}: {reason}; make room and run the same again"
            ) from error


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 of names, sizes and pieces of files: tells one model from another without reading it whole."""
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for index in range(PIECES):
                file.seek((size - PIECE) * index // (PIECES - 1) if size > PIECE * PIECES else PIECE * index)
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def _differences(then: Any, now: Any, name: str = "") -> list[str]:
    """'seed was 0, is 1' for the first few values that differ, by dotted name."""
    if isinstance(then, dict) and isinstance(now, dict):
        found = (_differences(then.get(key), now.get(key), f"{name}.{key}".strip(".")) for key in {**then, **now})
        return [text for part in found for text in part][:3]
    return [] if then == now else [f"{name} was {_short(then)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 40 else text[:16] + "..."
