"""finetune by its verb: what it trains, what it writes, what it goes on from, and what it refuses before any work."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

import planish
import planish.checkpoint
import planish.tuning
from planish.errors import PlanishError
from planish.folder import QuantizedFolder
from planish.log import Event
from planish.tuning import finetune

Tiny = Callable[..., Path]
TEXT = "A smith planishes the sheet of metal with many light blows. " * 40
QUICK: dict[str, Any] = {"samples": 16, "seqlen": 32, "device": "cpu", "epochs": 2, "rate": 5e-2}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture
def base(tiny_llama: Tiny) -> Path:
    return tiny_llama(initializer_range=0.1)


@pytest.fixture
def q2(base: Path, tmp_path: Path) -> Path:
    """The base at 2 bits."""
    planish.quantize_to(base, tmp_path / "q2", "rtn", "w2g32asym", device="cpu")
    return tmp_path / "q2"


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but run.json, which holds timings."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.name != "run.json"
    }


def said_by(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def perplexity(folder: Path, text: str) -> float:
    return planish.perplexity(planish.load(folder, device="cpu", dtype=torch.float32), text, seqlen=32)


def parts(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Codes and scales by linear, and every other tensor by its name on disk."""
    opened = QuantizedFolder.open(folder)
    assert opened is not None
    layers = dict(opened.layers())
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    plain = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in layers}
    return {n: q.codes for n, q in layers.items()}, {n: q.scale for n, q in layers.items()}, plain


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- what is trained and written


def test_what_is_only_read_in_its_format_is_written_as_native(base: Path, tmp_path: Path, text: str) -> None:
    planish.quantize_to(base, tmp_path / "q", "rtn", "w4g32asym", device="cpu", format="gptq_v2")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    # others write asymmetric layers in the first dialect, which we only read
    config["quantization_config"] |= {"checkpoint_format": "gptq", "format": "gptq"}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    before, notes = parts(tmp_path / "q"), []
    how = {"data": text, "samples": 4, "seqlen": 16, "device": "cpu", "keys": {"steps": 1}}
    planish.finetune(tmp_path / "q", tmp_path / "out", progress=lambda event: notes.append(event.note), **how)
    after = parts(tmp_path / "out")
    assert same(before[0], after[0]) and said_by(tmp_path / "out")["format"] == "native"
    assert any(note.startswith("it will be written as native: model.layers.0.") for note in notes)


def test_a_quantized_embedding_is_refused_before_any_work(base: Path, tmp_path: Path, text: str) -> None:
    planish.quantize_to(base, tmp_path / "q", "rtn", "w4g32", device="cpu", embeddings=8)
    with pytest.raises(PlanishError, match="its embedding is quantized; finetune first"):
        planish.finetune(tmp_path / "q", tmp_path / "out", data=text, device="cpu")


@pytest.mark.parametrize("format", ["auto_round", "gptq_v2", "native"])
def test_scales_learn_and_all_else_stays(base: Path, tmp_path: Path, text: str, format: str) -> None:
    planish.quantize_to(base, tmp_path / "q", "rtn", "w2g32asym", device="cpu", format=format)
    manifest = finetune(tmp_path / "q", tmp_path / "out", data=text, **QUICK)
    before, after = parts(tmp_path / "q"), parts(tmp_path / "out")
    assert same(before[0], after[0]) and same(before[2], after[2])
    assert all(not torch.equal(before[1][name], scale) for name, scale in after[1].items())
    assert perplexity(tmp_path / "out", text) < 0.97 * perplexity(tmp_path / "q", text)
    assert manifest.format == format and left(tmp_path / "q") == left(tmp_path / "out")
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "q", tmp_path / "out"))
    assert was == now
    assert left(tmp_path) == ["out", "q", "text.txt", "tiny"]


