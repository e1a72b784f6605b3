"""The examples, at a size of seconds."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

import planish
from planish.log import RunManifest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_block_ap_writes_both_models_and_their_perplexities(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_llama(), tmp_path / "out"
    sizes = {"--out": out, "--samples": 8, "--seqlen": 32, "--steps": 3, "--windows": 2}
    arguments = [str(word) for pair in sizes.items() for word in pair]
    monkeypatch.setattr("sys.argv", ["block_ap.py", str(model), *arguments])
    runpy.run_path(str(EXAMPLES / "block_ap.py"), run_name="__main__")
    rows = re.findall(r"^(16-bit|w2g64asym rtn|w2g64asym block_ap) +(\S+) +(\d+)$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in rows] == ["16-bit", "w2g64asym rtn", "w2g64asym block_ap"]
    for (_, printed, _), folder in zip(rows, (model, out / "rtn", out / "block_ap"), strict=True):
        measured = planish.perplexity(planish.load(folder, device="cpu"), "embedded-eval", seqlen=32, limit=2)
        # the example computes in float32, and prints four figures
        assert float(printed) == pytest.approx(measured, rel=2e-2)
    run = RunManifest.read(out / "block_ap")
    assert run is not None
    assert (run.recipe, run.scheme, run.samples, run.seqlen, run.keys["steps"]) == ("block_ap", "w2g64asym", 8, 32, 3)
    assert all(after <= before for before, after in run.figures["losses"])
