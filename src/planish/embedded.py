"""Embedded text: English prose that every CPython carries, so that a first run needs no download.

    embedded       docstrings of a fixed list of standard-library modules: calibration
    embedded-eval  the language reference that `help()` shows (pydoc_data.topics): evaluation

The two share no passage. Sources are parsed, never imported; a module that a Python lacks is skipped, so
the text differs a little from one Python version to the next (run.json records the hash of its tokens).
This file knows nothing of tokens or models.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from planish.errors import PlanishError

# shorter docstrings are labels ("Return the name."), not prose
MIN_CHARACTERS = 80
# a part of the text is of modules so many names apart: neighbours in the alphabet are often of one family
STRIDE = 9

_NAMES = """
_pydatetime _pydecimal _pyio argparse ast asyncio base64 bdb bz2 calendar cmd code codecs collections concurrent
configparser contextlib copy csv dataclasses datetime difflib dis doctest email enum fileinput fractions ftplib
functools getopt gettext graphlib gzip heapq hmac html http imaplib importlib inspect ipaddress json locale
logging lzma mailbox mimetypes multiprocessing numbers optparse os pathlib pickle pickletools pkgutil platform
plistlib poplib profile pstats pyclbr pydoc queue random re sched secrets selectors shelve shutil smtplib socket
socketserver ssl statistics string subprocess tarfile tempfile textwrap threading timeit tokenize trace
traceback types typing unittest urllib uuid wave weakref webbrowser wsgiref xml xmlrpc zipfile
"""
MODULES = tuple(_NAMES.split())


def calibration(at_most: int | None = None) -> list[str]:
    """Docstrings of MODULES, one document a module, in a fixed order.

    Args:
        at_most: parse modules until they hold this many characters; all if not given, which takes a second or more.

    Raises:
        PlanishError: if this Python carries no sources (a stripped installation).
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    for name in (name for first in reversed(range(STRIDE)) for name in MODULES[first::STRIDE]):
        if at_most is not None and sum(map(len, found.values())) >= at_most:
            break
        if text := _docstrings(library, name):
            found[name] = "\n\n".join(text)
    if not found:
        raise PlanishError(f"this Python has no library sources in {library}; give a text with --data FILE")
    return [found[name] for name in MODULES if name in found]


def evaluation() -> list[str]:
    """Topics of the language reference, sorted by name.

    Raises:
        PlanishError: if this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise PlanishError("this Python has no pydoc_data.topics; give a text file instead") from error
    return [topics[name].strip() for name in sorted(topics)]


def _docstrings(library: Path, name: str) -> list[str]:
    package = library / name
    files = sorted(package.rglob("*.py")) if package.is_dir() else [library / f"{name}.py"]
    found: list[str] = []
    for file in files:
        if file.is_file():
            found += _docstrings_of(ast.parse(file.read_bytes()))
    return [text for text in found if len(text) >= MIN_CHARACTERS]


def _docstrings_of(owner: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Of a module, class or function and of those right inside it, in the order of the source."""
    yield ast.get_docstring(owner) or ""
    for node in owner.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_of(node)
