"""Law 7: a run killed at any moment and run again writes the same bytes; what else was asked for is refused."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import planish
import planish.journal
from planish.errors import PlanishError
from planish.fit import spans
from planish.journal import Journal, fingerprint
from planish.log import Event

Tiny = Callable[..., Path]
IDS = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
QUICK: dict[str, Any] = {"samples": 8, "seqlen": 16, "device": "cpu"}
SIGNROUND: dict[str, Any] = {"steps": 4, "batch_size": 4, "holdout": 2, "span": 1}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"recipe": "rtn"},
    "rtn with search": {"recipe": "rtn", "search": True},
    "rtn, bits by layer": {"recipe": "rtn", "search": True, "scheme": "w2.5g32"},
    "signround": {"recipe": "signround", **SIGNROUND},
    "signround, spans": {"recipe": "signround", **SIGNROUND, "span": 2},
    "signround, quantized prefix": {"recipe": "signround", **SIGNROUND, "prefix": "quantized"},
    "block_ap": {"recipe": "block_ap", **SIGNROUND, "norm_rate": 1e-3},
    "omniquant": {"recipe": "omniquant", **SIGNROUND, "let": True, "augment": True},
    "rotate+omniquant": {"recipe": "rotate+omniquant", **SIGNROUND, "scheme": "w4a4asym"},
    "omniquant, turned": {"recipe": "omniquant", **SIGNROUND, "scheme": "w4a4h", "layers": ["o_proj=w4a4"]},
    "rotate+signround, turned": {"recipe": "rotate+signround", **SIGNROUND, "scheme": "w4a4asym",
                                 "layers": ["down_proj=w4a4hasym"]},
}  # fmt: skip
LAYERS = 5


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but run.json, which holds timings."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.name != "run.json"
    }


def run(model: Path, out: Path, **how: Any) -> Any:
    request = {"recipe": "signround", "scheme": "w2g32asym", "data": IDS, **QUICK, "resume": True, **how}
    return planish.quantize_to(model, out, **request)


class Stop(BaseException):
    """As Ctrl-C does."""


def stop_behind(block: int) -> Callable[[Event], None]:
    def progress(event: Event) -> None:
        if event.index >= block:
            raise Stop

    return progress


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_stopped_behind_any_span_it_writes_the_same_bytes(tiny_llama: Tiny, tmp_path: Path, method: str) -> None:
    model, how = tiny_llama(num_hidden_layers=LAYERS), METHODS[method]
    plain = run(model, tmp_path / "plain", **how, resume=False)
    span = how.get("span", 1)
    for block in range(span, LAYERS + span, span):
        with pytest.raises(Stop):
            run(model, tmp_path / "out", **how, progress=stop_behind(1))
        assert json.loads((tmp_path / ".out.run" / "state.json").read_text())["blocks"] == min(block, LAYERS)
        assert not (tmp_path / "out").exists()
    events: list[Event] = []
    manifest = run(model, tmp_path / "out", **how, progress=events.append)
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    assert left(tmp_path) == ["out", "plain", "tiny"]
    assert manifest.figures["losses"] == plain.figures["losses"], "those of earlier processes too"
    assert [event.note for event in events][-1] == f"going on behind block {LAYERS} of {LAYERS}"


def test_stopped_within_a_span_it_does_that_span_again(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seeds, original = tiny_llama(num_hidden_layers=LAYERS), [], spans.reconstruct

    def reconstruct(*args: Any, **how: Any) -> Any:
        outcome = original(*args, **how)  # the float stream is ahead, the quantizers are trained
        seeds.append(how["seed"])
        if seeds in ([0, 1, 2], [0, 1, 2, 2, 3]):
            raise Stop
        return outcome

    monkeypatch.setattr(spans, "reconstruct", reconstruct)
    run(model, tmp_path / "plain", **SIGNROUND, resume=False, progress=lambda event: seeds.clear())
    seeds.clear()
    for _ in range(2):
        with pytest.raises(Stop):
            run(model, tmp_path / "out", **SIGNROUND)
    run(model, tmp_path / "out", **SIGNROUND)
    assert seeds == [0, 1, 2, 2, 3, 3, 4] and digests(tmp_path / "out") == digests(tmp_path / "plain")


PLANISH: dict[str, Any] = {
    "recipe": "planish", "steps": 3, "span": 2, "batch_size": 4, "norm_rate": 1e-3, "e2e_epochs": 20,
}  # fmt: skip


@pytest.mark.parametrize(
    "how", [{}, {"format": "auto_round", "scheme": "w2g32"}, {"e2e_zero_rate": 1e-2}, {"e2e_weight_rate": 0.0}]
)
def test_a_whole_model_stage_goes_on_from_its_last_checkpoint(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """Stopped behind a span, at step 5 and at step 18 of 20, and when all is trained and half is written."""
    monkeypatch.setattr("planish.tune.SAVE_EVERY", 4)
    monkeypatch.setattr("planish.tune.RARER", 1)
    model, out, asked = tiny_llama(num_hidden_layers=LAYERS), tmp_path / "out", {**PLANISH, **how}
    plain = run(model, tmp_path / "plain", **asked, resume=False)
    reached: list[int] = []

    def stop_at(stage: str, index: int) -> Callable[[Event], None]:
        def progress(event: Event) -> None:
            if event.stage == "end_to_end":
                reached.append(event.index)
            if event.stage == stage and event.index >= index:
                raise Stop

        return progress

    for stage, index in (("planish", 2), ("end_to_end", 5), ("end_to_end", 18)):
        with pytest.raises(Stop):
            run(model, out, **asked, progress=stop_at(stage, index))
        assert not out.exists()
    with monkeypatch.context() as patched:
        patched.setattr("planish.folder.verify_folder", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            run(model, out, **asked)
    manifest = run(model, out, **asked, progress=stop_at("", 0))
    # each process begins behind the checkpoint that the one before left
    assert [index for index in reached if index % 2 == 0][:3] == [2, 4, 6] and reached.count(2) == 1
    assert digests(out) == digests(tmp_path / "plain") and left(tmp_path) == ["out", "plain", "tiny"]
    assert manifest.figures["losses"] == plain.figures["losses"]
    assert manifest.figures["end_to_end"] == plain.figures["end_to_end"]


@pytest.mark.parametrize("format", ["native", "auto_round"])
def test_a_run_without_its_last_stage_holds_no_model_and_goes_on_so(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    model, asked = tiny_llama(num_hidden_layers=LAYERS), {**PLANISH, "scheme": "w2g32", "format": format}
    monkeypatch.setattr("planish.api.quantize_in_memory", lambda run: pytest.fail("layers wait for one another"))
    with monkeypatch.context() as short:
        short.setattr("planish.tune.host_memory", lambda: 1000)
        plain = run(model, tmp_path / "plain", **asked, resume=False)
        with pytest.raises(Stop):
            run(model, tmp_path / "out", **asked, progress=stop_behind(2))
    manifest = run(model, tmp_path / "out", **asked)
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    assert plain.figures["notes"][-1].startswith("end_to_end is left out: packed layers and the best state take")
    assert manifest.figures["notes"][-1] == "end_to_end is left out: memory was too short when this run was begun"


def test_checkpoints_of_a_whole_model_stage_need_room(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("planish.tune.SAVE_EVERY", 4)
        patched.setattr("planish.tune.RARER", 1)
        patched.setattr("planish.fit.watch.save_file", full)
        with pytest.raises(PlanishError, match=r"in .*\.out\.run: No space left on device; make room and run the same"):
            run(tiny_llama(), tmp_path / "out", **PLANISH)
    run(tmp_path / "tiny", tmp_path / "out", **PLANISH)
    run(tmp_path / "tiny", tmp_path / "plain", **PLANISH, resume=False)
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


# ---- real kills

NURSERY = """
    # forks a child for each line: what it imports is imported once
    import json, os, signal, sys, time
    import planish, planish.api, torch
    for line in sys.stdin:
        how = json.loads(line)
        seconds, child = how.pop("kill_after"), os.fork()
        if child == 0:
            planish.quantize_to(how.pop("model"), how.pop("out"), **how)
            os._exit(0)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)  # it isn't waited for yet: its number is still its own
        _, status = os.waitpid(child, 0)
        print(status, flush=True)
