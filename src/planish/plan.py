"""Plan: what a run will need, said before it starts, and refused if it isn't there.

    bytes of a stream = samples * tokens * hidden * bytes of an activation

Streams of activations go to the device if all of them take less than a third of its free memory, else to host
memory if they take less than HOST_SHARE of what is available, else to files.

    bytes of training a whole model = what stays + state * numbers trained + graph * tokens of a pass

with 16 bytes of state a number by the Trainer (value, gradient, two moments in fp32) and 6.03 in the lean way (two
moments of 8 bits, no gradients but one block's), which is taken where the first doesn't fit. Knows nothing of recipes.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from planish.errors import PlanishError
from planish.stream import STORAGES

DEVICE_SHARE, HOST_SHARE = 1 / 3, 0.6
MARGIN = 1.1  # of a prediction
TRAINER_STATE, LEAN_STATE = 16.0, 4 + 2 * (1 + 4 / 256)  # bytes a number: see `fit.adam8` for the second
HEAD_TOKENS = 1024  # whose logits exist at a time: see `fit.loss.in_chunks`

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Room:
    """Free bytes: of the GPU's memory (0 without a GPU), of the host's, and of the disk that `folder` is on."""

    device: int
    host: int
    disk: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Where the streams of activations will live: `count` of them, of `bytes_each`, on `where`, and why there."""

    bytes_each: int
    count: int
    dtype: torch.dtype
    where: str
    reason: str

    def summary(self) -> str:
        """One line, such as 'activations: 2 x 68.7 GB in bf16, on disk at /data (host memory available: 21.0 GB)'."""
        kind = _SHORT.get(self.dtype, str(self.dtype))
        return f"activations: {self.count} x {gigabytes(self.bytes_each)} in {kind}, {self.reason}"


def plan_streams(
    samples: int,
    seqlen: int,
    hidden: int,
    dtype: torch.dtype,
    storage: str,
    device: torch.device,
    room: Room,
    *,
    count: int = 2,
    keep: bool = False,
) -> StreamPlan:
    """Choose where the streams live; pure, all that it knows of the machine is in `room`.

    Args:
        samples, seqlen, hidden: a stream's shape. dtype: of an activation.
        storage: "auto", or one of `stream.STORAGES`.
        device: where blocks run; without a GPU "device" is the host.
        count: streams in all.
        keep: they shall survive a kill: the float and the quantized one in two files each.

    Raises:
        PlanishError: no such storage, one that can't be kept, or a disk too small.
    """
    if storage not in ("auto", *STORAGES):
        raise PlanishError(f"no storage {storage!r}; use one of auto, {', '.join(STORAGES)}")
    if keep and storage in ("host", "device"):
        raise PlanishError(f"--resume keeps activations in files; drop --storage {storage}")
    each = samples * seqlen * hidden * dtype.itemsize
    files = count + min(count, 2) if keep else count
    where = "disk" if keep else storage
    if where == "auto":
        on_device = device.type == "cuda" and count * each < DEVICE_SHARE * room.device
        where = "device" if on_device else "host" if count * each < HOST_SHARE * room.host else "disk"
    if where == "device" and device.type == "cpu":
        where = "host"
    memory = f"host memory available: {gigabytes(room.host)}"
    reasons = {
        "device": f"on the GPU (free there: {gigabytes(room.device)})",
        "host": f"in host memory (available: {gigabytes(room.host)})",
        "disk": f"on disk at {room.folder} ({f'{files} files, for --resume' if keep else memory})",
    }
    if where == "disk" and files * each > room.disk:
        raise PlanishError(
            f"activations need {files} x {gigabytes(each)} of disk, but {room.folder} has {gigabytes(room.disk)} free; "
            "name a folder on a larger disk with --stream-dir, or take fewer --samples"
        )
    return StreamPlan(bytes_each=each, count=count, dtype=dtype, where=where, reason=reasons[where])


@dataclass(frozen=True, kw_only=True)
class WholeSize:
    """What of a model decides the memory of training it as a whole, packed.

    Args:
        fixed: bytes of what isn't trained: codes, embedding, head, norms; another model's head too.
        trained: numbers that are trained. largest: those of the block that has most.
        weights: numbers that codes stand for. packed: bytes of all codes and scales, as they are stored.
        dense: bytes of the largest weight decoded, as long inputs are multiplied.
        graph: bytes that a token leaves in a block for the backward pass.
        logits: bytes that a token's logits take, with their gradient and the other model's.
        boundary: bytes of a token's hidden state between blocks. blocks: how many.
    """

    fixed: int
    trained: int
    largest: int
    weights: int
    packed: int
    dense: int
    graph: int
    logits: int
    boundary: int
    blocks: int

    def peak(self, tokens: int, *, lean: bool, checkpointing: bool) -> int:
        """Bytes on the device with so many tokens in a forward and backward pass, as predicted."""
        state = (LEAN_STATE if lean else TRAINER_STATE) * self.trained
        # the scales as they are stored, of the blocks whose graph is alive; and gradients of one block
        passing = 4 * self.largest * (2 if lean else 1)
        kept = 0 if lean else self.boundary * self.blocks
        if not lean and not checkpointing:
            kept, passing = self.graph * (self.blocks - 1), 4 * self.trained
        at_once = max(self.graph * tokens + self.dense, self.logits * min(tokens, HEAD_TOKENS))
        return round(self.fixed + state + passing + kept * tokens + at_once)

    def most(self, micro: int, seqlen: int, free: int, must: bool) -> int:
        """Samples in a pass without a GPU: `micro`, or by halves as many as have room. One, even if it has none, or
        PlanishError, if it must have it."""
        while micro and MARGIN * self.peak(micro * seqlen, lean=False, checkpointing=False) > free:
            micro //= 2
        if must and not micro:
            raise PlanishError(f"not even one sample of {seqlen} tokens has room in {gigabytes(free)} of host memory")
        return max(micro, 1)

    @property
    def waiting(self) -> int:
        """Bytes in host memory behind fitted blocks: their packed layers, then the start and the best state."""
        return self.packed + 8 * self.trained

    def host(self, tokens: int) -> int:
        """Bytes in host memory in the lean way, with so many tokens in a step: what enters blocks, the best state."""
        return self.boundary * self.blocks * tokens + 4 * self.trained