def test_run_json_says_what_was_done(q2: Path, tmp_path: Path, text: str) -> None:
    manifest = finetune(q2, tmp_path / "out", "e2e_qp", preset="fast", data=text, seed=3, **QUICK)
    run = said_by(tmp_path / "out")
    assert run == manifest.to_dict()
    assert (run["model"], run["recipe"], run["scheme"], run["format"]) == (str(q2), "e2e_qp", "w2g32asym", "auto_round")
    assert run["keys"] == {"epochs": 2, "rate": 5e-2} and run["layers"] == said_by(q2)["layers"]
    assert (run["data"], run["samples"], run["seqlen"], run["seed"]) == (text, 16, 32, 3)
    before, after = run["figures"]["end_to_end"]
    assert after < before and run["figures"]["seconds"] > 0 and run["figures"]["peak_bytes"] > 0


def test_zero_points_learn_by_a_switch(q2: Path, tmp_path: Path, text: str) -> None:
    finetune(q2, tmp_path / "out", data=text, **{**QUICK, "zero_rate": 0.2, "epochs": 8})
    zeros = [[q.zero for _, q in QuantizedFolder.open(folder).layers()] for folder in (q2, tmp_path / "out")]  # type: ignore[union-attr]
    assert any(not torch.equal(was, now) for was, now in zip(*zeros, strict=True))
    assert same(parts(q2)[0], parts(tmp_path / "out")[0])


def test_the_teacher_is_found_or_named(base: Path, q2: Path, tmp_path: Path, text: str) -> None:
    notes: list[Event] = []
    found = finetune(q2, tmp_path / "found", data=text, distill=1, progress=notes.append, **QUICK)
    before, after = found.figures["end_to_end"]
    assert 0 < after < 0.98 * before, "of the divergence"
    assert [event.stage for event in notes][0] == "teacher" and notes[0].note.startswith("the teacher's activations")
    finetune(q2, tmp_path / "named", data=text, distill=1, teacher=base, **QUICK)
    assert digests(tmp_path / "named") == digests(tmp_path / "found")
    # of a tuned model it is the float one of the model before it
    again = finetune(tmp_path / "found", tmp_path / "again", data=text, distill=1, **QUICK)
    assert again.figures["end_to_end"][0] == pytest.approx(after, rel=1e-3)
    by_text = finetune(q2, tmp_path / "half", data=text, distill=0.5, **QUICK)
    assert before < by_text.figures["end_to_end"][0]


def test_efficientqat_from_the_float_model(base: Path, tmp_path: Path, text: str) -> None:
    events: list[Event] = []
    how = {"samples": 16, "seqlen": 32, "device": "cpu", "epochs": 4, "e2e_epochs": 2, "e2e_rate": 2e-2}
    manifest = finetune(base, tmp_path / "out", "efficientqat", "w2g32asym", data=text, progress=events.append, **how)
    assert [event.stage for event in events if event.index] == ["block_ap", *["e2e_qp"] * 3]
    assert (manifest.recipe, manifest.scheme, manifest.format) == ("efficientqat", "w2g32asym", "auto_round")
    (block,), whole = manifest.figures["losses"], manifest.figures["end_to_end"]
    assert block[1] < block[0] and whole[1] < whole[0]
    codes, _, plain = parts(tmp_path / "out")
    original = load_file(base / "model.safetensors")
    assert len(codes) == 14 and manifest.layers.keys() == codes.keys()
    assert same(plain, {n: value for n, value in original.items() if n.removesuffix(".weight") not in codes})
    assert left(tmp_path) == ["out", "text.txt", "tiny"]
    # what quantize writes of it is that, on the same windows
    request = {"data": text, **how}
    planish.quantize_to(base, tmp_path / "q", "efficientqat", "w2g32asym", **request)
    assert digests(tmp_path / "q").keys() == digests(tmp_path / "out").keys()
    assert same(parts(tmp_path / "q")[0], codes)


