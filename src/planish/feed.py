"""Feed and Drain: samples of large tensors to a device and back, a batch ahead of and behind what it computes.

    with Feed((inputs, targets), batches, device) as feed, Drain(outputs, device) as drain:
        for part, (x, y) in zip(parts, feed):
            drain.put(part, compute(x, y))

A thread copies out of host memory or a mapped file while the device works on the batch before; to and from a
GPU through two pinned buffers and a CUDA stream of its own. The thread itself makes no CUDA call: one would
spoil a graph that is being captured. Values are those of plain indexing. Knows nothing of blocks or files.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import torch
from torch import Tensor

Batch = Tensor | slice
Items = Generator[tuple[Tensor, ...], None, None]


class Feed:
    """Iterates over (streams[0][batch], streams[1][batch], ...) on a device, for batches that are known early.

    What it gives on a GPU holds until the next one is asked for. The end, an error and `close` stop its thread.

    Args:
        streams: [samples, ...] each, all on the host (memory or mapped file) or all on the device.
        batches: indices int64 [n] or slices of samples, none longer than the first; drawn in order, some ahead.
        device: where they are wanted.

    Raises:
        whatever indexing raises, from the `next` whose batch it is (or the one before, on a GPU).
    """

    def __init__(self, streams: Sequence[Tensor], batches: Iterable[Batch], device: torch.device) -> None:
        self.streams, self.device = tuple(streams), device
        self._pool: ThreadPoolExecutor | None = None
        if any(stream.device.type != "cpu" for stream in self.streams):
            self._items = self._indexed(iter(batches))
            return
        self._pool = ThreadPoolExecutor(1, "planish-feed")
        ahead = self._through_pinned if device.type == "cuda" else self._ahead
        self._items = ahead(self._pool, iter(batches))

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        try:
            return next(self._items)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; what wasn't asked for yet is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._items.close()

    def _indexed(self, batches: Iterator[Batch]) -> Items:
        for batch in batches:
            where = batch if isinstance(batch, slice) else batch.to(self.device)
            yield tuple(stream[where] for stream in self.streams)

    def _ahead(self, pool: ThreadPoolExecutor, batches: Iterator[Batch]) -> Items:
        pending: deque[Future[tuple[Tensor, ...]]] = deque()
        for batch in batches:
            pending.append(pool.submit(lambda batch: tuple(stream[batch] for stream in self.streams), batch))
            if len(pending) == 2:
                yield pending.popleft().result()
        for last in pending:
            yield last.result()

    def _through_pinned(self, pool: ThreadPoolExecutor, batches: Iterator[Batch]) -> Items:
        first = next(batches, None)
        if first is None:
            return
        batches = chain([first], batches)
        side, pair = torch.cuda.Stream(self.device), [_Slot(self.streams, _length(first), self.device) for _ in "ab"]
        pending: deque[tuple[_Slot, Future[int]]] = deque()
        for slot, batch in zip(pair, batches, strict=False):
            pending.append((slot, pool.submit(slot.gather, self.streams, batch)))
        arriving = deque([_send(*pending.popleft(), side)])
        try:
            while arriving:
                slot, count = arriving.popleft()
                if pending:
                    arriving.append(_send(*pending.popleft(), side))
                if (following := next(batches, None)) is not None:
                    slot.arrived.synchronize()  # before its pinned half is written again
                    pending.append((slot, pool.submit(slot.gather, self.streams, following)))
                torch.cuda.current_stream(self.device).wait_event(slot.arrived)
                yield tuple(tensor[:count] for tensor in slot.sent)
                slot.used.record(torch.cuda.current_stream(self.device))
        finally:
            side.synchronize()


class _Slot:
    """Room for one batch of each stream, pinned and on the device, and what has happened to it."""

    def __init__(self, streams: Sequence[Tensor], length: int, device: torch.device) -> None:
        shapes = [((length, *stream.shape[1:]), stream.dtype) for stream in streams]
        self.pinned = [torch.empty(shape, dtype=dtype, pin_memory=True) for shape, dtype in shapes]
        self.sent = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        self.arrived, self.used = torch.cuda.Event(), torch.cuda.Event()

    def gather(self, streams: Sequence[Tensor], batch: Batch) -> int:
        """Fill the pinned half; the number of samples. Runs in the thread."""
        count = _length(batch)
        for stream, buffer in zip(streams, self.pinned, strict=True):
            if isinstance(batch, slice):
                buffer[:count].copy_(stream[batch])
            else:
                torch.index_select(stream, 0, batch, out=buffer[:count])
        return count


def _send(slot: _Slot, gathered: "Future[int]", side: torch.cuda.Stream) -> tuple[_Slot, int]:
    """Copy a slot to the device as soon as what it held there has been used."""
    count = gathered.result()
    with torch.cuda.stream(side):
        side.wait_event(slot.used)
        for pinned, sent in zip(slot.pinned, slot.sent, strict=True):
            sent[:count].copy_(pinned[:count], non_blocking=True)
        slot.arrived.record(side)
    return slot, count


def _length(batch: Batch) -> int:
    return batch.stop - batch.start if isinstance(batch, slice) else len(batch)


class Drain:
    """Writes batches into a stream behind the device; a context manager, at whose end all is written.

    Args:
        stream: [samples, ...] on the host (memory or mapped file) or on the device.
        device: where the batches come from.

    Raises:
        whatever writing raises, from a later `put` or from the end.
    """

    def __init__(self, stream: Tensor, device: torch.device) -> None:
        self.stream, self.device = stream, device
        self._pool = ThreadPoolExecutor(1, "planish-drain") if stream.device.type == "cpu" else None
        self._side = torch.cuda.Stream(device) if self._pool and device.type == "cuda" else None
        self._buffers: deque[Tensor] = deque()
        self._leaving: tuple[slice, Tensor, torch.cuda.Event] | None = None
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Drain":
        return self

    def put(self, part: slice, output: Tensor) -> None:
        """Write `output` [n, ...] to `stream[part]`, soon; it must not be changed afterwards."""
        if self._pool is None:
            self.stream[part] = output
        elif self._side is None:
            self._write(part, output)
        else:
            previous, self._leaving = self._leaving, self._leave(part, output, self._side)
            self._arrive(previous)

    def _leave(self, part: slice, output: Tensor, side: torch.cuda.Stream) -> tuple[slice, Tensor, torch.cuda.Event]:
        """Start the copy to a pinned buffer, of which there are three: one written, one waiting, one filling."""
        if len(self._buffers) < 3:
            self._buffers.append(torch.empty(output.shape, dtype=output.dtype, pin_memory=True))
        else:
            self._buffers.rotate(-1)
        buffer, event = self._buffers[-1][: len(output)], torch.cuda.Event()
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            buffer.copy_(output, non_blocking=True)
            event.record(side)
        output.record_stream(side)
        return part, buffer, event

    def _arrive(self, leaving: tuple[slice, Tensor, torch.cuda.Event] | None) -> None:
        if leaving is not None:
            part, buffer, event = leaving
            event.synchronize()
            self._write(part, buffer)

    def _write(self, part: slice, values: Tensor) -> None:
        assert self._pool is not None
        if self._writing is not None:
            self._writing.result()
        self._writing = self._pool.submit(self.stream.__setitem__, part, values)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._arrive(self._leaving)
                if self._writing is not None:
                    self._writing.result()
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)
            if self._side is not None:
                self._side.synchronize()