"""


@pytest.fixture
def nursery() -> Iterator[Callable[..., float]]:
    """start(kill_after=seconds or None, **request) -> seconds that the run took until it ended or was killed."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(NURSERY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def start(kill_after: float | None = None, **request: Any) -> float:
        begun = time.monotonic()
        print(json.dumps({**request, "kill_after": kill_after}), file=stdin, flush=True)
        status = int(stdout.readline())
        assert status in ((0,) if kill_after is None else (0, signal.SIGKILL)), status
        return time.monotonic() - begun

    yield start
    stdin.close()
    process.wait()
    stdout.close()


def test_killed_at_random_moments_it_writes_the_same_bytes(
    tiny_llama: Tiny, tmp_path: Path, nursery: Callable[..., float]
) -> None:
    how = {"model": str(tiny_llama(num_hidden_layers=LAYERS)), "recipe": "signround", "scheme": "w2g32asym"}
    (tmp_path / "text.txt").write_text("A smith planishes the sheet. " * 9)
    how |= {"data": str(tmp_path / "text.txt"), **QUICK, **SIGNROUND, "steps": 20}
    nursery(out=str(tmp_path / "plain"), **how)  # the first child also reads what the others find cached
    whole = nursery(out=str(tmp_path / "whole"), resume=True, **how)
    wanted = digests(tmp_path / "plain")
    assert digests(tmp_path / "whole") == wanted
    killed_at_random_moments(nursery, tmp_path, wanted, how, whole, times=20)
    assert left(tmp_path) == ["out", "plain", "text.txt", "tiny", "whole"]


