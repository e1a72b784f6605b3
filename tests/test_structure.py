"""The house itself: imports run downward, files and functions stay short, nothing unsafe is called.

Rows and walls are those of docs/design.md.
"""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "planish"
FILES = sorted(SOURCE.rglob("*.py"))

ROWS = {
    "errors": 0, "scheme": 0, "bitstream": 0, "qtensor": 0, "dist": 0, "log": 0, "charts": 0,
    "quant": 1, "kernels": 1, "arch": 1, "data": 1, "embedded": 1, "checkpoint": 1, "source": 1, "guard": 1,
    "shards": 1, "gguf_header": 1, "edges": 1, "experts": 1, "attention": 2, "attend": 2,
    "skeleton": 1, "naming": 1, "feed": 1, "journal": 1, "instruct": 1, "mix": 1,
    "adapter": 1, "transform": 2, "formats": 2, "stream": 2, "targets": 2, "tables": 2,
    "fit": 3,
    "recipes": 4,
    "eval": 5, "decode": 5, "plan": 5, "report": 5, "folder": 5, "run": 5, "trainable": 5, "tune": 5, "tuning": 6,
    "request": 5, "card": 5, "own_text": 5, "forecast": 5, "inside": 5, "widths": 5, "needs": 5, "probe": 5,
    "shadow": 5, "inexact": 5, "ways": 5, "teacher": 5,
    "gguf_file": 5, "results": 5, "hf": 5, "gguf_tokenizer": 5, "transcode": 6, "bench": 6,
    "api": 6,
    "__init__": 7, "cli": 7, "demo": 7, "__main__": 8,
}
# pairs (importer, imported) that the rows would allow
WALLS = {("recipes", "kernels"), ("recipes", "formats"), ("fit", "formats")}
# outside packages that only some parts may import, and those that nobody may: they can run what they read
HOMES = {"triton": {"kernels"}, "humming": {"kernels"}, "accelerate": {"fit"}, "lm_eval": {"eval"}, "typer": {"cli"},
         "rich": {"cli"}}
UNSAFE_PACKAGES = ("pickle", "dill", "joblib", "shelve", "marshal")
# it sets what torch asks the environment for before it adds in a fixed order
WRITES = SOURCE / "fit" / "repeat.py"
UNSAFE_CALLS = ("torch.load", "torch.save", "eval", "exec", "os.system", "yaml.load")

MAX_FILE, MAX_FUNCTION, MAX_PACKAGE = 500, 60, 25_760


def part(path: Path) -> str:
    """The top-level module or folder that a file belongs to."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> list[str]:
    """Absolute dotted names of everything imported, at the top or inside functions."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write planish.… in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def inner(name: str) -> str | None:
    """The part of Planish that an imported name lies in, or None if it is another package's."""
    words = name.split(".")
    if words[0] != "planish":
        return None
    return words[1] if len(words) > 1 and words[1] in ROWS else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_downward(path):
    own = part(path)
    assert own in ROWS, f"{own} has no row; give it one here and in docs/design.md"
    upward = [f"{own} imports {name}" for name in imports(ast.parse(path.read_text()))
              if (other := inner(name)) is not None and (ROWS[other] > ROWS[own] or (own, other) in WALLS)]
    assert upward == []


def test_parts_of_a_row_make_no_circle():
    # within a row, parts may use each other as long as that makes no circle
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        others = {inner(name) for name in imports(ast.parse(path.read_text()))} - {None, part(path)}
        arrows.setdefault(part(path), set()).update(others)
    while leaves := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for leaf in leaves:
            del arrows[leaf]
    assert arrows == {}, "these import each other in a circle"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_outside_packages_stay_in_their_homes(path):
    for name in imports(ast.parse(path.read_text())):
        package = name.split(".")[0]
        assert part(path) in HOMES.get(package, {part(path)}), f"{package} belongs to {HOMES[package]}"
        assert not (part(path) in ("quant", "formats", "kernels") and package == "transformers"), name
        assert package not in UNSAFE_PACKAGES, f"{package} can run what it reads"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_sizes_and_opening(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= MAX_FILE
    assert ast.get_docstring(tree), "a file opens by saying what it is"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    # decorators don't count, docstrings do
    long = [f.name for f in functions if f.end_lineno - f.lineno + 1 > MAX_FUNCTION]
    assert long == []


def test_size_of_the_whole():
    assert sum(path.read_text().count("\n") for path in FILES) <= MAX_PACKAGE


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_unsafe_is_called(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in UNSAFE_CALLS, f"line {node.lineno}"
            trusting = [ast.unparse(k.value) for k in node.keywords if k.arg == "trust_remote_code"]
            assert "True" not in trusting, f"line {node.lineno}: trusts remote code unasked"
        elif isinstance(node, ast.Attribute) and path != WRITES:
            assert ast.unparse(node) not in ("os.environ", "os.getenv"), "the environment changes no number"
        elif isinstance(node, ast.Global):
            pytest.fail(f"line {node.lineno}: a global")
