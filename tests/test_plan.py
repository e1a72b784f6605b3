"""The plan of the streams: how much, where and why, from free memory alone; what can't be is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from planish.errors import PlanishError
from planish.plan import (
    Room,
    WholePlan,
    WholeSize,
    check_waiting,
    host_memory,
    measure_room,
    plan_streams,
    plan_whole,
)

GPU, CPU = torch.device("cuda"), torch.device("cpu")
GB = 10**9
HERE = Path("/data")
# 4096 windows of 2048 tokens through a 7B model: 68.7 GB a stream
LARGE = (4096, 2048, 4096, torch.bfloat16)


def room(device: float = 80, host: float = 500, disk: float = 1000) -> Room:
    return Room(device=int(device * GB), host=int(host * GB), disk=int(disk * GB), folder=HERE)


@pytest.mark.parametrize(
    ("device", "free", "where"),
    [
        (GPU, room(device=420), "device"),
        (GPU, room(device=412), "host"),  # a third of it is 137.3 GB, both streams are 137.4
        (GPU, room(host=230), "host"),
        (GPU, room(host=229), "disk"),
        (CPU, room(device=0, host=230), "host"),
        (CPU, room(device=0, host=229), "disk"),
    ],
)
def test_auto_takes_the_nearest_that_has_room(device: torch.device, free: Room, where: str) -> None:
    plan = plan_streams(*LARGE, "auto", device, free)
    assert (plan.bytes_each, plan.count, plan.where) == (4096 * 2048 * 4096 * 2, 2, where)


def test_the_line_for_the_user() -> None:
    def line(*how: object, **more: object) -> str:
        return plan_streams(*LARGE, *how, **more).summary()  # type: ignore[arg-type]

    each = "activations: 2 x 68.7 GB in bf16, "
    assert line("auto", GPU, room(host=21)) == each + "on disk at /data (host memory available: 21.0 GB)"
    assert line("host", GPU, room(host=21)) == each + "in host memory (available: 21.0 GB)"
    assert line("device", GPU, room()) == each + "on the GPU (free there: 80.0 GB)"
    assert line("auto", GPU, room(), keep=True) == each + "on disk at /data (4 files, for --resume)"


def test_without_a_gpu_the_device_is_the_host() -> None:
    assert plan_streams(8, 16, 64, torch.float32, "device", CPU, room(device=0)).where == "host"


@pytest.mark.parametrize(
    ("count", "keep", "files"), [(1, False, 1), (3, False, 3), (1, True, 2), (2, True, 4), (3, True, 5)]
)
def test_a_disk_without_room_is_refused(count: int, keep: bool, files: int) -> None:
    need = files * 68.72
    plan_streams(*LARGE, "disk", GPU, room(disk=need + 1), count=count, keep=keep)
    with pytest.raises(PlanishError) as error:
        plan_streams(*LARGE, "disk", GPU, room(disk=need - 1), count=count, keep=keep)
    said = f"activations need {files} x 68.7 GB of disk, but /data has {need - 1:.1f} GB free; name a folder"
    assert str(error.value).startswith(said) and "--stream-dir" in str(error.value)


@pytest.mark.parametrize("storage", ["host", "device"])
def test_only_files_survive(storage: str) -> None:
    with pytest.raises(PlanishError, match=f"--resume keeps activations in files; drop --storage {storage}"):
        plan_streams(*LARGE, storage, GPU, room(), keep=True)


def test_an_unknown_storage() -> None:
    with pytest.raises(PlanishError, match="no storage 'ram'; use one of auto, device, host, disk"):
        plan_streams(*LARGE, "ram", GPU, room())


def test_the_room_of_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    before = measure_room(CPU, folder)
    assert before.device == 0 and 0 < before.host <= 2**50 and before.disk > 0 and before.folder == folder
    folder.mkdir(parents=True)
    (folder / "fp.0").write_bytes(bytes(10**6))
    # what an unfinished run already takes there is its own
    assert measure_room(CPU, folder).disk >= before.disk - 10**9


def test_a_container_may_have_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("max", "current", "stat")]
    for file, text in zip(
        files, ["1000000", "700000", "anon 5\nactive_file 100000\ninactive_file 1000\n"], strict=True
    ):
        file.write_text(text)
    monkeypatch.setattr("planish.plan._CGROUPS", (tuple(map(str, files)),))
    assert host_memory() == 401_000
    files[0].write_text("max\n")
    assert host_memory() > 10**8


# 80 blocks of Llama-2-70B's shape at w2g64, scales trained: a hand's count
LARGE_MODEL = WholeSize(
    fixed=18_200 * 10**6,
    trained=1_070 * 10**6,
    largest=13_400 * 10**3,
    weights=68_450 * 10**6,
    packed=19_250 * 10**6,
    dense=470 * 10**6,
    graph=647_000,
    logits=768_000,
    boundary=16_384,
    blocks=80,
)


def whole(free: float, *, lean: bool | None = None, micro_batch: int = 4, host: float = 500, **more: Any) -> WholePlan:
    asked = {"seqlen": 4096, "batch_size": 8, "checkpointing": True, **more}
    return plan_whole(
        LARGE_MODEL, **asked, micro_batch=micro_batch, lean=lean, free=int(free * GB), host=int(host * GB)
    )


def test_what_waits_behind_the_blocks_needs_room() -> None:
    assert LARGE_MODEL.waiting == 27_810 * 10**6
    check_waiting(LARGE_MODEL, int(1.1 * LARGE_MODEL.waiting) + 1)
    with pytest.raises(PlanishError, match=r"take 27\.8 GB of host memory, and 24\.0 GB are free; take a machine with"):
        check_waiting(LARGE_MODEL, 24 * GB)


@pytest.mark.parametrize(
    ("free", "lean", "micro_batch"),
    [(90, False, 4), (70, False, 2), (50, False, 1), (47, True, 4), (40, True, 4), (36, True, 2), (28, True, 1)],
)
def test_lean_where_the_trainer_does_not_fit(free: float, lean: bool, micro_batch: int) -> None:
    plan = whole(free)
    assert (plan.lean, plan.micro_batch) == (lean, micro_batch)
    assert plan.bytes * (1.1 if micro_batch > 1 or not lean else 1) <= plan.free == free * GB
    # what decided it: twice as many at a time, or the Trainer, would not have fitted
    if micro_batch < 4:
        assert 1.1 * LARGE_MODEL.peak(2 * micro_batch * 4096, lean=lean, checkpointing=True) > plan.free
    assert not lean or 1.1 * plan.by_trainer > plan.free


def test_bytes_of_training_the_whole() -> None:
    # value, gradient and two moments of each scale against 6.03 bytes; hidden states of every block against none
    state = LARGE_MODEL.trained
    trainer, lean = (LARGE_MODEL.peak(4096, lean=way, checkpointing=True) for way in (False, True))
    boundaries = 80 * 16_384 * 4096
    assert trainer - lean == pytest.approx(state * (16 - 6.03125) + boundaries - 4 * LARGE_MODEL.largest, abs=2)
    # the graphs of all blocks instead of one
    graphs = LARGE_MODEL.peak(4096, lean=False, checkpointing=False) - trainer
    assert graphs == pytest.approx(79 * 647_000 * 4096 - boundaries + 4 * (state - LARGE_MODEL.largest), abs=2)
    # issue's limit at 70B, batch 1 x 4096
    assert 25 * GB < lean < 30 * GB
    # a head of many words outweighs a small block: a chunk of its logits at a time
    wordy = dataclasses.replace(LARGE_MODEL, logits=10**7)
    assert wordy.peak(4096, lean=True, checkpointing=True) - lean == 1024 * 10**7 - 647_000 * 4096 - 470 * 10**6


def test_the_users_word_stands() -> None:
    plan = whole(90, lean=True)
    assert plan.lean and plan.micro_batch == 4
    assert (
        "trained lean, one block at a time: " in plan.summary()
        and "90.0 GB free; by the Trainer 43.9" in plan.summary()
    )
    # predicted not to fit: tried all the same
    assert whole(20, lean=True).micro_batch == 1
    assert (whole(20, lean=False).lean, whole(20, lean=False).micro_batch) == (False, 4)


def test_what_fits_neither_way_is_refused() -> None:
    with pytest.raises(PlanishError, match=r"takes 27.9 GB .* sample of 4096 tokens .* 27.5 GB are free; use shorter"):
        whole(27.5)
    assert whole(27.5, seqlen=1024).lean
    with pytest.raises(PlanishError, match="20.0 GB are free; quantize to fewer bits or larger groups, or take"):
        whole(20, seqlen=128)
    # 80 blocks x 8 samples x 4096 tokens x 16 kB, and the best state
    with pytest.raises(PlanishError, match=r"lean training keeps 47.2 GB in host memory for 8 samples a step, and 50"):
        whole(40, host=50)
    assert whole(40, host=50, batch_size=4).lean and not whole(60, host=50).lean
