"""The command line: verbs, each a thin call of the Python API.

    planish quantize | finetune | export | plan | recipes | eval | generate | bench | info | report

What a user can mend is one line on stderr and exit status 2. This folder knows nothing of methods, formats or models.
"""

import sys
import warnings
from typing import Any

from rich.console import Console

from planish.cli import make, read  # noqa: F401  (their verbs register themselves)
from planish.cli.app import app
from planish.cli.show import say
from planish.errors import PlanishError

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of `planish`."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            app()
        except PlanishError as error:
            say(f"planish: {error}", Console(stderr=True), style="red")
            sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    say(f"warning: {message}", Console(stderr=True), style="yellow")
