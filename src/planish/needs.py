"""Needs: memory and disk of a run, from shapes alone.

    GPU     streams there + max(embedding, span), as `shadow` finds them; a whole-model stage as `plan` has it
    host    this process as it is + streams there + shards not written yet + embedding or span, on a CPU
    disk    every layer encoded on the meta device; every other tensor as it is; what lies beside them

Host memory is what the system can't take back: pages of mapped files (libraries, weights as they are read,
activations on disk) don't count. Knows nothing of time, and of no better request.
"""

import ctypes
import dataclasses
import gc
import inspect
from dataclasses import dataclass, field
from pathlib import Path

import torch

from planish.checkpoint import CheckpointWriter, Content
from planish.errors import PlanishError
from planish.fit.reconstruct import Reconstruct
from planish.fit.whole import EndToEnd
from planish.folder import side_files
from planish.log import peak_bytes
from planish.plan import HOST_SHARE, MARGIN, Room, StreamPlan, check_waiting, gigabytes, plan_streams, plan_whole
from planish.qtensor import QTensor
from planish.request import Resolved
from planish.run import compute_dtype
from planish.scheme import Scheme
from planish.shadow import META, PIECE, Held, Ledger, Searched, held_by
from planish.tables import table_shapes
from planish.ways import wants_checkpointing, whole_size

