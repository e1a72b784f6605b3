"""CheckpointWriter: whole or not there, whatever happens in between."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import planish.checkpoint
from planish.checkpoint import CheckpointWriter
from planish.errors import PlanishError
from planish.source import open_source

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.qweight": torch.arange(5, dtype=torch.int32),
           "c.scales": torch.full((2, 2), 0.5, dtype=torch.float16),
           "d.bias": torch.ones(3, dtype=torch.bfloat16)}


def _write(out: Path, **options: object) -> Path:
    with CheckpointWriter(out, **options) as writer:  # type: ignore[arg-type]
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        return writer.finish({"model_type": "llama"})


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype and torch.equal(value, right[name]) for name, value in left.items())


def test_one_shard_is_model_safetensors(tmp_path: Path) -> None:
    out = _write(tmp_path / "new" / "out")
    assert out == tmp_path / "new" / "out"
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama"}
    assert _same(load_file(out / "model.safetensors"), TENSORS)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_and_index(tmp_path: Path) -> None:
    out = _write(tmp_path / "out", shard_bytes=30)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors.index.json", *names}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}
    expected = {"a.weight": names[0], "b.qweight": names[1], "c.scales": names[1], "d.bias": names[2]}
    assert index["weight_map"] == expected
    assert _same({key: tensor for name in names for key, tensor in load_file(out / name).items()}, TENSORS)


def test_a_shard_is_on_disk_as_soon_as_it_is_full(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", shard_bytes=30) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        assert len(list(tmp_path.glob(".out.partial-*/shard-*"))) == 2


def test_views_are_stored_alone(tmp_path: Path) -> None:
    base = torch.arange(1000.0).reshape(10, 100)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("row", base[3])
        writer.add("column", base[:, 3])
        out = writer.finish({})
    assert _same(load_file(out / "model.safetensors"), {"row": base[3], "column": base[:, 3].contiguous()})
    assert (out / "model.safetensors").stat().st_size < 1000


def test_extra_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    copied = tmp_path / "tokenizer.json"
    extra = {"tokenizer.json": copied, "run.json": {"seed": 1, "text": "ü"}, "NOTE": "hello"}
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.zeros(1))
        out = writer.finish({}, extra)
    assert (out / "tokenizer.json").read_text() == "{}" and (out / "NOTE").read_text() == "hello"
    assert json.loads((out / "run.json").read_text(encoding="utf-8")) == extra["run.json"]


def test_verify_sees_the_whole_before_it_has_its_name(tmp_path: Path) -> None:
    seen = []

    def verify(folder: Path) -> None:
        assert not (tmp_path / "out").exists() and folder.parent == tmp_path
        seen.append(_same(load_file(folder / "model.safetensors"), {"a": torch.zeros(1)}))

    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.zeros(1))
        writer.finish({}, verify=verify)
    assert seen == [True] and (tmp_path / "out").is_dir()


def test_copy_of_a_tied_model_loads_in_transformers(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    source = open_source(tiny_llama(tie_word_embeddings=True))
    with CheckpointWriter(tmp_path / "out", shard_bytes=40_000) as writer:
        for name in source.names():
            writer.add(name, source.get(name))
        out = writer.finish(source.config.to_dict())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    load = transformers.AutoModelForCausalLM.from_pretrained
    copied, original = load(out), load(source.folder)
    assert _same(copied.state_dict(), original.state_dict())


# ---- what is there already


def test_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").touch()
    with pytest.raises(PlanishError, match="out exists and isn't empty; .* or --overwrite"):
        CheckpointWriter(tmp_path / "out")
    with pytest.raises(PlanishError, match="out is no checkpoint"):  # never deletes what isn't one
        CheckpointWriter(tmp_path / "out", overwrite=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["keep"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(PlanishError, match="out can't be the output folder"):
        CheckpointWriter(tmp_path / "out", overwrite=True)


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (_write(tmp_path / "out") / "config.json").is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_only_after_success(tmp_path: Path) -> None:
    old = _write(tmp_path / "out")
    (old / "old").touch()
    with pytest.raises(RuntimeError, match="halfway"), CheckpointWriter(old, overwrite=True) as writer:
        writer.add("x", torch.zeros(1))
        raise RuntimeError("halfway")
    assert (old / "old").exists()
    _write(old, overwrite=True, shard_bytes=30)
    assert not (old / "old").exists() and not (old / "model.safetensors").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_interrupt_between_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _write(tmp_path / "out")
    (old / "old").touch()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.partial-"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _write(old, overwrite=True)
    assert (old / "old").exists() and [file.name for file in tmp_path.iterdir()] == ["out"]


# ---- what goes wrong


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, PlanishError])
def test_any_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def verify(folder: Path) -> None:
        raise error

    with pytest.raises(error), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("x", torch.zeros(1))
        writer.finish({}, verify=verify)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["write_shard", "sync", "_write"])
def test_disk_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(planish.checkpoint, step, full)
    with pytest.raises(PlanishError, match="can't write .*out: No space left on device; make room"):
        _write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_write_that_really_fails(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(PlanishError, match=r"can't write .*out: .*File too large"), \
                CheckpointWriter(tmp_path / "out") as writer:
            writer.add("x", torch.zeros(1 << 16))
            writer.finish({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_read_only_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write anywhere
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "mkdir", refuse)
    tmp_path.chmod(0o500)
    with pytest.raises(PlanishError, match="can't write .*out: Permission denied"):
        CheckpointWriter(tmp_path / "out").__enter__()
    tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


def test_killed_process_leaves_no_checkpoint(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, time, torch
        from planish.checkpoint import CheckpointWriter
        with CheckpointWriter(sys.argv[1], shard_bytes=100) as writer:
            for index in range(1000):
                writer.add(f"t{index}", torch.zeros(100))
                time.sleep(0.01)
            writer.finish({})
    """)
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/shard-2")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert (_write(tmp_path / "out") / "config.json").is_file()  # what it left is in nobody's way
