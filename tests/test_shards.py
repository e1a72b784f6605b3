"""Shards: what is written has the bytes of safetensors' own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from planish import shards
from planish.errors import PlanishError


def test_a_file_has_the_bytes_of_safetensors_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{index % 3}": torch.randint(0, 2, (3, 8 + index), generator=generator).float().to(dtype)
        for index, (dtype, name) in enumerate(shards.DTYPES.items())
    }
    tensors |= {'é"\\\n': torch.randn(700, generator=generator), "scalar": torch.tensor(1.5), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    monkeypatch.setattr(shards, "PIECE", 1000)  # 2800 bytes are three pieces
    shards.write(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert load_file(tmp_path / "ours").keys() == tensors.keys()


def test_a_file_that_cannot_be_mapped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path, framework: str) -> None:
        raise RuntimeError(f"unable to mmap 138515425504 bytes from file <{file}>: Cannot allocate memory (12)\nmore")

    save_file({"x": torch.zeros(1)}, tmp_path / "large")
    monkeypatch.setattr(shards, "safe_open", refuse)
    with pytest.raises(PlanishError, match=r"unable to mmap .*large>: .*; save the model in smaller shards") as caught:
        shards.opened(tmp_path / "large")
    assert "\n" not in str(caught.value)
