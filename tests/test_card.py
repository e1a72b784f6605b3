"""The model card says what the manifest says, how to load it where it loads, and nothing that isn't known."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from planish import card
from planish.card import model_card
from planish.log import RunManifest
from planish.targets import Verdict

LAYERS = {"model.layers.0.mlp.up_proj": "w2g64", "model.layers.0.mlp.gate_proj": "w2g64",
          "model.layers.0.mlp.down_proj": "w4g64"}  # fmt: skip
VERDICTS = [
    Verdict(target="vllm", loads=True, how="pip install kernels; vllm serve {path}", checked="not run; vLLM PR #1"),
    Verdict(target="sglang", loads=False, how="", checked="", reason="doesn't read it"),
    Verdict(target="transformers", loads=True, checked="auto-round 0.16.1, run",
            how='pip install auto-round; AutoModelForCausalLM.from_pretrained("{path}")'),
]  # fmt: skip


def manifest(**changes: Any) -> RunManifest:
    known = {"model": "org/Name-1B", "recipe": "signround", "keys": {"steps": 200, "lr": 0.005},
             "scheme": "w2g64, down_proj=w4g64", "layers": LAYERS, "format": "auto_round", "data": "wiki.train.raw",
             "data_sha256": "ab" * 32, "samples": 128, "seqlen": 2048, "seed": 7,
             "versions": {"planish": "0.1.0", "torch": "2.13.0"},
             "figures": {"seconds": 1234.5, "peak_bytes": 3 * 2**29, "losses": [[0.9, 0.5]],
                         "bits_per_weight": 2.875}}  # fmt: skip
    return RunManifest(**{**known, **changes})


def front(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in head.splitlines())}


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "verdicts", lambda format, schemes: VERDICTS)


def test_front_matter() -> None:
    text = model_card(manifest())
    assert text.startswith("---\n")
    assert front(text) == {
        "base_model": "org/Name-1B", "base_model_relation": "quantized", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["planish", "auto-round", "2-bit", "4-bit"],
    }  # fmt: skip
    assert "license" not in text


def test_what_is_known_is_said() -> None:
    evaluation = {"perplexity": [{"data": "wiki.test.raw", "value": 22.81, "seqlen": 2048, "limit": None}],
                  "tasks": {"piqa": {"acc": 0.6789, "stderr": 0.0123}}}  # fmt: skip
    text = model_card(manifest(), evaluation=evaluation)
    assert "org/Name-1B with 3 linears in 2 and 4 bits, by Planish's recipe `signround`, in the format" in text
    for line in ("| recipe | `signround steps=200 lr=0.005`, seed 7 |", "| linears | w2g64 x 2, w4g64 x 1 |",
                 f"| data | `wiki.train.raw`, 128 x 2048 tokens, sha256 `{'ab' * 32}` |",
                 "| versions | planish 0.1.0, torch 2.13.0 |",
                 "| perplexity | `wiki.test.raw`, windows of 2048 tokens | 22.81 |",
                 "| acc | `piqa` | 0.6789 ± 0.0123 |"):  # fmt: skip
        assert line in text.splitlines()
    assert "| bits a weight | 2.88 " in text


def test_a_calibration_of_its_own_is_said(tmp_path: Path) -> None:
    (tmp_path / "web.txt").write_text("text")
    text = model_card(manifest(calibration=str(tmp_path / "web.txt"), calibration_sha256="cd" * 32))
    assert f"| blocks calibrated on | `web.txt`, sha256 `{'cd' * 32}` |" in text.splitlines()
    assert "blocks calibrated on" not in model_card(manifest())


def test_what_is_not_known_is_left_out() -> None:
    unknown = manifest(model="/home/someone/models/tiny", recipe="", keys={}, scheme="", data="", data_sha256="",
                       samples=0, seqlen=0, versions={}, figures={})  # fmt: skip
    text = model_card(unknown)
    assert "base_model" not in front(text) and "someone" not in text and "# tiny, w2g64 x 2, w4g64 x 1" in text
    made = text[text.index("## How it was made") : text.index("## How to load")]
    assert re.findall(r"^\| (\w[\w ]*)", made, re.MULTILINE) == ["linears "]
    assert "## Measured" not in text and "recipe" not in text and "None" not in text


def test_a_folder_beside_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = model_card(manifest(model="models/tiny"))
    assert "base_model" not in front(text) and "models/tiny" not in text


def test_only_what_loads_it_is_named_with_its_lines_and_how_that_is_known() -> None:
    text = model_card(manifest(), path="org/Name-2bit")
    assert "SGLang" not in text
    lines = "pip install kernels\nvllm serve org/Name-2bit"
    assert f"### vLLM\n\n```sh\n{lines}\n```\n\nNot run; read from vLLM PR #1." in text
    assert ("```sh\npip install auto-round\n```\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("org/Name-2bit")\n```\n\n'
            "Checked with auto-round 0.16.1.") in text  # fmt: skip
    assert 'planish.load("org/Name-2bit")' in text and "planish.register()" in text
    assert "{" not in text


def test_a_gguf_is_not_loaded_by_planish(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = Verdict(target="llama.cpp", loads=True, how="llama-cli -m {path}", checked="llama-cpp-python, run")
    monkeypatch.setattr(card, "verdicts", lambda format, schemes: [llama])
    text = model_card(manifest(format="gguf"), path="model.gguf")
    assert "planish.load" not in text and "llama-cli -m model.gguf" in text and front(text)["library_name"] == "gguf"


def test_a_stage_of_the_whole_model() -> None:
    figures = {"seconds": 60.0, "end_to_end": [2.5, 2.25], "bits_per_weight": 2.5}
    text = model_card(manifest(figures=figures))
    assert "| held-out loss, end to end | 2.5000 before, 2.2500 after |" in text


@pytest.mark.parametrize(("format", "scheme", "titles"), [
    ("auto_round", "w2g64", {"vLLM", "transformers, without Planish"}),
    ("gptq", "w4g128", {"vLLM", "SGLang", "transformers, without Planish"}),
    ("native", "w3g40", set()),
])  # fmt: skip
def test_the_real_table(monkeypatch: pytest.MonkeyPatch, format: str, scheme: str, titles: set[str]) -> None:
    monkeypatch.undo()
    text = model_card(manifest(format=format, layers=dict.fromkeys(LAYERS, scheme)))
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) == titles | {
        "Planish", "transformers, on Planish's kernels",
    }  # fmt: skip
    assert text.count("\nChecked with ") + text.count("\nNot run; read from ") == len(titles)