@dataclass(frozen=True, kw_only=True)
class WholePlan:
    """How a whole-model stage will train: which way, samples in a pass, and the bytes on the device, of `free`."""

    lean: bool
    micro_batch: int
    bytes: int
    free: int
    by_trainer: int

    def summary(self) -> str:
        """One line for a user."""
        other = f"; by the Trainer {gigabytes(self.by_trainer)}" if self.lean else ""
        return (
            f"trained {'lean, one block at a time' if self.lean else 'by the Trainer'}: {gigabytes(self.bytes)} of GPU "
            f"memory for {self.micro_batch} samples in a pass, {gigabytes(self.free)} free{other}"
        )


def plan_whole(
    size: WholeSize,
    *,
    seqlen: int,
    batch_size: int,
    micro_batch: int,
    checkpointing: bool,
    lean: bool | None,
    free: int,
    host: int,
) -> WholePlan:
    """Choose how a whole-model stage trains on a GPU; pure.

    The Trainer if it fits with a margin, with fewer samples in a pass if need be; else the lean way.

    Args:
        batch_size: samples in a step. micro_batch: in a pass, at most.
        lean: the user's word, which stands even if it isn't predicted to fit.
        free: bytes of GPU memory for all of it, the model included. host: of host memory.

    Raises:
        PlanishError: if neither way fits.
    """

    def peak(way: bool, micro: int) -> int:
        return size.peak(micro * seqlen, lean=way, checkpointing=checkpointing)

    def made(way: bool, micro: int) -> WholePlan:
        return WholePlan(lean=way, micro_batch=micro, bytes=peak(way, micro), free=free, by_trainer=peak(False, 1))

    micros = [micro_batch >> shift for shift in range(micro_batch.bit_length())]
    for way in (False, True) if lean is None else (lean,):
        for micro in micros:
            # the last resort is tried without a margin
            if peak(way, micro) * (MARGIN if not way or micro > 1 else 1) <= free:
                if way:
                    _check_host(size.host(batch_size * seqlen), host, batch_size)
                return made(way, micro)
    if lean is not None:
        return made(lean, 1 if lean else micro_batch)
    mend = "use shorter samples (--seqlen)"
    if size.peak(0, lean=True, checkpointing=True) > free:
        mend = "quantize to fewer bits or larger groups, or take a larger GPU"
    raise PlanishError(
        f"training takes {gigabytes(peak(True, 1))} of GPU memory even one block and one sample of {seqlen} tokens "
        f"at a time, and {gigabytes(free)} are free; {mend}"
    )


def _check_host(need: int, host: int, batch_size: int) -> None:
    if MARGIN * need > host:
        raise PlanishError(
            f"lean training keeps {gigabytes(need)} in host memory for {batch_size} samples a step, and "
            f"{gigabytes(host)} are free; lower the recipe's batch_size, or use shorter samples (--seqlen)"
        )


def check_waiting(size: WholeSize, host: int) -> None:
    """Refuse a stage for which what waits behind the blocks has no room: a run would be killed there, hours in.

    Args:
        host: bytes of host memory that are free.

    Raises:
        PlanishError: if they are too few.
    """
    if MARGIN * size.waiting > host:
        raise PlanishError(
            f"packed layers and the best state take {gigabytes(size.waiting)} of host memory, and {gigabytes(host)} "
            "are free; take a machine with more, or a recipe that ends with the blocks"
        )


def measure_room(device: torch.device, folder: Path) -> Room:
    """What is free now. `folder` need not exist yet; what lies in it already counts as free."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    inside = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0
    return Room(
        device=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0,
        host=host_memory(),
        disk=shutil.disk_usage(existing).free + inside,
        folder=folder,
    )


def gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process has, in use or not, or may still take."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def host_memory() -> int:
    """Bytes that this process may still take: what the system has available, or its container, if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([free, *(left for files in _CGROUPS if (left := _left(*map(Path, files))) is not None)])


def _left(limit: Path, used: Path, stat: Path) -> int | None:
    """What a control group has left, counting cached files as free; None where there is no limit."""
    try:
        most, taken = int(limit.read_text()), int(used.read_text())
        cached = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return None
    return max(0, most - taken + int(cached.get("active_file", 0)) + int(cached.get("inactive_file", 0)))


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """'40 s', '12 min' or '3.5 h'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