def test_blocks_are_calibrated_on_another_text_than_the_tasks(base: Path, tmp_path: Path, text: str) -> None:
    how: dict[str, Any] = {"samples": 8, "seqlen": 96, "device": "cpu", "epochs": 2, "e2e_epochs": 2, "e2e_rate": 2e-2}
    data, web = chats(tmp_path, "much, much.", rows=96), with_template(base) / "web.txt"
    web.write_text("Rivets are set from the middle outwards, each with one blow. " * 40)
    about: dict[str, Any] = {"data": data, "calib": web, **how}
    manifest = finetune(base, tmp_path / "out", "efficientqat", "w2g32asym", **about)
    planish.quantize_to(base, tmp_path / "q", "efficientqat", "w2g32asym", data=web, **how)
    calibrated, tuned = parts(tmp_path / "q"), parts(tmp_path / "out")
    assert same(calibrated[0], tuned[0]) and not same(calibrated[1], tuned[1]), "the data moves scales alone"
    run, other = said_by(tmp_path / "out"), said_by(tmp_path / "q")
    assert run == manifest.to_dict() and (run["data"], run["calibration"]) == (data, str(web))
    assert run["calibration_sha256"] == other["data_sha256"] != run["data_sha256"]
    assert other["calibration"] == other["calibration_sha256"] == ""
    plain = finetune(base, tmp_path / "plain", "efficientqat", "w2g32asym", data=data, **how)
    assert plain.calibration == "" and not same(parts(tmp_path / "plain")[0], tuned[0])
    # what goes on after a kill is of the same calibration
    with pytest.raises(Stop):
        finetune(base, tmp_path / "cut", "efficientqat", "w2g32asym", save_every=1, progress=stop_early, **about)
    with pytest.raises(PlanishError, match="of another run: calibration was '[0-9a-f]{12}' and is ''; give the same"):
        finetune(base, tmp_path / "cut", "efficientqat", "w2g32asym", resume=True, data=data, **how)


def test_the_default_recipe_ends_as_e2e_qp_goes_on_from_its_blocks(base: Path, tmp_path: Path) -> None:
    """The same windows, order, teacher, rates and state kept: equal tensors, one process or two."""
    ids = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))
    about: dict[str, Any] = {"data": ids, "samples": 16, "seqlen": 32, "device": "cpu"}
    whole = planish.quantize(base, "planish", "w2g32", epochs=1.0, e2e_epochs=2.0, **about)
    blocks = planish.quantize(base, "planish", "w2g32", epochs=1.0, end_to_end=False, **about)
    planish.save(blocks, tmp_path / "blocks", format="native")
    keys = {"distill": 1.0, "norm_rate": 1e-3, "epochs": 2.0}
    finetune(tmp_path / "blocks", tmp_path / "tuned", teacher=base, batch_size=8, keys=keys, **about)
    one, other = whole.state_dict(), planish.load(tmp_path / "tuned", device="cpu").state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    moved = [name for name, value in blocks.state_dict().items() if not torch.equal(value, one[name])]
    assert moved and all(name.endswith(("scale", "norm.weight")) for name in moved)


