"""What a run says of itself: events while it goes, and run.json, the manifest that it leaves.

Knows nothing of terminals: the command line draws events, a library user may ignore them.
"""

import dataclasses
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MAX_BYTES = 64 << 20  # of a run.json; one of thousands of experts takes a few million


@dataclass(frozen=True, kw_only=True)
class Event:
    """One step of progress.

    Args:
        stage: what is being done, such as "signround".
        index, total: spans done and spans in all.
        name: the span, such as "model.layers.3".
        before, after: held-out loss at step 0 and of the state that was kept; None where nothing is fitted.
        seconds: since the start. eta: seconds left, an estimate.
        peak_bytes: most memory in use so far, on the device (GPU) or of the process (CPU).
        note: something a user should know, such as a lowered rate.
    """

    stage: str
    index: int
    total: int
    name: str = ""
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    eta: float | None = None
    peak_bytes: int = 0
    note: str = ""


Progress = Callable[[Event], None]


@dataclass(kw_only=True)
class RunManifest:
    """run.json: everything that decides the result, and the figures of the run.

    `watched` is the source that the state kept is the best on, if it isn't among `data`. `calibration` is what the
    blocks were calibrated on, if that isn't `data`. `figures` holds timings and losses; two runs with equal manifests
    apart from it wrote equal weights.
    """

    model: str
    recipe: str
    keys: dict[str, Any]
    scheme: str
    layers: dict[str, str]
    format: str
    data: str
    data_sha256: str
    samples: int
    seqlen: int
    seed: int
    watched: str = ""
    calibration: str = ""
    calibration_sha256: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of_unknown(cls, model: str, layers: dict[str, str], format: str) -> "RunManifest":
        """Of a model that is quantized, nobody says how: it has no recipe, and isn't written."""
        return cls(
            model=model,
            recipe="",
            keys={},
            scheme="",
            layers=layers,
            format=format,
            data="",
            data_sha256="",
            samples=0,
            seqlen=0,
            seed=0,
        )

    @classmethod
    def read(cls, folder: Path) -> "RunManifest | None":
        """The manifest in a folder, or None if it has none; another tool's run.json is none."""
        try:
            file = folder / "run.json"
            if file.stat().st_size > MAX_BYTES:
                return None
            found = cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return found if isinstance(found.keys, dict) and isinstance(found.figures, dict) else None


def versions() -> dict[str, str]:
    """Of what decides a result bit for bit."""
    packages = {name: importlib.metadata.version(name) for name in ("planish", "torch", "transformers")}
    return {**packages, "python": platform.python_version()}


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: on a GPU what torch held there, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Clock:
    """Seconds since the start and an estimate of what is left."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def eta(self, done: int, total: int) -> float | None:
        return self.seconds / done * (total - done) if done else None
