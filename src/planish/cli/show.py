"""What the command line prints: lines, tables, sizes, progress."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from planish.log import Event


def say(text: str, console: Console | None = None, style: str | None = None) -> None:
    (console or Console()).print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def show_event(event: "Event") -> None:
    """One line for each span: block, loss, time left, memory; a note above it."""
    if event.note:
        say(f"    {event.note}")
    if not event.index:
        return
    words = [f"{event.stage} {event.index:>3}/{event.total}"]
    if event.before is not None and event.after is not None:
        words.append(f"loss {event.before:.3e} -> {event.after:.3e}")
    if event.eta is not None:
        words.append(f"{clock(event.eta)} left")
    if event.peak_bytes:
        words.append(f"peak {size(event.peak_bytes)}")
    say("   ".join(words))


def show_recipe(facts: dict[str, Any]) -> None:
    say(f"{facts['name']}: {facts['summary']}\n\n    {facts['equation']}\n")
    table = Table("key", "default", "meaning", box=None)
    for key, default in facts["keys"].items():
        table.add_row(key, str(default), facts["help"].get(key, ""))
    Console().print(table)
    say("\npresets")
    for name, keys in facts["presets"].items():
        say(f"    {name:<8} {pairs_text(keys)}")


def show_linears(shapes: dict[str, tuple[int, int]], schemes: dict[str, str], every: bool) -> None:
    """Linears by name, or those that are alike but for the block's number in one row."""
    rows: dict[tuple[str, str, str], int] = {}
    for name, (out_features, in_features) in shapes.items():
        shown = name if every else re.sub(r"\.\d+\.", ".*.", name, count=1)
        row = (shown, f"{out_features} x {in_features}", schemes[name])
        rows[row] = rows.get(row, 0) + 1
    table = Table("linear", "out x in", "scheme", "count", box=None)
    for row, count in rows.items():
        table.add_row(*row, str(count))
    Console().print(table)


def pairs_text(keys: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in keys.items())


def disk_bytes(path: Path) -> int:
    """Of a file, or of the files in a folder."""
    return (
        path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    )


def size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