SHARD: int = inspect.signature(CheckpointWriter).parameters["shard_bytes"].default
# bytes of a tensor's entry in a header, and of a layer's in config.json, run.json and an index; besides its name
ENTRY, MENTION = 80, 200
# bytes a weight that a layer takes while its codes are packed, on a CPU: as bytes, as padded rows, as words
PACKING = 3
# host memory that pieces below `shadow.PIECE` take in glibc's heap, over what they are: freed ones leave holes.
# Empirical: SmolLM2 with rtn, signround and block_ap, glibc 2.36. With MALLOC_MMAP_THRESHOLD_=262144 it is 1.
HEAP = 1.9
# ... and where inputs are rounded, whose pieces are of many sizes. Empirical: SmolLM2 with omniquant and smoothquant
ROUNDED_HEAP = 2.5
# of cuBLAS on the GPU, for each stream: a step is warmed up, captured and replayed on three
WORKSPACE = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes of a checkpoint: quantized layers and other tensors by name, and all of it; how many tensors."""

    layers: dict[str, int]
    others: dict[str, int]
    total: int
    tensors: int

    @property
    def shards(self) -> int:
        return -(-self.total // SHARD)


def disk_of(resolved: Resolved) -> Disk:
    """What the checkpoint of a request will take."""
    source, skeleton = resolved.source, resolved.source.skeleton()
    shapes = resolved.shapes | table_shapes(resolved.arch, skeleton)
    sizes: dict[tuple[Scheme, tuple[int, int]], tuple[int, int]] = {}
    layers, entries, count = {}, 0, 0
    for name, scheme in (resolved.schemes | resolved.tables).items():
        kind = scheme, shapes[name]
        sizes[kind] = sizes.get(kind) or _encoded(resolved, name, *kind)
        layers[name] = sizes[kind][0]
        entries += sizes[kind][1] * (ENTRY + len(name)) + MENTION
        count += sizes[kind][1]
    known = dict(skeleton.named_parameters(remove_duplicate=False)) | dict(skeleton.named_buffers())
    others = {}
    for name in source.names():
        if name.removesuffix(".weight") not in layers:
            others[name] = (known[name] if name in known else source.get(name)).nbytes
            entries += ENTRY + len(name)
    beside = sum(_length(content) for content in side_files(source.folder, skeleton, None).values())
    total = sum(layers.values()) + sum(others.values()) + entries + beside
    return Disk(layers=layers, others=others, total=total, tensors=count + len(others))


def _encoded(resolved: Resolved, name: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    """Bytes and number of the tensors that a layer becomes."""
    groups = shape[0], scheme.groups_in(shape[1])
    with Ledger(eager=False):
        tensors = resolved.format.encode(
            name,
            QTensor(
                codes=torch.empty(shape, dtype=torch.uint8, device=META),
                scale=torch.empty(groups, dtype=torch.float16, device=META),
                zero=None if scheme.symmetric else torch.empty(groups, dtype=torch.uint8, device=META),
                bits=scheme.bits,
                group_size=scheme.group_in(shape[1]),
            ),
        )
    return sum(tensor.nbytes for tensor in tensors.values()), len(tensors)


def _length(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request on a machine.

    Args:
        samples: windows that there are; 0 if the recipe needs none. micro_batch: samples in a pass, at most.
        room: what is free; of the device all that this process may have.
        idle: bytes of host memory before anything is done.
        unseen: bytes on the GPU that were measured and not foreseen.
        known, searched: what spans hold and searches take, once it was found; the case's kin share them.
    """

    resolved: Resolved
    samples: int
    device: torch.device
    micro_batch: int
    storage: str
    room: Room
    idle: int
    disk: Disk
    unseen: int = 0
    known: dict[tuple[int, ...], Held] = field(default_factory=dict)
    searched: Searched = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.resolved.source.dtype, self.device)

    @property
    def sample(self) -> int:
        """Bytes of a sample's activations."""
        return self.resolved.seqlen * self.resolved.source.config.get_text_config().hidden_size * self.dtype.itemsize

    @property
    def batch(self) -> int:
        """Samples a step, or in a pass where there are no steps."""
        stage = self.fit if self.resolved.recipe.blocks else self.resolved.recipe.whole
        return self.micro_batch if stage is None else stage.batch_size

    @property
    def fit(self) -> Reconstruct | None:
        """Of the blocks, if they are fitted."""
        return self.resolved.recipe.blocks[0].fit if self.resolved.recipe.blocks else None

    def spans(self) -> list[range]:
        fit, count = self.fit, self.resolved.arch.num_blocks
        length = fit.span if fit else 1
        return [range(start, min(start + length, count)) for start in range(0, count, length)]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a case takes: bytes at most, streams and their bytes on disk, samples in a pass, why it won't run.

    `held` is what of `gpu` the blocks take, the streams aside; `left_out` what the run goes without, for its memory.
    """

    gpu: int
    held: int
    host: int
    streams: StreamPlan | None
    files: int
    micro_batch: int
    problem: str
    left_out: str = ""


def needs_of(case: Case) -> Needs:
    """What a case takes.

    Raises:
        PlanishError: if the memory of the model's blocks can't be predicted.
    """
    if not case.resolved.recipe.blocks:
        return _inside_alone(case)
    streams, on_gpu = _streams(case), case.device.type == "cuda"
    total = streams.count * streams.bytes_each if streams else 0
    where = streams.where if streams else ""
    lying = total * (where == "device")
    held, micro = _held(case, case.unseen + lying + _ahead(case, where) + _workspaces(case))
    blocks = held.most + _ahead(case, where) + _workspaces(case)
    small = 0 if on_gpu else held.small
    host = case.idle + max(
        total * (where == "host") + _at_blocks(case, 0 if on_gpu else blocks, small, where), _at_the_end(case, small)
    )
    gpu = lying + blocks + case.unseen if on_gpu else 0
    whole = _whole(case, case.resolved.recipe.whole)
    found = Needs(
        gpu=max(gpu, whole.gpu),
        held=blocks if on_gpu else 0,
        host=max(host, whole.host),
        streams=streams,
        files=total * (where == "disk"),
        micro_batch=micro,
        problem=whole.problem,
        left_out=whole.left_out,
    )
    return dataclasses.replace(found, problem=whole.problem or _problem(case, found, gpu))


def _inside_alone(case: Case) -> Needs:
    """What a float model takes that has factors inside, and no blocks to go through before it is trained."""
    stage = case.resolved.recipe.whole
    assert stage is not None
    for tried in stage.ways():
        whole = _whole(case, tried)
        if not whole.problem:
            break
    host = max(whole.host, case.idle + _at_the_end(case, 0))
    found = Needs(
        gpu=whole.gpu, held=0, host=host, streams=None, files=0, micro_batch=whole.micro_batch, problem=whole.problem
    )
    return dataclasses.replace(found, problem=whole.problem or _problem(case, found, 0))


def _streams(case: Case) -> StreamPlan | None:
    """Where they will live, on a disk that is large enough."""
    if not case.samples:
        return None
    fit = case.fit
    hidden = case.resolved.source.config.get_text_config().hidden_size
    return plan_streams(
        case.samples,
        case.resolved.seqlen,
        hidden,
        case.dtype,
        case.storage,
        case.device,
        dataclasses.replace(case.room, disk=1 << 62),
        count=1 if fit is None else 2 if fit.target == "float" else 3,
    )


def _held(case: Case, besides: int) -> tuple[Held, int]:
    """What the largest span holds, with half as many samples in a pass until it fits, as `fit.spans.trial` has it."""
    sizes = [case.micro_batch]
    if case.device.type == "cuda" and case.fit is not None:
        sizes = [case.micro_batch >> shift for shift in range(case.micro_batch.bit_length())]

    def fits(micro: int) -> bool:
        return MARGIN * (_held_with(case, micro).most + besides) <= case.room.device

    if len(sizes) > 1 and not fits(sizes[0]) and not fits(1):
        sizes = [1]
    micro = next((size for size in sizes[:-1] if fits(size)), sizes[-1])
    return _held_with(case, micro), micro


def _held_with(case: Case, micro_batch: int) -> Held:
    resolved, spans = case.resolved, case.spans()
    key = micro_batch, case.batch, len(spans), resolved.seqlen, case.samples
    if key not in case.known:
        skeleton = resolved.source.skeleton()
        sizes = [
            sum(p.numel() for index in span for p in skeleton.get_submodule(resolved.arch.block(index)).parameters())
            for span in spans
        ]
        case.known[key] = held_by(
            resolved.source,
            resolved.arch,
            resolved.recipe.blocks[0],
            resolved.schemes,
            spans[sizes.index(max(sizes))],
            samples=case.samples,
            seqlen=resolved.seqlen,
            micro_batch=micro_batch,
            dtype=case.dtype,
            on_cpu=case.device.type == "cpu",
            searched=case.searched,
        )
    return case.known[key]


def _ahead(case: Case, where: str) -> int:
    """Batches of inputs and targets that lie ready on the device, besides the one at work: see `feed`."""
    if where in ("", "device") or case.fit is None:
        return 0
    return (1 if case.device.type == "cuda" else 2) * 2 * case.batch * case.sample


def _workspaces(case: Case) -> int:
    if case.device.type != "cuda":
        return 0
    return WORKSPACE if case.fit is None else 3 * WORKSPACE


def _at_blocks(case: Case, on_cpu: int, small: int, where: str) -> int:
    """Host memory while the last span is worked on, the streams aside: shards wait until they are full."""
    layers, shapes = case.disk.layers, case.resolved.shapes
    blocks = [f"{case.resolved.arch.block(index)}." for index in case.spans()[-1]]
    last = sum(size for name, size in layers.items() if name.startswith(tuple(blocks)))
    inside = sum(size for name, size in layers.items() if name in shapes)
    holes = (_heap(case) - 1) * (small + min(_small(case), SHARD))
    on_gpu = case.device.type == "cuda"  # which packs there
    packing = 0 if on_gpu else PACKING * max(rows * columns for rows, columns in shapes.values())
    if case.resolved.recipe.whole is not None:
        return round(inside + max(on_cpu, packing) + holes)
    through_pinned = on_gpu and where in ("host", "disk")
    pinned = max(4 * case.batch, 5 * case.micro_batch) * case.sample if through_pinned else 0  # slots: see `feed`
    return round(pinned + holes + max(min(inside - last, SHARD) + on_cpu, min(inside, SHARD) + packing))


def _heap(case: Case) -> float:
    return ROUNDED_HEAP if any(scheme.activations for scheme in case.resolved.schemes.values()) else HEAP


def _small(case: Case) -> int:
    """Bytes of layers that lie in the heap."""
    return sum(size for size in case.disk.layers.values() if size < PIECE)


def _at_the_end(case: Case, small: int) -> int:
    """Host memory while shards are written: what waits for one, the tensor that fills it, the heap with its holes."""
    waiting = most = 0
    for size in (*case.disk.layers.values(), *case.disk.others.values()):
        most = max(most, waiting + size)
        waiting = size if waiting + size > SHARD else waiting + size  # as `CheckpointWriter.add` has it
    return round(most + (_heap(case) - 1) * min(_small(case), SHARD) + _heap(case) * small)


@dataclass(frozen=True)
class _Whole:
    """Memory of a whole-model stage, samples in a pass, why it can't be, what is left out of the run for it."""

    gpu: int = 0
    host: int = 0
    micro_batch: int = 0
    problem: str = ""
    left_out: str = ""


