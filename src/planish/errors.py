"""What Planish says to a user whose input is wrong: one line that names the thing and the mend.

Everything a user can cause is raised as one of these; the command line prints the message without a
traceback and exits with 2. What only a bug can cause is an `assert`.
"""

import difflib
from collections.abc import Iterable


class PlanishError(ValueError):
    """Bad input, named, with the way to mend it."""


class UnsupportedScheme(PlanishError):
    """A scheme that a format, a kernel or a layer can't hold; names the layer and the reason."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for a mistyped word, or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there is: {', '.join(names) or 'none'}"


def first_line(error: Exception) -> str:
    """What another library's error says first, to quote in one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
