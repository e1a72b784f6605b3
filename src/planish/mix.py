"""Mix: windows of several sources in equal shares, and windows to watch that come from another one.

    data:    SOURCE                      as `planish.data` has it
             SOURCE[:WEIGHT],...         shares of the tokens are equal, or as the weights are; also as a list
             self                        as any source: text that the float model writes itself
    order:   watched, then trained on    what is trained on is shuffled by the seed

A fit holds out the first windows and keeps the state that is best on them. Where they are from another source than
those that it learns from, it can't overfit unseen: so of a mix, windows of the embedded text are watched, unless that
is in the mix. A mix is packed source by source. Knows nothing of models; what `self` gives comes from the caller.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from planish.errors import PlanishError

SELF, EMBEDDED = "self", "embedded"

Data = str | Path | Tensor | Sequence[str | Path]
Text = str | Path | Tensor
# (source, how many windows) -> tensors [windows, ...] that belong together, and a note ("" for none)
Cut = Callable[[Text, int], tuple[tuple[Tensor, ...], str]]

_WEIGHTED = re.compile(r"(?P<source>.+):(?P<weight>\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Part:
    """A source and its weight, which is above 0."""

    source: Text
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Windows as a run takes them.

    Args:
        tensors: [windows, ...] each, what is watched first.
        notes: for the user.
        watched: the source that the first windows are of, if they are not of those that are trained on; else "".
    """

    tensors: tuple[Tensor, ...]
    notes: tuple[str, ...] = ()
    watched: str = ""


def parts(data: Data) -> tuple[Part, ...]:
    """The sources of a mix, or the one that there is.

    Raises:
        PlanishError: if a source is empty or named twice, or a weight is 0.
    """
    if isinstance(data, Tensor | Path) or (isinstance(data, str) and ("," not in data or _is_file(data))):
        return (Part(data),)
    named = data.split(",") if isinstance(data, str) else list(data)
    if not named or not all(isinstance(item, str | Path) and str(item).strip() for item in named):
        raise PlanishError(f"{data!r} has a source without a name; write a mix as one.txt,two.jsonl:2")
    if len(named) == 1:
        return (Part(named[0]),)
    found = tuple(map(_part, named))
    names = [str(part.source) for part in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PlanishError(f"{twice} is in the mix twice; give it a weight instead, as {twice}:2")
    return found


def name_of(data: Data) -> str:
    """A mix or a source as run.json calls it."""
    if isinstance(data, Tensor):
        return "token ids"
    return str(data) if isinstance(data, str | Path) else ",".join(map(str, data))


def is_own(source: Text) -> bool:
    """Whether the model shall write it."""
    return isinstance(source, str) and source == SELF


def needs_tokenizer(*several: Data | None) -> bool:
    """Whether any of these is text."""
    return any(data is not None and not isinstance(data, Tensor) for data in several)


def blend(data: Data, cut: Cut, samples: int, *, seed: int, watch: Data | None = None, holdout: int = 0) -> Blend:
    """Windows of a mix, in the order described above.

    Args:
        cut: gives windows of one source, at most so many; is asked for `self` last, since that takes longest.
        samples: how many windows in all, those watched included.
        seed: of the shuffle.
        watch: the source to watch; of a mix the embedded text, if not given.
        holdout: how many windows the fit holds out at most; 0 if there is none.

    Raises:
        PlanishError: what `parts` and `cut` raise; if what is watched is trained on too, or there are fewer samples
            than sources.
    """
    mixed = parts(data)
    watched = _watched(mixed, watch, holdout)
    if watched is None and len(mixed) == 1:
        tensors, note = cut(mixed[0].source, samples)
        return Blend(tensors=tensors, notes=(note,) if note else ())
    held = 0 if watched is None else max(1, min(holdout, samples // 4))
    counts = shares(samples - held, [part.weight for part in mixed])
    if min(counts) < 1:
        raise PlanishError(f"{samples} samples are too few for the shares of {name_of(data)}; give more --samples")
    asked = [*zip(range(len(mixed)), mixed, counts, strict=True)]
    if watched is not None:
        asked.append((-1, Part(watched), held))
    asked.sort(key=lambda one: is_own(one[1].source))
    cuts = {index: cut(part.source, count) for index, part, count in asked}
    notes = tuple(note for _, note in cuts.values() if note)
    ahead = cuts.pop(-1)[0] if watched is not None else None
    joined = tuple(torch.cat(pieces) for pieces in zip(*(cuts[index][0] for index in sorted(cuts)), strict=True))
    order = torch.randperm(len(joined[0]), generator=torch.Generator().manual_seed(seed))
    tensors = tuple(tensor[order] for tensor in joined)
    if ahead is not None:
        # a fit holds out a quarter at most: so many that none is left over to be trained on
        kept = min(held, max(1, len(order) // 3))
        tensors = tuple(torch.cat([first[:kept], rest]) for first, rest in zip(ahead, tensors, strict=True))
    return Blend(tensors=tensors, notes=notes, watched="" if watched is None else name_of(watched))


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided by weights, by largest remainder; earlier ones first where these are equal."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda index: counts[index] - exact[index])
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _watched(mixed: Sequence[Part], watch: Data | None, holdout: int) -> Text | None:
    names = [name_of(part.source) for part in mixed]
    if watch is None:
        return EMBEDDED if holdout and len(mixed) > 1 and EMBEDDED not in names else None
    found = parts(watch)
    if len(found) > 1:
        raise PlanishError(f"what is watched is one source, not {name_of(watch)}")
    if not holdout:
        raise PlanishError(f"nothing is fitted, so that nothing is watched; drop watch={name_of(watch)}")
    if name_of(found[0].source) in names:
        raise PlanishError(f"{name_of(watch)} is trained on, and can't be watched too; name another source")
    return found[0].source


def _part(item: str | Path) -> Part:
    text = str(item).strip()
    match = None if _is_file(text) else _WEIGHTED.fullmatch(text)
    if match is None:
        return Part(text)
    if not float(match["weight"]):
        raise PlanishError(f"{text}: a weight must be above 0; leave the source out")
    return Part(match["source"], float(match["weight"]))


def _is_file(text: str) -> bool:
    path, _, field = text.partition("#")
    return "," not in field and Path(path).is_file()
