"""eval.json: figures are kept beside a checkpoint; the same measurement replaces itself, another joins it."""

import json
from pathlib import Path

from planish.eval.record import NAME, read, record_agreement, record_perplexity, record_tasks


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


def test_tasks_are_kept_by_how_they_were_asked(tmp_path: Path) -> None:
    record_tasks(tmp_path, {"piqa": {"acc": 0.5, "stderr": 0.1}}, None, None)
    record_tasks(tmp_path, {"piqa": {"acc": 0.6, "stderr": 0.1}}, 5, 100)
    record_tasks(tmp_path, {"piqa": {"acc": 0.7, "stderr": 0.1}}, None, None)
    assert read(tmp_path)["tasks"] == {
        "piqa": {"acc": 0.7, "stderr": 0.1},
        "piqa, 5-shot, first 100": {"acc": 0.6, "stderr": 0.1},
    }


def test_agreement_is_kept_by_model_and_prompts(tmp_path: Path) -> None:
    for model, kl in (("org/name", 0.3), (str(tmp_path), 0.2), ("org/name", 0.1)):
        record_agreement(tmp_path, model, "embedded-prompts", {"kl": kl})
    found = read(tmp_path)["agreement"]
    assert [(entry["with"], entry["kl"]) for entry in found] == [(tmp_path.name, 0.2), ("org/name", 0.1)]