def chats(folder: Path, answer: str, rows: int = 24) -> str:
    """A file of conversations."""
    made = [
        {"messages": [{"role": "user", "content": f"How much is {i}?"}, {"role": "assistant", "content": answer}]}
        for i in range(rows)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(folder / "chats.jsonl")


def with_template(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def test_conversations_train_the_answers(q2: Path, tmp_path: Path) -> None:
    data, events = chats(tmp_path, "much, much."), list[Event]()
    how = {**QUICK, "seqlen": 96, "epochs": 6}
    manifest = finetune(with_template(q2), tmp_path / "out", data=data, progress=events.append, **how)
    assert manifest.data == data and manifest.samples == 12
    before, after = manifest.figures["end_to_end"]
    assert after < 0.9 * before
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
    # the answers have become likelier, other text needn't
    model = [planish.load(folder, device="cpu", dtype=torch.float32) for folder in (q2, tmp_path / "out")]
    ids = AutoTokenizer.from_pretrained(q2)("much, much.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        losses = [part(ids, labels=ids).loss.item() for part in model]
    assert losses[1] < losses[0]


def test_token_ids_need_no_tokenizer(q2: Path, tmp_path: Path, text: str) -> None:
    for file in q2.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(PlanishError, match="q2 comes without a tokenizer; pass tokenizer=, or token ids as data"):
        finetune(q2, tmp_path / "out", data=text, **QUICK)
    ids = torch.randint(0, 256, (16, 32), generator=torch.Generator().manual_seed(0))
    assert finetune(q2, tmp_path / "out", data=ids, **QUICK).data == "token ids"


def test_of_a_multimodal_model_the_language_model_learns(base: Path, tmp_path: Path, text: str) -> None:
    torch.manual_seed(0)
    words = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}  # fmt: skip
    pictures = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**words), vision_config=transformers.CLIPVisionConfig(**pictures),
        image_token_index=280,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "llava")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "llava")
    planish.quantize_to(tmp_path / "llava", tmp_path / "q", "rtn", "w2g32asym", device="cpu")
    for distill in (0, 1):
        manifest = finetune(tmp_path / "q", tmp_path / f"out{distill}", data=text, distill=distill, **QUICK)
        assert manifest.figures["end_to_end"][1] < manifest.figures["end_to_end"][0]
        before, after = parts(tmp_path / "q"), parts(tmp_path / f"out{distill}")
        assert same(before[0], after[0]) and not same(before[1], after[1])
        scales = {name for name in before[2] if name.endswith((".scales", ".qzeros", ".qweight"))}
        assert same(*({n: v for n, v in found[2].items() if n not in scales} for found in (before, after)))
        assert any("vision_tower" in name for name in after[2])
    loaded = planish.load(tmp_path / "out1", device="cpu")
    ids = torch.tensor([[1, 2, 280, 280, 280, 280, 3]])
    with torch.no_grad():
        seen = loaded(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28)).logits
    assert seen.isfinite().all()


# ---- going on after a kill


def verb(q2: Path, out: Path, text: str) -> list[str]:
    return ["finetune", str(q2), "--data", text, "--samples", "16", "--seqlen", "32", "--device", "cpu", "--steps",
            "40", "--save-every", "2", "--resume", "--out", str(out), "batch_size=4", "rate=0.02"]  # fmt: skip


