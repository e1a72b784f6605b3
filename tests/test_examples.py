"""The examples, at a size of seconds."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

import planish
from planish.kernels.linear import packed_layers
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


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that TRL still uses
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["l4q_loop", "l4q_trl"])
def test_l4q_by_a_loop_and_by_trl(
    name: str, tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if name == "l4q_trl":
        pytest.importorskip("trl")
    data, out = tmp_path / "train.jsonl", tmp_path / "out"
    rows = ({"text": f"Sheet {i} is smoothed by light blows. " * 4} for i in range(40))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"--data": data, "--out": out, "--scheme": "w4g32", "--steps": 2, "--seqlen": 32, "--rank": 4}
    arguments = [str(word) for pair in sizes.items() for word in pair]
    monkeypatch.setattr("sys.argv", [f"{name}.py", str(tiny_llama()), *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert f"wrote {out}" in capsys.readouterr().out
    packed = packed_layers(planish.load(out, device="cpu"))
    assert len(packed) == 14 and {str(layer.scheme) for layer in packed.values()} == {"w4g32"}