def _whole(case: Case, stage: EndToEnd | None) -> _Whole:
    """What a whole-model stage takes; a way that has no room gives way to the next."""
    resolved = case.resolved
    if stage is None:
        return _Whole()
    size = whole_size(resolved.source.skeleton(), resolved.schemes, stage, case.dtype)
    micro = min(case.micro_batch, stage.batch_size)
    others = stage.distill > 0 and not (stage.inside is not None and stage.inside.own_teacher)
    taught = case.samples * case.sample * others
    # the other model's hidden states go to a file where memory is short
    host = case.idle + size.waiting + (taught if taught < HOST_SHARE * case.room.host else 0)
    try:
        check_waiting(size, case.room.host)
        if case.device.type != "cuda":
            must = stage.optional or bool(stage.if_room)
            micro = size.most(micro, resolved.seqlen, case.room.host + case.idle - host, must)
            return _Whole(0, host + size.peak(micro * resolved.seqlen, lean=False, checkpointing=False), micro)
        plan = plan_whole(
            size,
            seqlen=resolved.seqlen,
            batch_size=stage.batch_size,
            micro_batch=micro,
            checkpointing=wants_checkpointing(size, case.device),
            lean=None,
            free=case.room.device,
            host=case.room.host,
        )
    except PlanishError as error:
        if stage.if_room:
            return _without(case, stage)
        if stage.optional:
            return _Whole(micro_batch=micro, left_out=f"{stage.name} is left out: {error}")
        return _Whole(size.peak(resolved.seqlen, lean=True, checkpointing=True), host, 1, str(error))
    if plan.lean and stage.if_room:
        return _without(case, stage)
    host += size.host(stage.batch_size * resolved.seqlen) if plan.lean else 0
    return _Whole(plan.bytes, host, plan.micro_batch)


