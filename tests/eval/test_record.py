"""eval.json: figures are kept beside a checkpoint; the same measurement replaces itself, another joins it."""

import json
from pathlib import Path

from planish.eval.record import NAME, read, record_perplexity


def test_a_figure_is_kept_and_replaced(tmp_path: Path) -> None:
    text = tmp_path / "wiki.test.raw"
    text.write_text("words")
    record_perplexity(tmp_path, str(text), 2048, None, 30.0)
    record_perplexity(tmp_path, str(text), 512, 4, 40.0)
    record_perplexity(tmp_path, str(text), 2048, None, 22.5)
    found = read(tmp_path)["perplexity"]
    assert [(entry["data"], entry["seqlen"], entry["limit"], entry["value"]) for entry in found] == [
        ("wiki.test.raw", 512, 4, 40.0),
        ("wiki.test.raw", 2048, None, 22.5),
    ]


def test_other_figures_stay(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps({"tasks": {"piqa": {"acc": 0.5}}}))
    record_perplexity(tmp_path, "embedded-eval", 64, None, 9.0)
    assert read(tmp_path)["tasks"] == {"piqa": {"acc": 0.5}} and len(read(tmp_path)["perplexity"]) == 1


def test_another_tools_file_is_no_record(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
    for content in ("[]", "{", "3"):
        (tmp_path / NAME).write_text(content)
        assert read(tmp_path) == {}
