"""Plan: what a run will need, said before it starts, and refused if it isn't there.

    bytes of a stream = samples * tokens * hidden * bytes of an activation

Streams of activations go to the device if all of them take less than a third of its free memory, else to host
memory if they take less than HOST_SHARE of what is available, else to files. Knows nothing of recipes.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from planish.errors import PlanishError
from planish.stream import STORAGES

DEVICE_SHARE, HOST_SHARE = 1 / 3, 0.6

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


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