def test_the_default_recipe_killed_at_random_moments(
    tiny_llama: Tiny, tmp_path: Path, nursery: Callable[..., float]
) -> None:
    (tmp_path / "text.txt").write_text("A smith planishes the sheet. " * 9)
    how = {"model": str(tiny_llama(num_hidden_layers=LAYERS)), "scheme": "w2g32asym", **QUICK, **PLANISH}
    (tmp_path / "watched.txt").write_text("0123456789 " * 9)
    how |= {"data": f"{tmp_path / 'text.txt'},self", "watch": str(tmp_path / "watched.txt"), "e2e_epochs": 34}
    nursery(out=str(tmp_path / "plain"), **how)
    whole = nursery(out=str(tmp_path / "whole"), resume=True, **how)
    assert digests(tmp_path / "whole") == digests(tmp_path / "plain")
    killed_at_random_moments(nursery, tmp_path, digests(tmp_path / "plain"), how, whole, times=4)


def killed_at_random_moments(
    nursery: Callable[..., float], folder: Path, wanted: dict[str, str], how: dict[str, Any], whole: float, times: int
) -> None:
    """A run that takes `whole` seconds, killed and gone on with so many times, writes what is wanted."""
    out, state = folder / "out", folder / ".out.run" / "state.json"
    moments, gone_on = random.Random(0), 0
    for _ in range(times):
        nursery(out=str(out), resume=True, kill_after=moments.uniform(0.1, 0.9) * whole, **how)
        gone_on += state.is_file()
        if out.exists() and not state.is_file():  # done before the kill came
            assert digests(out) == wanted
            shutil.rmtree(out)
    if not out.exists() or state.is_file():
        nursery(out=str(out), resume=True, **how)
    assert digests(out) == wanted and gone_on > 0


