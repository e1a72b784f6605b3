"""The plan of the streams: how much, where and why, from free memory alone; what can't be is refused."""

from pathlib import Path

import pytest
import torch

from planish.errors import PlanishError
from planish.plan import Room, host_memory, measure_room, plan_streams

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
