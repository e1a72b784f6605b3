"""Commands that the documents show are ones that the command line takes: verbs, options, recipes, presets, keys."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from planish.cli import app
from planish.mix import parts
from planish.recipes import RECIPES, build
from planish.scheme import Scheme

ROOT = Path(__file__).resolve().parents[1]
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def commands(document: str) -> list[str]:
    lines = (ROOT / document).read_text().splitlines()
    return [line.partition(" #")[0].strip() for line in lines if re.match(r" {4}planish [a-z]+ ", line)]


SHOWN = [(name, line) for name in ("README.md", "docs/reproduce.md") for line in commands(name)]


@pytest.mark.parametrize(("document", "line"), SHOWN, ids=[line[:60] for _, line in SHOWN])
def test_commands_that_are_shown_are_taken(document: str, line: str) -> None:
    _, verb, *words = shlex.split(line)
    taken = VERBS[verb].make_context(verb, words).params  # an unknown option raises
    if "recipe" in taken:
        keys = dict(pair.split("=") for pair in taken["pairs"] or [])
        assert build(taken["recipe"], taken["preset"], keys).stages
        assert taken["scheme"] is None or Scheme.parse(taken["scheme"])
    assert parts(taken.get("data") or "embedded")


def test_every_recipe_has_its_figures_and_its_command() -> None:
    text = (ROOT / "docs" / "reproduce.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert set(RECIPES) <= set(sections)
    for name in RECIPES:
        shown = rf"^    planish .*--recipe {name}\b|^    planish quantize .*--bits"
        assert re.search(shown, sections[name], re.M), name
    assert "--protocol gptq --seqlen 2048" in text and "BOS" in text