# ---- the last moments


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_between_the_name_and_the_end(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    model, out = tiny_llama(), tmp_path / "out"
    if overwrite:
        run(model, out, recipe="rtn", resume=False, seed=7)
    with monkeypatch.context() as patched:
        # a killed process cleans nothing up
        patched.setattr(Journal, "__exit__", lambda self, *_: os.close(self._lock))
        run(model, out, **SIGNROUND, overwrite=overwrite)
    wanted = digests(out)
    assert (tmp_path / ".out.run" / "state.json").is_file()
    with pytest.raises(PlanishError, match=r"\.out\.run holds an unfinished run of another request: seed was 0, is 1"):
        run(model, out, **SIGNROUND, overwrite=overwrite, seed=1)
    manifest = run(model, out, **SIGNROUND, overwrite=overwrite)
    assert manifest.recipe == "signround" and digests(out) == wanted and left(tmp_path) == ["out", "tiny"]
    with pytest.raises(PlanishError, match="exists and isn't empty"):
        run(model, out, **SIGNROUND)


def test_killed_between_the_two_renames_of_an_overwrite(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, rename = tiny_llama(), tmp_path / "out", Path.rename
    run(model, out, recipe="rtn", resume=False)

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "partial":
            raise Stop
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupted)
        patched.setattr("planish.checkpoint.CheckpointWriter.__exit__", lambda self, *_: None)
        with pytest.raises(Stop):
            run(model, out, **SIGNROUND, overwrite=True)
    assert not out.exists() and (tmp_path / ".out.run" / "replaced").is_dir()
    run(model, out, **SIGNROUND, overwrite=True)
    run(model, tmp_path / "plain", **SIGNROUND, resume=False)
    assert digests(out) == digests(tmp_path / "plain") and left(tmp_path) == ["out", "plain", "tiny"]


# ---- refusals

CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "seed was 0, is 1"),
    "key": ({"steps": 5}, "keys.steps was 4, is 5"),
    "key of the other default": ({"trim": 0.1}, "keys.trim was not there, is 0.1"),
    "recipe": ({"recipe": "block_ap"}, "recipe was signround, is block_ap"),
    "scheme": ({"scheme": "w4g32"}, "scheme was w2g32asym, is w4g32; layers.model.layers.0.self_attn.q_proj was"),
    "one layer": (
        {"ignore": ["0.mlp.up_proj"]},
        "scheme was w2g32asym, is w2g32asym, 0.mlp.up_proj=16-bit; layers.model.layers.0.mlp.up_proj was w2g32asym, is "
        "not there",
    ),
    "format": ({"format": "gptq_v2"}, "format was "),
    "data": ({"data": IDS + 1}, "data_sha256 was "),
    "samples": ({"samples": 7}, "data_sha256 was "),
    "batch size": ({"batch_size": 3}, "keys.batch_size was 4, is 3; batch size was 4, is 3"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_request_is_refused_by_what_changed(tiny_llama: Tiny, tmp_path: Path, case: str) -> None:
    model, (change, said) = tiny_llama(), CHANGED[case]
    with pytest.raises(Stop):
        run(model, tmp_path / "out", **SIGNROUND, progress=stop_behind(1))
    before = left(tmp_path / ".out.run")
    with pytest.raises(PlanishError) as error:
        run(model, tmp_path / "out", **{**SIGNROUND, **change})
    assert f".out.run holds an unfinished run of another request: {said}" in str(error.value)
    assert str(error.value).endswith("; give the same as then, or delete that folder to start anew")
    assert left(tmp_path / ".out.run") == before
    run(model, tmp_path / "out", **SIGNROUND)


def test_a_changed_model_is_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(Stop):
        run(model, tmp_path / "out", **SIGNROUND, progress=stop_behind(1))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanishError, match="another request: weights was [0-9a-f]{16}..., is [0-9a-f]{16}...; give"):
        run(model, tmp_path / "out", **SIGNROUND)


def test_other_versions_are_refused(tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    with pytest.raises(Stop):
        run(model, tmp_path / "out", **SIGNROUND, progress=stop_behind(1))
    monkeypatch.setattr("planish.request.versions", lambda: {"torch": "9.9"})
    with pytest.raises(PlanishError, match=r"versions\.planish was .*, is not there; versions\.torch was .*, is 9\.9"):
        run(model, tmp_path / "out", **SIGNROUND)


def test_two_runs_at_once_are_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    model, out = tiny_llama(), tmp_path / "out"

    def second(event: Event) -> None:
        if event.index:
            with pytest.raises(
                PlanishError, match="another run is writing .*out; wait for it, or choose another folder"
            ):
                run(model, out, **SIGNROUND)

    run(model, out, **SIGNROUND, progress=second)
    assert left(tmp_path) == ["out", "tiny"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"storage": "host"}, "--resume keeps activations in files; drop --storage host"),
        ({"stream_dir": "nowhere"}, "no such folder for activations: nowhere; make it, or name another"),
        ({"data": "nowhere.txt"}, "no such file: nowhere.txt"),
    ],
)
def test_refused_before_any_work(tiny_llama: Tiny, tmp_path: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanishError) as error:
        run(tiny_llama(), tmp_path / "out", **{**SIGNROUND, **how})
    assert str(error.value) == said and left(tmp_path) == ["tiny"]


