"""The forecast: disk exact, memory as counted, what doesn't fit is mended by flags that do."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import planish
from planish import qtensor
from planish.checkpoint import CheckpointWriter
from planish.errors import PlanishError
from planish.fit.spans import Stage
from planish.forecast import CONTEXT, _blocks_alone, _suggestions, forecast, parse_size, seconds_of
from planish.formats import FORMATS
from planish.needs import Case, _at_the_end, _whole, disk_of, needs_of
from planish.plan import MARGIN, Room, duration
from planish.probe import Pace
from planish.quant import activation, search
from planish.request import Resolved, resolve
from planish.shadow import EAGER, META, Held, Ledger, held_by
from planish.ways import whole_size

GB = 10**9
Tiny = Callable[..., Path]
SMALL = {"samples": 8, "seqlen": 32}
IDS = torch.arange(8 * 1024).reshape(8, 1024) % 272


@pytest.fixture(autouse=True)
def no_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS's would hide all that a tiny model takes."""
    monkeypatch.setattr("planish.needs.WORKSPACE", 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * GB), ("24 gib", 24 * 2**30), ("1.5G", 1_500_000_000), ("500MB", 500_000_000), ("2TiB", 2**41)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "24 quarts", "-1GB", "0GB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(PlanishError, match="write it as 24GB"):
        parse_size(text)


def test_durations() -> None:
    assert [duration(s) for s in (0.2, 60, 600, 7200)] == ["1 s", "60 s", "10 min", "2.0 h"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("scheme", "format"),
    [("w4g32", "native"), ("w3g32asym", "native"), ("w2g32", "auto_round"), ("w4g32", "gptq"), ("w4g32asym", "gptq_v2"),
     ("w4g32", "compressed_tensors")],
)  # fmt: skip
def test_disk_is_what_is_written(tiny_llama: Tiny, tmp_path: Path, scheme: str, format: str, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied, vocab_size=2048, num_hidden_layers=3)
    predicted = disk_of(resolve(model, "rtn", scheme, format=format))
    out = tmp_path / "out"
    planish.quantize_to(model, out, "rtn", scheme, format=format, device="cpu")
    tensors = sum(predicted.layers.values()) + sum(predicted.others.values())
    file = out / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size - header == tensors
    written = json.loads(file.read_bytes()[8:header])
    assert predicted.tensors == len(written) - ("__metadata__" in written)
    # names weigh much in a tiny model; the tensors are exact
    assert predicted.total - tensors == pytest.approx(sum(f.stat().st_size for f in out.iterdir()) - tensors, rel=0.15)


def test_disk_of_quantized_embeddings(tiny_llama: Tiny) -> None:
    model = tiny_llama(vocab_size=4096)
    whole, packed = (disk_of(resolve(model, "rtn", "w4g32", embeddings=bits)) for bits in (16, 4))
    assert {"model.embed_tokens", "lm_head"} < packed.layers.keys()
    table = 4096 * 64
    assert whole.others["lm_head.weight"] == 2 * table
    assert packed.layers["lm_head"] == table // 2 + 2 * table // 32


def test_ledger_counts_what_lives() -> None:
    with Ledger(eager=False) as ledger:
        first = torch.empty(1000, device=META)
        second = first.view(10, 100) + 1
        assert (ledger.live, ledger.peak) == (8000, 8000)
        assert second.sum().item() == 1.0
        del first
        assert ledger.live == 4000
        del second
        assert (ledger.live, ledger.peak) == (0, 8004)


@pytest.mark.parametrize("rounding", [True, False])
def test_temporaries_of_the_eager_definitions(rounding: bool) -> None:
    """EAGER says what definitions hold besides what goes in and comes out."""
    weight, grad = (torch.empty(256, 4, 64, device=META) for _ in "ab")
    offset = torch.empty_like(weight) if rounding else None
    scale, zero = (torch.empty(256, 4, 1, device=META) for _ in "ab")
    rows, grads = (part.flatten(0, 1) for part in (weight, grad))
    given = {
        "fake_quantize": (weight, offset, scale, zero, 4, torch.float32),
        "fake_quantize_backward": (grad, weight, offset, scale, zero, 4, not rounding),
        "round_tokens": (rows, 4, rounding),
        "round_tokens_backward": (grads, rows, 4, rounding),
    }
    assert {f"planish::{name}" for name in given} == EAGER.keys()
    for name, arguments in given.items():
        definition = getattr(qtensor if name.startswith("fake") else activation, name)._init_fn
        with Ledger(eager=False) as ledger:
            made = definition(*arguments)
        made = made if isinstance(made, tuple) else (made,)
        taken = (ledger.peak - sum(part.nbytes for part in made)) / weight.nbytes
        assert taken == pytest.approx(EAGER[f"planish::{name}"], abs=0.5), name


