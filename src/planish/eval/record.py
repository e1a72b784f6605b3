"""eval.json: what was measured of a checkpoint, kept beside it for `planish report` and the model card.

    {"perplexity": [{"data": "wiki.test.raw", "seqlen": 2048, "limit": null, "value": 22.8}],
     "tasks": {"piqa": {"acc": 0.68, "stderr": 0.01}, "mmlu, 5-shot": {...}},
     "agreement": [{"with": "org/name", "prompts": "embedded-prompts", "kl": 0.01, "kl_stderr": 0.001,
                    "top1": 0.95, "top1_stderr": 0.004, "tokens": 3900, "count": 32}]}
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planish.checkpoint import replace

NAME = "eval.json"


def read(folder: Path) -> dict[str, Any]:
    """What was measured of a checkpoint; empty if nothing was, or another tool's file has that name."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def record_perplexity(folder: Path, data: str, seqlen: int, limit: int | None, value: float) -> Path | None:
    """Keep a perplexity; one measured before on the same text in the same way is replaced.

    Args:
        data: a path, of which only the last part is kept, or the name of a data set.

    Returns:
        The file, or None if the folder can't be written to.
    """
    entry = {"data": _short(data), "seqlen": seqlen, "limit": limit}
    return _add(folder, "perplexity", entry, {"value": value})


def record_agreement(folder: Path, model: str, prompts: str, values: Mapping[str, float]) -> Path | None:
    """Keep the agreement with a float model on prompts; `record_perplexity` says how."""
    return _add(folder, "agreement", {"with": _short(model), "prompts": _short(prompts)}, values)


def record_tasks(
    folder: Path, tasks: Mapping[str, Mapping[str, float]], shots: int | None, limit: int | None
) -> Path | None:
    """Keep what was measured of tasks, each under its name and how it was asked: 'mmlu, 5-shot, first 100'."""
    how = (f", {shots}-shot" if shots is not None else "") + (f", first {limit}" if limit is not None else "")
    known = read(folder)
    found = {name + how: dict(metrics) for name, metrics in tasks.items()}
    return _write(folder, {**known, "tasks": {**known.get("tasks", {}), **found}})


def _add(folder: Path, kind: str, entry: Mapping[str, Any], values: Mapping[str, Any]) -> Path | None:
    """Add to a list of measurements; one of the same thing is replaced."""
    known = read(folder)
    others = [old for old in known.get(kind, []) if {key: old.get(key) for key in entry} != entry]
    return _write(folder, {**known, kind: [*others, {**entry, **values}]})


def _write(folder: Path, content: Mapping[str, Any]) -> Path | None:
    if not os.access(folder, os.W_OK):
        return None
    replace(folder / NAME, content)
    return folder / NAME


def _short(source: str) -> str:
    """A name without the folders that it lies in."""
    return Path(source).name if Path(source).exists() else source