def test_a_model_in_memory_cannot_be_told_from_another(tiny_llama: Tiny, tmp_path: Path) -> None:
    model = planish.load(tiny_llama(), device="cpu")
    with pytest.raises(PlanishError, match=r"--resume needs a model in a folder; .* save_pretrained\(\) first"):
        run(model, tmp_path / "out", **SIGNROUND)  # type: ignore[arg-type]
    assert left(tmp_path) == ["tiny"]


def test_without_resume_what_was_left_is_said(tiny_llama: Tiny, tmp_path: Path) -> None:
    model, events = tiny_llama(), []
    with pytest.raises(Stop):
        run(model, tmp_path / "out", **SIGNROUND, progress=stop_behind(1))
    run(model, tmp_path / "out", **SIGNROUND, resume=False, progress=events.append)
    assert any(".out.run holds an unfinished run: go on with --resume, or delete it" in e.note for e in events)


# ---- disks


def test_a_disk_full_on_the_way_can_be_gone_on_from(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, save = tiny_llama(num_hidden_layers=LAYERS), [], planish.journal.save_file

    def full(*args: Any, **how: Any) -> None:
        calls.append(args)
        if len(calls) in (3, 5):
            Path(args[1]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **how)

    monkeypatch.setattr(planish.journal, "save_file", full)
    for _ in range(2):
        with pytest.raises(PlanishError, match=r"in .*\.out\.run: No space left on device; make room and run the same"):
            run(model, tmp_path / "out", **SIGNROUND)
    run(model, tmp_path / "out", **SIGNROUND)
    run(model, tmp_path / "plain", **SIGNROUND, resume=False)
    assert len(calls) == LAYERS + 2 and digests(tmp_path / "out") == digests(tmp_path / "plain")


def test_activations_wait_where_they_are_told_to(tiny_llama: Tiny, tmp_path: Path) -> None:
    model, far = tiny_llama(), tmp_path / "far"
    far.mkdir()
    with pytest.raises(Stop):
        run(model, tmp_path / "out", **SIGNROUND, stream_dir=far, progress=stop_behind(1))
    (folder,) = far.iterdir()
    assert left(folder) == ["fp.0", "fp.1", "quant.0", "quant.1"]
    assert {file.stat().st_size for file in folder.iterdir()} == {8 * 16 * 64 * 4}
    with pytest.raises(PlanishError, match="stream folder was .*, is "):
        run(model, tmp_path / "out", **SIGNROUND)
    run(model, tmp_path / "out", **SIGNROUND, stream_dir=far)
    assert left(far) == [] and left(tmp_path) == ["far", "out", "tiny"]


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_activations_are_refused(tiny_llama: Tiny, tmp_path: Path, damage: str) -> None:
    model = tiny_llama()
    with pytest.raises(Stop):
        run(model, tmp_path / "out", **SIGNROUND, progress=stop_behind(1))
    file = tmp_path / ".out.run" / "streams" / "fp.1"
    os.truncate(file, 10) if damage == "cut" else file.unlink()
    with pytest.raises(PlanishError, match=r"fp\.1, which this run goes on from, is missing or cut; delete its folder"):
        run(model, tmp_path / "out", **SIGNROUND)


def test_a_damaged_state_is_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(Stop):
        run(model, tmp_path / "out", **SIGNROUND, progress=stop_behind(1))
    (tmp_path / ".out.run" / "state.json").write_text("{")
    with pytest.raises(PlanishError, match=r"state\.json can't be read; delete .*\.out\.run to start anew"):
        run(model, tmp_path / "out", **SIGNROUND)


def test_what_a_run_left_that_had_finished_nothing_is_in_nobodys_way(tiny_llama: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / ".out.run"
    (folder / "streams").mkdir(parents=True)
    (folder / "streams" / "fp.0").write_bytes(b"old")
    (folder / "blocks-00000").write_bytes(b"half")
    (folder / "partial").mkdir()
    run(tiny_llama(), tmp_path / "out", **SIGNROUND)
    assert left(tmp_path) == ["out", "tiny"]


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    content = bytearray(os.urandom(1 << 20))
    seen = set()
    for position in (0, len(content) - 1, None):
        if position is not None:
            content[position] ^= 1
        file.write_bytes(content)
        seen.add(fingerprint([file]))
        assert fingerprint([file]) in seen
    file.write_bytes(content + b"x")
    assert len(seen | {fingerprint([file])}) == 3