def _without(case: Case, stage: EndToEnd) -> _Whole:
    """The next way, which goes without what there is no room for."""
    found = _whole(case, stage.ways()[-1])
    said = f"{stage.name} leaves {stage.spared} as they are: there is no memory to train them"
    return dataclasses.replace(found, left_out=found.left_out or said)


def _problem(case: Case, needs: Needs, gpu: int) -> str:
    """Why it won't run; `gpu` is what the blocks take there, since `plan_whole` judges what is behind them."""
    room = case.room
    if case.device.type == "cuda" and MARGIN * gpu > room.device:
        return f"of {gigabytes(room.device)} of GPU memory, {gigabytes(gpu)} leave no tenth to spare"
    if needs.host - case.idle > room.host:
        return f"{gigabytes(room.host + case.idle)} of host memory are there and {gigabytes(needs.host)} needed"
    if needs.files + case.disk.total > room.disk:
        written = f"{gigabytes(needs.files)} of activations and {gigabytes(case.disk.total)} of checkpoint"
        return f"{room.folder} has {gigabytes(room.disk)} free, too little for {written}"
    return ""


def private_memory() -> int:
    """Bytes of this process's memory that no file backs; all that is resident, where the system doesn't tell. What was
    freed and kept for later by glibc isn't counted: it is given back first."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return peak_bytes(torch.device("cpu"))
