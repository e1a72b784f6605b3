"""Shadow: what a run holds in memory, found by running it on the meta device, where tensors have shapes, no numbers.

    live bytes = sum over the storages that are alive        peak = the largest it has been

A `Ledger` sees every operation and the end of every storage while the run's own code goes through the embedding
and one span: float pass, search, steps forward and backward, codes. So this file repeats no formula of a method, and
a method that is changed is predicted anew. What happens inside one operation isn't seen; what that comes to is said
beside the constants below. Knows nothing of hosts, files or time.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planish.arch import Arch
from planish.edges import Proposals, proposals
from planish.errors import PlanishError, first_line
from planish.fit.spans import Job, Stage, run_block, run_stage
from planish.scheme import Scheme
from planish.skeleton import put
from planish.source import Source
from planish.stream import BlockStream, record

META = torch.device("meta")
# fp32 tensors of the first argument's size that eager definitions in `qtensor` and `quant.activation` hold at their
# fullest, besides what goes in and comes out; a GPU has one kernel instead
EAGER = {
    "planish::fake_quantize": 2,
    "planish::fake_quantize_backward": 5,
    "planish::round_tokens": 3,
    "planish::round_tokens_backward": 7,
}
PIECE = 1 << 25  # bytes from which glibc takes memory from the system, and gives it back at once
FEW = 2  # tokens that edges are found by
STEPS = 2  # in the second one the optimizer's moments lie beside the activations


class Ledger(TorchDispatchMode):
    """Counts the bytes of meta tensors, as a context; a number asked of one is 1.

    Args:
        eager: whether operations of EAGER have temporaries, as on a CPU.

    Attributes:
        live, peak: of all storages. small, most_small: of those below PIECE.
    """

    def __init__(self, *, eager: bool) -> None:
        super().__init__()
        self.eager, self.live, self.peak, self.small, self.most_small = eager, 0, 0, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._enter(leaf)
        if self.eager and (count := EAGER.get(func.name())):
            self.touch(count, 4 * args[0].numel())
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._count(size)
            self.touch(1, 0)
            weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._count(-size)

    def _count(self, size: int) -> None:
        self.live += size
        self.small += size if abs(size) < PIECE else 0

    def touch(self, count: int, size: int) -> None:
        """So many pieces more, of such a size, were live for a moment."""
        self.peak = max(self.peak, self.live + count * size)
        self.most_small = max(self.most_small, self.small + (count * size if size < PIECE else 0))

    def restart(self) -> None:
        """Forget the peak, not what is live."""
        self.peak = self.live


class FusedAttention(TorchFunctionMode):
    """Attention as one operation, as devices have it; the meta device would spell it out, all scores at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and not kwargs.get("dropout_p"):
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            given = {key: kwargs[key] for key in ("is_causal", "attn_mask", "scale") if key in kwargs}
            return fused(*args[:3], **given)[0]
        return func(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes on the device besides the streams: at most while the embedding runs, and while a span is worked on.

    `small` is what of either lies in pieces below PIECE.
    """

    embedding: int
    span: int
    small: int

    @property
    def most(self) -> int:
        return max(self.embedding, self.span)


class _Blocks:
    """Blocks that are made anew on meta whenever they are loaded."""

    def __init__(self, model: nn.Module, names: list[str], dtype: torch.dtype) -> None:
        self.model, self.names, self.dtype = model, names, dtype

    def load(self, index: int) -> nn.Module:
        block = self.model.get_submodule(self.names[index])
        return copy.deepcopy(block, {id(old): _like(old, self.dtype) for old in block.parameters()})

    def unload(self, index: int) -> None:
        """It goes with the last who holds it."""


def _like(parameter: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=META), requires_grad=False)


Searched = dict[Any, tuple[nn.Module, int]]


class _Once:
    """Builds range slots, each kind of them once: the search of one matrix is that of another of its shape.

    Args:
        search: False doesn't count what building takes, for devices that search a few rows at a time.
        made: slots by kind, and what building them took besides what they are.
    """

    def __init__(self, make: Callable[..., nn.Module], ledger: Ledger, search: bool, made: Searched) -> None:
        self.make, self.ledger, self.search, self.made = make, ledger, search, made

    def __call__(self, groups: Tensor, scheme: Scheme, importance: Tensor | None) -> nn.Module:
        key = groups.shape, groups.dtype, scheme, None if importance is None else importance.shape
        if key in self.made:
            slot, took = self.made[key]
            self.ledger.touch(1, took if self.search else 0)
            return copy.deepcopy(slot)
        before, most, most_small = self.ledger.live, self.ledger.peak, self.ledger.most_small
        self.ledger.restart()
        slot = self.make(groups, scheme, importance)
        self.made[key] = slot, self.ledger.peak - before
        if not self.search:
            self.ledger.peak, self.ledger.most_small = most, most_small
        self.ledger.peak, self.ledger.most_small = max(most, self.ledger.peak), max(most_small, self.ledger.most_small)
        return slot


def held_by(
    source: Source,
    arch: Arch,
    stage: Stage,
    schemes: dict[str, Scheme],
    span: range,
    *,
    samples: int,
    seqlen: int,
    micro_batch: int,
    dtype: torch.dtype,
    on_cpu: bool,
    searched: Searched,
) -> Held:
    """What a stage holds on its device at most, while it works on a span of blocks.

    Args:
        span: of the blocks' indices. samples, seqlen: of the streams.
        micro_batch: samples in a forward or backward pass.
        dtype: of weights and activations. on_cpu: whether the device is the CPU.
        searched: what was found of searches of this stage before, added to; empty at first.

    Raises:
        PlanishError: if the model's code asks for numbers, so that it can't run without them.
    """
    model: nn.Module = copy.deepcopy(source.skeleton())
    model.to(META)
    ledger, fit = Ledger(eager=on_cpu), stage.fit
    asked = fit.batch_size if fit else micro_batch
    # two passes of a step are like many; a sample that is left out has its input and target in two places each
    batch = min(fit.batch_size, 2 * micro_batch) if fit else micro_batch
    if fit:
        fit = dataclasses.replace(fit, batch_size=batch, steps=STEPS, checks=1, compile=False)
    stage = dataclasses.replace(stage, fit=fit, range=_Once(stage.range, ledger, not on_cpu, searched))
    few = _few(source, arch) if stage.smooth else []
    shown = min(samples, max(batch, micro_batch) + -(-batch // 3))  # a batch beside those that are held out
    ids = torch.zeros(shown, seqlen, dtype=torch.int64, device=META)
    with FusedAttention(), ledger, _telling(source.label):
        stream = _stream(model, arch, ids, micro_batch, dtype, fit is not None) if stage.needs_data else None
        streams = stream.fp.nbytes + stream.quant.nbytes if stream else 0
        embedding = ledger.peak - ids.nbytes - streams
        ledger.restart()
        blocks = _Blocks(model, [arch.block(index) for index in range(span.stop)], dtype)
        run_stage(_job(stage, blocks, schemes, stream, span.start, micro_batch, few))
    sample = stream.fp[0].nbytes if stream else 0
    lying = streams if stream and stream.fp.nbytes < PIECE else 0
    target = stream.fp.nbytes if stream and fit and fit.target != "float" else 0  # a third stream
    buffers = 4 * sample * max(0, min(asked, samples) - batch) if fit else 0
    return Held(
        embedding=max(0, embedding),
        span=ledger.peak - streams - target + buffers,
        small=ledger.most_small - lying,
    )


def _job(
    stage: Stage,
    blocks: _Blocks,
    schemes: dict[str, Scheme],
    stream: BlockStream | None,
    first: int,
    micro_batch: int,
    few: list[dict[str, Any]],
) -> Job:
    """A job whose results nobody takes; edges are found by two tokens, with the arguments in `few`."""

    def edges_of(index: int, block: nn.Module) -> Proposals:
        assert stream is not None
        return proposals(block, stream.fp[:1, :FEW], few[index], run_block)

    return Job(
        stage=stage,
        blocks=blocks,
        schemes=schemes,
        stream=stream,
        first=first,
        sink=lambda name, quantized: None,
        keep=lambda name, value: None,
        device=META,
        micro_batch=micro_batch,
        seed=0,
        proposals=edges_of,
    )


def _few(source: Source, arch: Arch) -> list[dict[str, Any]]:
    """What FEW tokens give each block besides hidden states, with numbers: weights around the blocks are all 0."""
    model: nn.Module = copy.deepcopy(source.skeleton())
    for name in arch.around:
        for leaf, weight in list(model.get_submodule(name).named_parameters()):
            nothing = torch.zeros((), dtype=weight.dtype).expand(weight.shape)  # takes no room
            put(model, f"{name}.{leaf}", nn.Parameter(nothing, requires_grad=False))
    blocks = model.get_submodule(arch.blocks)
    assert isinstance(blocks, nn.ModuleList)
    ids = torch.zeros(1, FEW, dtype=torch.int64)
    with _telling(source.label):
        return record(model.get_submodule(arch.decoder), blocks, ids, every_block=True)[1]


@contextmanager
def _telling(label: str) -> Iterator[None]:
    """Says whose code it is that can't run without numbers."""
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise PlanishError(
            f"the memory of {label} can't be predicted: its code doesn't run without numbers "
            f"({first_line(error)}); run it on a few samples (--samples 16) and see"
        ) from error


def _stream(
    model: nn.Module, arch: Arch, ids: Tensor, micro_batch: int, dtype: torch.dtype, quantized: bool
) -> BlockStream:
    """The streams behind an embedding that is there for as long as it is needed."""
    blocks = model.get_submodule(arch.blocks)
    assert isinstance(blocks, nn.ModuleList)
    around = [parameter for name in arch.around for parameter in model.get_submodule(name).parameters()]
    for parameter in around:
        parameter.data = _like(parameter, dtype)
    stream = BlockStream(
        model.get_submodule(arch.decoder),
        blocks,
        ids,
        device=META,
        storage="device",
        micro_batch=micro_batch,
        quantized=quantized,
    )
    for parameter in around:
        parameter.data = parameter.data.new_empty(0)
    return stream
