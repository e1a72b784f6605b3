"""eval.json: what was measured of a checkpoint, kept beside it for `planish report` and the model card.

    {"perplexity": [{"data": "wiki.test.raw", "seqlen": 2048, "limit": null, "value": 22.8}],
     "tasks": {"piqa": {"acc": 0.68, "stderr": 0.01}}}
"""

import json
import os
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
    entry = {"data": Path(data).name if Path(data).is_file() else data, "seqlen": seqlen, "limit": limit}
    known = read(folder)
    others = [old for old in known.get("perplexity", []) if {key: old.get(key) for key in entry} != entry]
    if not os.access(folder, os.W_OK):
        return None
    replace(folder / NAME, {**known, "perplexity": [*others, {**entry, "value": value}]})
    return folder / NAME