def test_killed_it_goes_on_to_the_same_bytes(q2: Path, tmp_path: Path, text: str) -> None:
    how = {"samples": 16, "seqlen": 32, "device": "cpu", "keys": {"steps": 40, "batch_size": 4, "rate": 0.02}}
    plain = finetune(q2, tmp_path / "plain", data=text, **how)
    words, work = verb(q2, tmp_path / "out", text), tmp_path / ".out.tune"
    # sums are split by threads
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "planish", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(work.glob("checkpoint-4/planish.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    kept = max(int(file.parent.name.rpartition("-")[2]) for file in work.glob("checkpoint-*/planish.json"))
    assert 4 <= kept < 40

    events: list[Event] = []
    found = finetune(q2, tmp_path / "out", data=text, save_every=2, resume=True, progress=events.append, **how)
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    assert found.figures["end_to_end"] == plain.figures["end_to_end"]
    assert [event.index for event in events] == [step for step in range(5, 41, 5) if step > kept]
    assert left(tmp_path) == ["out", "plain", "q2", "text.txt", "tiny"], "nothing is left of the work"


class Stop(BaseException):
    """As Ctrl-C does."""


def stop(event: Event) -> None:
    if event.stage == "e2e_qp" and event.index >= 3:
        raise Stop


def stop_early(event: Event) -> None:
    if event.stage == "e2e_qp" and event.index >= 2:
        raise Stop


def test_checkpoints_of_another_run_are_refused(
    base: Path, q2: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**QUICK, "data": text, "batch_size": 4, "save_every": 1, "resume": True}
    with pytest.raises(Stop):
        finetune(q2, tmp_path / "out", progress=stop, **how)
    before = left(tmp_path / ".out.tune")
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from planish.fit.whole import EndToEnd\nfrom planish.recipes import Recipe\n\ndef mine():\n"
        "    return Recipe(name='mine', stages=(EndToEnd(name='mine', rates={'scale': 1e-3}, epochs=2.0),))\n"
    )
    own = {key: value for key, value in how.items() if key not in ("epochs", "rate")}
    forwards = count_forwards(monkeypatch)
    for recipe, change, said in (
        (f"{mine}:mine", own, "recipe was 'e2e_qp' and is '.*mine.py:mine'; give the same request, or start anew"),
        ("e2e_qp", {**how, "rate": 1e-3}, "keys was .*'rate': '0.05'.* and is .*'rate': '0.001'"),
        ("e2e_qp", {**how, "seed": 1}, "seed was 0 and is 1"),
        ("e2e_qp", {**how, "samples": 15}, "data was '[0-9a-f]{12}' and is "),
        ("e2e_qp", {**how, "preset": "fast"}, "preset was 'default' and is 'fast'"),
        ("e2e_qp", {**how, "distill": 1}, "keys was "),
    ):
        with pytest.raises(PlanishError, match=rf"\.out\.tune is of another run: {said}"):
            finetune(q2, tmp_path / "out", recipe, **change)
    planish.quantize_to(base, tmp_path / "q3", "rtn", "w3g32asym", device="cpu")
    with pytest.raises(PlanishError, match="another run: model was '[0-9a-f]{12}' and is "):
        finetune(tmp_path / "q3", tmp_path / "out", **how)
    assert not forwards and left(tmp_path / ".out.tune") == before and not (tmp_path / "out").exists()
    finetune(q2, tmp_path / "out", **how)


def test_started_anew_it_goes_on_from_nothing(q2: Path, tmp_path: Path, text: str) -> None:
    how = {**QUICK, "data": text, "batch_size": 4, "save_every": 1}
    for seed in (1, 0):
        with pytest.raises(Stop):
            finetune(q2, tmp_path / "out", progress=stop if seed else stop_early, seed=seed, **how)
    assert sorted(file.name for file in (tmp_path / ".out.tune").glob("checkpoint-*")) == ["checkpoint-1"]
    events: list[Event] = []
    finetune(q2, tmp_path / "out", progress=events.append, resume=True, **how)
    assert [event.index for event in events] == [2, 3]


def test_a_float_model_is_refused_before_its_blocks(
    base: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"samples": 16, "seqlen": 32, "device": "cpu", "epochs": 1, "e2e_epochs": 2, "save_every": 1, "resume": True}
    with pytest.raises(Stop):
        finetune(base, tmp_path / "out", "efficientqat", "w2g32", data=text, progress=stop, **how)
    forwards = count_forwards(monkeypatch)
    with pytest.raises(PlanishError, match="of another run: scheme was 'w2g32' and is 'w3g32'; give the same request"):
        finetune(base, tmp_path / "out", "efficientqat", "w3g32", data=text, **how)
    assert not forwards
    finetune(base, tmp_path / "out", "efficientqat", "w2g32", data=text, **how)
    finetune(base, tmp_path / "plain", "efficientqat", "w2g32", data=text, **how)
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


def test_what_failed_leaves_only_what_can_be_gone_on_from(q2: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(Stop):
        finetune(q2, tmp_path / "out", data=text, progress=stop, **QUICK)
    assert left(tmp_path) == ["q2", "text.txt", "tiny"]
    with pytest.raises(Stop):
        finetune(q2, tmp_path / "out", data=text, progress=stop, save_every=1, **QUICK)
    assert left(tmp_path) == [".out.tune", "q2", "text.txt", "tiny"]
    assert not any(file.suffix in (".bin", ".pt", ".pth") for file in (tmp_path / ".out.tune").rglob("*"))


def test_a_trackers_log_is_kept(q2: Path, tmp_path: Path, text: str) -> None:
    def log(event: Event) -> None:
        (tmp_path / ".out.tune" / "runs" / "today").mkdir(parents=True, exist_ok=True)

    finetune(q2, tmp_path / "out", data=text, progress=log, **QUICK)
    assert (tmp_path / "out" / "runs" / "today").is_dir() and not (tmp_path / ".out.tune").exists()


# ---- full disks


@pytest.mark.parametrize("step", ["write_shard", "sync", "_write"])
def test_a_disk_full_at_the_end_leaves_nothing(
    q2: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(planish.checkpoint, step, full)
    with pytest.raises(PlanishError, match="can't write .*out: No space left on device; make room"):
        finetune(q2, tmp_path / "out", data=text, **QUICK)
    assert left(tmp_path) == ["q2", "text.txt", "tiny"]


def test_a_disk_full_at_a_checkpoint_can_be_gone_on_from(
    q2: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**QUICK, "data": text, "save_every": 1, "resume": True}
    plain = finetune(q2, tmp_path / "plain", **how)
    calls, write = [0], transformers.Trainer.save_model

    def full(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(transformers.Trainer, "save_model", full)
        with pytest.raises(
            PlanishError, match=r"can't keep checkpoints in .*\.out\.tune: No space left on device; make"
        ):
            finetune(q2, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()
    assert finetune(q2, tmp_path / "out", **how).figures["end_to_end"] == plain.figures["end_to_end"]
    assert digests(tmp_path / "out") == digests(tmp_path / "plain") and not (tmp_path / ".out.tune").exists()


# ---- refusals


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attentions that ran, from now on."""
    ran: list[str] = []
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    forward = attention.forward

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ran.append(type(self).__name__)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", noted)
    return ran


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "not quantized": (
        "tiny",
        {},
        "recipe 'e2e_qp' trains a model that is quantized already, and this one isn't; quantize it first, then",
    ),
    "rate": ("q2", {"rate": 0}, "the learning rate of scale is 0; it must be above 0"),
    "seqlen": ("q2", {"seqlen": 257}, "seqlen 257 is above the model's max_position_embeddings; give at most 256"),
    "seqlen, float": (
        "tiny",
        {"recipe": "efficientqat", "scheme": "w2g32", "seqlen": 257, "rate": 1e-3},
        "seqlen 257 is above the model's max_position_embeddings; give at most 256",
    ),
    "vocabulary": (
        "q2",
        {"distill": 1, "teacher": "{root}/other"},
        "the teacher has a vocabulary of 300, the model one of 272; give its own original",
    ),
    "teacher that isn't there": ("q2", {"distill": 1, "teacher": "{root}/nowhere"}, "no such folder: "),
    "teacher that is quantized": ("q2", {"distill": 1, "teacher": "{root}/q2"}, "q2 is quantized already (auto-round)"),
    "teacher of a float model": (
        "tiny",
        {"recipe": "efficientqat", "scheme": "w2g32", "teacher": "{root}/tiny", "rate": 1e-3},
        "tiny is its own teacher; drop teacher",
    ),
    "no answers": ("chat", {"data": "{root}/masked.jsonl"}, "this would be a loss over nothing"),
    "no template": ("q2", {"data": "{root}/chats.jsonl"}, "holds conversations, and "),
    "scheme": ("q2", {"scheme": "w4g32"}, "q2 is quantized already; drop the scheme, or give the 16-bit original"),
    "calibration": ("q2", {"calib": "embedded"}, "q2 is quantized already; drop the calib, or give the 16-bit "),
    "calibration that nothing reads": (
        "tiny",
        {"recipe": "l4q", "scheme": "w4g32", "calib": "embedded"},
        "l4q calibrates nothing before it trains on the data; drop calib, or start from a model that was calibrated",
    ),
    "format": ("q2", {"format": "gptq"}, "q2 is in format auto_round and stays so; drop --format"),
    "tracker": ("q2", {"track": "tensorbord"}, "no tracker 'tensorbord'; use one of none, tensorboard, wandb"),
    "tracker that isn't here": ("q2", {"track": "wandb"}, "wandb isn't installed; pip install wandb, or drop --track"),
    "zero points": ("symmetric", {"zero_rate": 1e-2}, "a symmetric grid has no zero to train; drop zero_rate"),
    "batch size": ("q2", {"batch_size": 0}, "a batch size of 0; at least 1 sample at a time is needed"),
    "checkpoints": ("q2", {"save_every": -1}, "a checkpoint every -1 steps; 0 writes none"),
    "folder": ("q2", {"out": "{root}/full"}, "full exists and isn't empty; choose another folder, or --overwrite"),
    "itself": ("q2", {"out": "{root}/q2", "overwrite": True}, "q2 is the model itself; write to another folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(
    tiny_llama: Tiny, q2: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    model, given, said = REFUSED[case]
    if model == "chat":
        with_template(q2)
        (tmp_path / "masked.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hello?"}]}) + "\n")
    if model == "symmetric":
        planish.quantize_to(tmp_path / "tiny", tmp_path / "symmetric", "rtn", "w2g32", device="cpu")
    if "other" in str(given.get("teacher")):
        tiny_llama("other", vocab_size=300)
    chats(tmp_path, "yes")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    monkeypatch.setattr(planish.tuning, "get_available_reporting_integrations", lambda: [])
    request = {"out": "{root}/out", "data": text, "samples": 16, "seqlen": 32, "device": "cpu", **given}
    request = {k: v.format(root=tmp_path) if isinstance(v, str) else v for k, v in request.items()}
    before, forwards = digests(q2), count_forwards(monkeypatch)
    there = left(tmp_path)
    with pytest.raises(PlanishError) as error:
        finetune(tmp_path / model if model != "chat" else q2, request.pop("out"), **request)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not forwards, "nothing was computed"
    assert left(tmp_path) == there and digests(q2) == before and left(tmp_path / "full") == ["notes.txt"]


def test_a_teacher_that_cannot_be_found(base: Path, q2: Path, tmp_path: Path, text: str) -> None:
    said = "the float model .*away, of which this one was made, can't be had; name it with --teacher, or give distill=0"
    run = said_by(q2)
    (q2 / "run.json").write_text(json.dumps({**run, "model": str(tmp_path / "away")}))
    with pytest.raises(PlanishError, match=said):
        finetune(q2, tmp_path / "out", data=text, distill=1, **QUICK)
    # two that were overwritten by each other
    (q2 / "run.json").write_text(json.dumps({**run, "model": str(q2)}))
    with pytest.raises(PlanishError, match="the float model .*q2, of which this one was made, can't be had; name it"):
        finetune(q2, tmp_path / "out", data=text, distill=1, **QUICK)
    (q2 / "run.json").unlink()
    with pytest.raises(PlanishError, match="distillation needs the float model; name it with --teacher, or give dist"):
        finetune(q2, tmp_path / "out", data=text, distill=1, **QUICK)
    assert left(tmp_path) == ["q2", "text.txt", "tiny"]
    manifest = finetune(q2, tmp_path / "out", data=text, distill=1, teacher=base, **QUICK)
    assert manifest.scheme == "" and manifest.layers == run["layers"]


def test_without_accelerate_it_says_so(q2: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planish.trainable, "is_accelerate_available", lambda: False)
    with pytest.raises(PlanishError, match=r"needs accelerate; pip install accelerate"):
        finetune(q2, tmp_path / "out", data=text, **QUICK)


def test_a_recipe_that_quantizes_refuses_a_quantized_folder(q2: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(
        PlanishError, match="is quantized already, and efficientqat begins with a float model; use --re"
    ):
        finetune(q2, tmp_path / "out", "efficientqat", data=text, **QUICK)