def held(resolved: Resolved, micro_batch: int = 8, **more: Any) -> Held:
    how: dict[str, Any] = {"samples": 16, "seqlen": 64, "dtype": torch.bfloat16, "on_cpu": False, **more}
    stage = resolved.recipe.blocks[0]
    assert isinstance(stage, Stage)
    return held_by(
        resolved.source,
        resolved.arch,
        stage,
        resolved.schemes,
        range(1),
        micro_batch=micro_batch,
        searched={},
        **how,
    )


def test_a_model_that_needs_numbers_is_refused(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve(tiny_llama(), "signround", "w4g32", search=False, **SMALL)
    block = resolved.source.skeleton().get_submodule(resolved.arch.block(0))

    def routed(self: nn.Module, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden.new_zeros(len((hidden > 0).nonzero()))

    monkeypatch.setattr(type(block), "forward", routed)
    with pytest.raises(PlanishError, match="can't be predicted"):
        held(resolved)


def case(resolved: Resolved, device: str = "cuda", gpu: int = 80 * GB, host: int = 500 * GB, **more: Any) -> Case:
    room = Room(device=gpu, host=host, disk=1000 * GB, folder=Path("/data"))
    how: dict[str, Any] = {"samples": 128, "micro_batch": 8, "storage": "auto", "idle": GB // 2, **more}
    return Case(resolved=resolved, device=torch.device(device), room=room, disk=disk_of(resolved), **how)


def test_streams_are_where_the_plan_has_them(tiny_llama: Tiny) -> None:
    resolved = resolve(tiny_llama(), "signround", "w4g32", search=False, **SMALL)
    on_gpu, on_host, on_disk = (needs_of(case(resolved, storage=name)) for name in ("device", "host", "disk"))
    both = 2 * 128 * 32 * 64 * 2
    batches = 2 * 8 * 32 * 64 * 2  # inputs and targets that lie ready
    assert on_gpu.gpu - on_host.gpu == both - batches
    assert on_host.host - on_gpu.host > both
    assert on_disk.gpu == on_host.gpu and on_disk.files == both and on_host.files == 0
    assert on_gpu.problem == on_host.problem == on_disk.problem == ""


def test_shards_wait_as_the_writer_has_them(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve(tiny_llama(), "rtn", "w4g32")
    disk = disk_of(resolved)
    for limit in (1, 5_000, 20_000, 1 << 29):
        most, writer = 0, CheckpointWriter(tmp_path / str(limit), shard_bytes=limit)
        with writer:
            for number, size in enumerate((*disk.layers.values(), *disk.others.values())):
                most = max(most, writer._pending_bytes + size)
                writer.add(str(number), torch.empty(size, dtype=torch.uint8))
            writer.finish({})
        monkeypatch.setattr("planish.needs.SHARD", limit)
        monkeypatch.setattr("planish.needs.HEAP", 1)
        assert _at_the_end(case(resolved), 0) == most


def test_passes_are_halved_before_a_run_is_refused(tiny_llama: Tiny) -> None:
    resolved = resolve(tiny_llama(), "signround", "w4g32", search=False, **SMALL)
    ample = needs_of(case(resolved, storage="host"))
    assert (ample.micro_batch, ample.problem) == (8, "")
    less = needs_of(case(resolved, storage="host", gpu=round(ample.gpu * 0.9)))
    assert less.micro_batch in (1, 2, 4) and less.gpu < ample.gpu and less.problem == ""
    none = needs_of(case(resolved, storage="host", gpu=ample.gpu // 20))
    assert none.micro_batch == 1 and "GPU memory" in none.problem


def test_what_the_host_and_the_disk_lack_is_said(tiny_llama: Tiny) -> None:
    resolved = resolve(tiny_llama(), "signround", "w4g32", search=False, **SMALL)
    assert "host memory" in needs_of(case(resolved, "cpu", host=1000)).problem
    full = case(resolved, "cpu", storage="disk")
    assert (
        "free, too little" in needs_of(dataclasses.replace(full, room=dataclasses.replace(full.room, disk=9))).problem
    )


def test_seconds_follow_from_the_pace(tiny_llama: Tiny) -> None:
    resolved = resolve(tiny_llama(), "signround", "w4g32", steps=40, span=1, batch_size=4, **SMALL)
    pace = Pace(embedding=1, passing=10, forward=5, span=100, step=2, once=7, writing=1e9, opening=0.1, beginning=3,
                held=0, blocks=1)  # fmt: skip
    # 2 blocks; 8 checks and the one before them, on 8 of 128 samples
    expected = 3 + 128 * (1 + 2 * 10) + 2 * (100 + 40 * 2) + 7 + 2 * 9 * 8 * 5 + 14 * 0.1
    assert seconds_of(case(resolved), pace) == pytest.approx(expected, rel=1e-4)


def test_a_gpu_that_is_not_here(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resolved = resolve(tiny_llama(), "signround", "w4g32", steps=5, search=False, **SMALL)
    ample = forecast(resolved, gpu_memory=parse_size("24GB"), data=IDS[:, :32])
    assert ample.fits and ample.seconds is None and ample.gpu_free == 24 * GB - CONTEXT
    assert ample.lines()[-1] == "it fits" and any("GPU memory" in line for line in ample.lines())
    none = forecast(resolved, gpu_memory=CONTEXT, data=IDS[:, :32])
    assert not none.fits and none.suggestions == ()
    assert none.lines()[-1] == "no flag that Planish knows makes it fit"


@pytest.fixture
def one_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices as small as these would be searched with all candidates together, which outweighs a step."""
    monkeypatch.setattr(search, "GPU_TRIED", 1)


@pytest.mark.usefixtures("one_candidate")
def test_transforms_and_rounded_activations_are_counted(tiny_llama: Tiny) -> None:
    model, asked = tiny_llama(), {**SMALL, "span": 1, "steps": 4}
    plain, moved, rounded = (
        held(resolve(model, "omniquant", scheme, let=let, **asked)).span
        for scheme, let in (("w4pc", False), ("w4pc", True), ("w4a4", False))
    )
    resolved = resolve(model, "omniquant", "w4pc", **asked)
    weights = sum(rows * columns for rows, columns in resolved.shapes.values()) / resolved.arch.num_blocks
    # a step backwards keeps each weight in fp32 to move it; edges are looked for in a copy of the block in fp64
    assert moved - plain > 4 * weights
    # and the widest linear's inputs in fp32, to round them: a step takes 4 samples of 64 tokens
    assert rounded - plain > 4 * (4 * 64) * 128


@pytest.mark.heavy
def test_suggestions_are_flags_that_fit(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tiny_llama(num_hidden_layers=3, max_position_embeddings=1024)
    keys: dict[str, Any] = {"samples": 8, "seqlen": 1024, "steps": 5, "search": False, "batch_size": 2}
    resolved = resolve(model, "signround", "w4g32", **keys)
    least = {span: needs_of(case(resolve(model, "signround", "w4g32", span=span, **keys), samples=8, micro_batch=1,
                                 storage="host")).gpu for span in (1, 3)}  # fmt: skip
    between = round(MARGIN * (least[1] + least[3]) / 2)
    found = forecast(resolved, gpu_memory=CONTEXT + between, storage="host", data=IDS, batch_size=2)
    assert not found.fits and "GPU memory" in found.needs.problem
    flags = [suggestion.flags for suggestion in found.suggestions]
    assert flags[0] == "span=1" and flags[1] in ("--seqlen 512", "--seqlen 256")
    assert all(MARGIN * suggestion.needs.gpu <= between for suggestion in found.suggestions)
    assert any("span=1" in line for line in found.lines())


@pytest.mark.heavy
def test_flags_are_put_together_where_one_is_too_little(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tiny_llama(num_hidden_layers=3, max_position_embeddings=1024)
    keys: dict[str, Any] = {"samples": 8, "steps": 5, "search": False, "batch_size": 2}
    short = resolve(model, "signround", "w4g32", span=1, seqlen=256, **keys)
    least = needs_of(case(short, samples=8, micro_batch=1, storage="disk")).gpu
    resolved = resolve(model, "signround", "w4g32", seqlen=1024, **keys)
    found = forecast(
        resolved, gpu_memory=CONTEXT + round(1.02 * MARGIN * least), storage="device", data=IDS, batch_size=2
    )
    assert [suggestion.flags for suggestion in found.suggestions] == ["span=1 --storage disk --seqlen 256"]


def test_a_run_is_probed_on_the_cpu(tiny_llama: Tiny) -> None:
    resolved = resolve(tiny_llama(), "signround", "w4g32", steps=5, search=False, **SMALL)
    found = forecast(resolved, device="cpu", data=IDS[:, :32])
    assert found.fits and found.needs.gpu == 0 and not found.on_gpu
    assert found.seconds is not None and 0 < found.seconds < 60
    assert {verdict.target for verdict in found.verdicts} >= {"vllm", "transformers"}
    untrained = forecast(resolve(tiny_llama(), "rtn", "w4g32"), device="cpu")
    assert untrained.needs.streams is None and untrained.seconds is not None


@pytest.mark.usefixtures("one_candidate")
def test_a_whole_model_stage_is_counted(tiny_llama: Tiny) -> None:
    resolved = resolve(tiny_llama(), "efficientqat", "w4g32asym", **SMALL)
    ample = case(resolved, samples=8, micro_batch=1)
    assert needs_of(ample).gpu > 0 and needs_of(ample).problem == ""
    short = dataclasses.replace(ample, room=dataclasses.replace(ample.room, device=100_000))
    assert "training takes" in needs_of(short).problem
    optional = case(resolve(tiny_llama(), "planish", "w4g32", **SMALL), samples=8, micro_batch=1)
    short = dataclasses.replace(optional, room=dataclasses.replace(optional.room, device=100_000))
    assert "training takes" not in needs_of(short).problem, "it would be left out"
    assert needs_of(short).left_out.startswith("end_to_end is left out: training takes")
    short = dataclasses.replace(optional, room=dataclasses.replace(optional.room, host=20_000))
    assert needs_of(short).left_out.startswith("end_to_end is left out: packed layers and the best state take")
    # layers of blocks alone are written as they come, and don't wait
    large = dataclasses.replace(optional, disk=dataclasses.replace(optional.disk, layers=dict.fromkeys(
        optional.disk.layers, GB)))  # fmt: skip
    host = needs_of(_blocks_alone(large)).host - large.idle
    assert host < 10 * GB < needs_of(large).host
    room = dataclasses.replace(large.room, host=host)
    assert "end_to_end=false" in [one.flags for one in _suggestions(dataclasses.replace(large, room=room))]
    # codes move where the Trainer has room for them, else scales alone, if need be lean
    stage = optional.resolved.recipe.whole
    assert stage is not None and not needs_of(optional).left_out
    sizes = [whole_size(optional.resolved.source.skeleton(), optional.resolved.schemes, way, torch.bfloat16)
             for way in stage.ways()]  # fmt: skip
    most = sizes[0].peak(32, lean=False, checkpointing=False)
    less = needs_of(dataclasses.replace(optional, room=dataclasses.replace(optional.room, device=most)))
    assert "end_to_end leaves weights as they are" in less.left_out and not less.problem
    # without a GPU it is the host's, by halves of the samples
    small = dataclasses.replace(optional, device=torch.device("cpu"), micro_batch=4)
    whole, of_two = _whole(small, stage), sizes[0].peak(2 * 32, lean=False, checkpointing=False)
    others = whole.host - small.idle - sizes[0].peak(4 * 32, lean=False, checkpointing=False)
    room = dataclasses.replace(small.room, host=others + int(1.1 * of_two) + 1)
    half = _whole(dataclasses.replace(small, room=room), stage)
    assert (whole.micro_batch, half.micro_batch, half.left_out) == (4, 2, "") and half.host < whole.host
    last = _whole(small, stage.ways()[1])
    others = last.host - small.idle - sizes[1].peak(4 * 32, lean=False, checkpointing=False)
    room = dataclasses.replace(small.room, host=others + 10_000)
    none = _whole(dataclasses.replace(small, room=room), stage)
    assert none.left_out.startswith("end_to_end is left out: not even one sample of 32 tokens has room in")


def test_a_float_model_trained_inside_is_counted(tiny_llama: Tiny) -> None:
    resolved = resolve(tiny_llama(), "l4q", "w4g32", rank=4, **SMALL)
    stage = resolved.recipe.whole
    assert stage is not None
    sizes = [whole_size(resolved.source.skeleton(), resolved.schemes, way, torch.bfloat16) for way in stage.ways()]
    ample = needs_of(case(resolved, samples=8))
    assert (ample.problem, ample.streams, ample.files, ample.micro_batch) == ("", None, 0, 8)
    assert ample.gpu == sizes[0].peak(8 * 32, lean=False, checkpointing=False)
    # frozen weights in 8 bits where those of 16 don't even fit lean; then nothing fits
    least = [size.peak(32, lean=True, checkpointing=False) for size in sizes]
    assert least[1] < least[0]
    eight = needs_of(case(resolved, samples=8, gpu=least[0] - 1))
    assert eight.problem == "" and least[1] <= eight.gpu < least[0] and eight.micro_batch == 1
    assert "training takes" in needs_of(case(resolved, samples=8, gpu=least[1] - 1)).problem
    # on a CPU it is all the host's, and what trains has a copy from the start and one of the best state
    on_cpu = needs_of(case(resolved, "cpu", samples=8))
    size = whole_size(resolved.source.skeleton(), resolved.schemes, stage, torch.float32)
    assert on_cpu.gpu == 0
    assert on_cpu.host == GB // 2 + size.peak(8 * 32, lean=False, checkpointing=False) + 8 * size.trained


@pytest.mark.parametrize(("recipe", "waiting"), [("l4q", 0), ("lrqat", 100 * 32 * 64 * 2)])
def test_a_teacher_that_is_not_the_frozen_weights_waits_on_the_host(
    tiny_llama: Tiny, recipe: str, waiting: int
) -> None:
    resolved = resolve(tiny_llama(), recipe, "w4g32", rank=4, distill=1.0, **SMALL)
    few, many = (needs_of(case(resolved, samples=samples)) for samples in (100, 200))
    assert many.host - few.host == waiting


def test_what_is_said_of_a_recipe_without_blocks(tiny_llama: Tiny) -> None:
    resolved = resolve(tiny_llama(), "lrqat", "w4g32", rank=4, samples=8, seqlen=256)
    found = forecast(resolved, device="cpu", data=IDS[:, :256])
    assert found.fits and found.seconds is None and found.batch == 8
    assert found.notes == ("the time of lrqat, which trains the model as a whole, isn't measured beforehand",)
    resolved = resolve(tiny_llama(max_position_embeddings=1024), "l4q", "w4g32", rank=4, samples=8, seqlen=1024)
    less = needs_of(case(dataclasses.replace(resolved, seqlen=512), micro_batch=1)).gpu
    short = forecast(resolved, data=IDS, gpu_memory=CONTEXT + less, probe=False)
    assert not short.fits and [suggestion.flags for suggestion in short.suggestions] == ["--seqlen 512"]


def test_a_gpu_and_the_cpu_contradict(tiny_llama: Tiny) -> None:
    with pytest.raises(PlanishError, match="drop it, or --device cpu"):
        forecast(resolve(tiny_llama(), "rtn", "w4g32"), device="cpu", gpu_memory=GB)


def test_every_format_that_is_written_can_be_sized(tiny_llama: Tiny) -> None:
    model = tiny_llama()
    for name in FORMATS:
        try:
            resolved = resolve(model, "rtn", "w4g32", format=name)
        except PlanishError:  # read only
            continue
        assert disk_of(resolved).total > 0, name


def test_a_mix_is_counted_and_own_text_is_not_written(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.run.own_windows", lambda *_, **__: pytest.fail("the model wrote"))
    resolved = resolve(tiny_llama(), "signround", "w2g32", samples=10, seqlen=32)
    found = forecast(resolved, data="embedded,self", device="cpu", probe=False)
    assert "what the model takes to write its own text isn't counted" in found.notes
    assert found.needs.streams is not None
    assert found.needs.streams.bytes_each == 10 * 32 * 64 * 4, "10 windows of hidden states in fp32"
