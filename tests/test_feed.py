"""Feed and Drain: plain indexing's values in order, errors in the caller, no thread left, on a GPU too."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from planish.feed import Drain, Feed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
STREAMS = (torch.arange(20 * 6, dtype=torch.bfloat16).view(20, 2, 3), torch.arange(20.0).view(20, 1))
ORDER = torch.randperm(20, generator=torch.Generator().manual_seed(0))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("planish")]


def slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 3, 19, 20])
@pytest.mark.parametrize("kind", ["indices", "slices"])
def test_values_are_those_of_indexing_in_order(device: str, size: int, kind: str) -> None:
    batches = list(ORDER.split(size)) if kind == "indices" else slices(20, size)
    with Feed(STREAMS, batches, torch.device(device)) as feed:
        found = [tuple(value.clone() for value in values) for values in feed]
    assert len(found) == len(batches)
    for batch, values in zip(batches, found, strict=True):
        for stream, value in zip(STREAMS, values, strict=True):
            assert value.device.type == device and torch.equal(value.cpu(), stream[batch])
    assert threads() == []


@pytest.mark.parametrize("device", DEVICES)
def test_no_batches(device: str) -> None:
    assert list(Feed(STREAMS, [], torch.device(device))) == [] and threads() == []


def test_streams_of_the_device_are_indexed_without_a_thread() -> None:
    streams = [stream.to("meta") for stream in STREAMS]
    feed = Feed(streams, [ORDER[:3].to("meta")], torch.device("meta"))
    assert threads() == [] and next(feed)[0].shape == (3, 2, 3)


def test_it_reads_ahead_of_the_caller() -> None:
    drawn: list[int] = []

    def batches() -> object:
        for index in range(4):
            drawn.append(index)
            yield ORDER[index : index + 1]

    with Feed(STREAMS, batches(), torch.device("cpu")) as feed:
        next(feed)
        assert drawn == [0, 1]
        next(feed)
        assert drawn == [0, 1, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_of_the_thread_is_the_callers(device: str) -> None:
    feed = Feed(STREAMS, [ORDER[:2], torch.tensor([0, 99])], torch.device(device))
    with pytest.raises(IndexError, match="out of (range|bounds)"):
        list(feed)
    assert threads() == []
    with pytest.raises(StopIteration):
        next(feed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("taken", [0, 1, 2])
def test_stopping_early_leaves_no_thread(device: str, taken: int) -> None:
    with pytest.raises(RuntimeError, match="enough"), Feed(STREAMS, ORDER.split(2), torch.device(device)) as feed:
        for _ in range(taken):
            next(feed)
        raise RuntimeError("enough")
    assert threads() == []
    feed.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 3, 20])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_stream_goes_through_itself(device: str, size: int, mapped: bool, tmp_path: Path) -> None:
    stream = STREAMS[0].clone()
    if mapped:
        stream = torch.from_file(str(tmp_path / "s"), shared=True, size=120, dtype=torch.bfloat16).view(20, 2, 3)
        stream.copy_(STREAMS[0])
    parts = slices(20, size)
    with Feed((stream,), parts, torch.device(device)) as feed, Drain(stream, torch.device(device)) as drain:
        for part, (value,) in zip(parts, feed, strict=True):
            drain.put(part, value * 2 + 1)
    assert torch.equal(stream, STREAMS[0] * 2 + 1) and threads() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_slow_device_and_a_graph_captured_meanwhile() -> None:
    stream, weight = torch.randn(64, 512, 512), torch.randn(512, 512, device="cuda") / 23
    out, static, graph = torch.empty_like(stream), torch.empty(4, 512, 512, device="cuda"), None
    parts, device = slices(64, 4), torch.device("cuda")
    with Feed((stream,), parts, device) as feed, Drain(out, device) as drain:
        for part, (value,) in zip(parts, feed, strict=True):
            static.copy_(value)
            if graph is None:
                static @ weight
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    result = static @ weight
                    for _ in range(50):
                        result = result @ weight
            graph.replay()
            drain.put(part, result.clone())
    expected = stream.cuda() @ weight
    for _ in range(50):
        expected = expected @ weight
    torch.testing.assert_close(out.cuda(), expected, rtol=1e-3, atol=1e-5)


def test_an_error_in_writing_is_the_callers() -> None:
    wrong = torch.zeros(2, 7)
    with pytest.raises(RuntimeError), Drain(STREAMS[1].clone(), torch.device("cpu")) as drain:
        drain.put(slice(0, 2), wrong)
    assert threads() == []


def test_an_error_of_the_caller_is_not_hidden_by_one_in_writing() -> None:
    wrong: Tensor = torch.zeros(2, 7)
    with pytest.raises(ValueError, match="mine"), Drain(STREAMS[1].clone(), torch.device("cpu")) as drain:
        drain.put(slice(0, 2), wrong)
        raise ValueError("mine")
    assert threads() == []
