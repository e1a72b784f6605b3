"""The one loop of every method: over the model's blocks, one span at a time.

For each block: read it; let the float stream through (that is the target); put quantizers where its
linears were; fit them; hand the codes to the sink; let the quantized stream through; free the block.
Nothing reaches back, so that a block's memory is all that is needed besides the streams.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from planish.attention import rounded_heads
from planish.edges import Edge, Proposals, find_edges
from planish.errors import PlanishError
from planish.experts import has_experts
from planish.fit.norms import free, norms_of, settle
from planish.fit.reconstruct import NORM, TRANSFORM, Outcome, Reconstruct, reconstruct
from planish.fit.repeat import repeatable
from planish.fit.seen import Extent, Routed, Seen, input_moments
from planish.fit.step import WARM_UP
from planish.fit.turned import Inputs, asked, choose
from planish.fit.windowed import windowed
from planish.log import Clock, Event, Progress, peak_bytes
from planish.qtensor import QTensor, to_groups
from planish.quant import Fixed, MinMax, Nearest, QLinear, Quantizer, Searched
from planish.scheme import Scheme
from planish.stream import BlockStream
from planish.transform.smooth import Smooth, Smoothed

Sink = Callable[[str, QTensor], None]
Keep = Callable[[str, Tensor], None]

# a longer group's products cost more arithmetic than they are worth: g multiplications a weight and candidate
PRODUCTS_GROUP = 256


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pass over the model: what fills the three slots, and how they are fitted.

    Args:
        name: shown in progress.
        weight, range, rounding: what builds each slot, see `planish.quant`.
        smooth: channels that are scaled and shifted before weights are rounded, or None.
        fit: how a span is fitted, or None if the start is the result.
        importance: whether the range slot asks how much inputs matter: the mean square of each,
        products: or, for groups of at most PRODUCTS_GROUP, the mean products of a group's inputs.
    """

    name: str
    weight: Callable[..., nn.Module] = Fixed
    range: Callable[..., nn.Module] = MinMax
    rounding: Callable[..., nn.Module] = Nearest
    smooth: Smooth | None = None
    fit: Reconstruct | None = None
    importance: bool = False
    products: bool = False

    @property
    def needs_data(self) -> bool:
        return self.fit is not None or self.importance or self.smooth is not None


class Blocks(Protocol):
    """The decoder blocks of a model, loaded one at a time; see `api`."""

    @property
    def names(self) -> list[str]: ...

    def load(self, index: int) -> nn.Module: ...

    def unload(self, index: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every span of a run shares: the stage, where blocks and samples come from, where codes go.

    Args:
        sink: takes each linear's codes.
        schemes: of each linear; those that ask for turned inputs are changed where it doesn't pay.
        keep: takes other tensors of the blocks that were trained, by full name.
        first: block to begin with; those before it are finished, and the streams stand behind them.
        finished: told after each span how many blocks are finished, and how its fit went.
        errors: by linear how far W_hat is from the float weight W: |W_hat - W| / |W|, filled as they are finished.
        routed: by the name of a block's experts how many tokens of the float stream reach each; filled likewise.
        proposals: of a block by its index, where its edges can't be found since it has no numbers.
    """

    stage: Stage
    blocks: Blocks
    schemes: MutableMapping[str, Scheme]
    stream: BlockStream | None
    sink: Sink
    device: torch.device
    micro_batch: int
    seed: int
    keep: Keep | None = None
    clock: Clock = field(default_factory=Clock)
    first: int = 0
    finished: Callable[[int, Outcome | None], None] | None = None
    errors: dict[str, float] = field(default_factory=dict)
    routed: dict[str, list[int]] = field(default_factory=dict)
    proposals: Callable[[int, nn.Module], Proposals | None] = lambda index, block: None

    def unreached(self, index: int) -> list[str]:
        """Full names of the experts of a block that no token reaches."""
        mine = f"{self.blocks.names[index]}."
        return [
            f"{name}.{number}"
            for name, counts in self.routed.items()
            for number, count in enumerate(counts)
            if name.startswith(mine) and not count
        ]


def run_stage(job: Job, progress: Progress | None = None) -> list[Outcome]:
    """Quantize every block and give each linear's codes to the sink, in the order of the model.

    Raises:
        PlanishError: what the blocks' source raises, such as weights that aren't finite.
    """
    clock, names = job.clock, job.blocks.names
    outcomes: list[Outcome] = []
    length = job.stage.fit.span if job.stage.fit else 1
    for start in range(job.first, len(names), length):
        indices = range(start, min(start + length, len(names)))
        outcome = _one_span(job, indices)
        if outcome:
            outcomes.append(outcome)
        if job.finished:
            job.finished(indices.stop, outcome)
        if progress:
            progress(
                Event(
                    stage=job.stage.name,
                    index=indices.stop,
                    total=len(names),
                    name=names[start],
                    seconds=clock.seconds,
                    eta=clock.eta(indices.stop - job.first, len(names) - job.first),
                    peak_bytes=peak_bytes(job.device),
                    before=outcome.before if outcome else None,
                    after=outcome.after if outcome else None,
                    note="; ".join(_notes(job, indices, outcome)),
                )
            )
    return outcomes


def _notes(job: Job, indices: range, outcome: Outcome | None) -> list[str]:
    lonely = {job.blocks.names[index]: names for index in indices if (names := job.unreached(index))}
    said = [
        f"{name}: no token reaches {len(names)} of its experts, which are rounded by search, such as {names[0]}"
        for name, names in lonely.items()
    ]
    return [*(outcome.notes if outcome else ()), *said]


def trial(job: Job) -> Job:
    """The job with a micro-batch that a few steps of the largest span survive; halved until they do.

    Raises:
        PlanishError: if even one sample at a time is too much.
    """
    assert job.stage.fit is not None
    # as many as it takes until a step is captured and replayed
    rates = dict.fromkeys(job.stage.fit.rates, 1e-30)
    step = dataclasses.replace(job.stage.fit, steps=WARM_UP + 1, rates=rates)
    while True:
        try:
            _fit_largest(dataclasses.replace(job, stage=dataclasses.replace(job.stage, fit=step)))
            return job
        except torch.OutOfMemoryError:
            if job.micro_batch == 1:
                raise PlanishError(
                    "the largest block doesn't fit the GPU even one sample at a time; use shorter "
                    "samples (--seqlen), a smaller span, or --device cpu"
                ) from None
            job = dataclasses.replace(job, micro_batch=job.micro_batch // 2)
            if job.stream is not None:
                job.stream.micro_batch = min(job.stream.micro_batch, job.micro_batch)
        finally:
            torch.cuda.empty_cache()


def _one_span(job: Job, indices: range) -> Outcome | None:
    span, linears = _load(job, indices)
    edges = _edges(job, span, linears)
    turnable = asked(job.schemes, linears)
    with Inputs(turnable) as inputs:
        seen, target = _float_pass(job, span, linears, {job.blocks.names[index]: span[index] for index in edges})
    choose(job.schemes, turnable, inputs.found)
    turned = asked(job.schemes, linears)
    for name in turned:
        seen.importance.pop(name, None)  # of other channels
    smoothed = _smooth(job, span, edges, seen, turned)
    layers = _attach(job, span, linears, seen.importance, smoothed)
    norms = _trained_norms(job, span)
    whole = nn.ModuleList(span.values())
    with rounded_heads(whole, job.schemes), repeatable(whole, job.device):
        outcome = _fit(job, span, layers, target, {NORM: free(norms), TRANSFORM: _trained(smoothed)})
    for name, value in {**settle(norms), **_fold(smoothed, linears)}.items():
        assert job.keep is not None, "norms are trained and nobody takes them"
        job.keep(name, value)
    for name, layer in layers.items():
        _quantize(job, name, layer)
    for index, block in span.items():
        if job.stream is not None and job.stage.fit is not None:
            with rounded_heads([block], job.schemes):
                job.stream.advance(job.stream.quant, block, index)
    for name, linear in linears.items():
        _replace(job, span, name, linear)
    for index in span:
        job.blocks.unload(index)
    return outcome


def _quantize(job: Job, name: str, layer: QLinear) -> None:
    """Codes to the sink; the layer keeps what they stand for."""
    weight, quantizer = layer.weight.detach(), layer.quantizer
    assert quantizer is not None
    quantized = quantizer.quantize(weight)
    layer.linear.weight.data, layer.quantizer = quantized.dequantize(weight.dtype), None
    job.errors[name] = _relative_error(layer.weight.detach(), weight)
    job.sink(name, quantized)


def _edges(job: Job, span: Mapping[int, nn.Module], linears: Mapping[str, nn.Linear]) -> dict[int, list[Edge]]:
    """By index the edges of the blocks that are to be smoothed."""
    smooth, stream = job.stage.smooth, job.stream
    if smooth is None or stream is None:
        return {}
    wanted = {name for name in linears if smooth.always or job.schemes[name].activations}
    return {
        index: find_edges(
            block, stream.fp[:1].to(job.device), stream.arguments[index], run_block, job.proposals(index, block)
        )
        for index, block in span.items()
        if any(name.startswith(f"{job.blocks.names[index]}.") for name in wanted)
    }


def _smooth(
    job: Job, span: Mapping[int, nn.Module], edges: Mapping[int, Sequence[Edge]], seen: Seen, turned: Collection[str]
) -> list[Smoothed]:
    """Every block's parameters seen moved, but for what takes turned inputs, whose channels are mixed."""
    smooth, names = job.stage.smooth, job.blocks.names
    if smooth is None:
        return []
    return [smooth.attach(names[i], span[i], found, seen.extremes, leave=turned) for i, found in edges.items()]


def _trained(smoothed: Sequence[Smoothed]) -> list[Tensor]:
    return [parameter for part in smoothed for parameter in part.parameters]


def _fold(smoothed: Sequence[Smoothed], linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    folded: dict[str, Tensor] = {}
    for part in smoothed:
        folded |= part.fold(linears)
    return folded


def _load(job: Job, indices: range) -> tuple[dict[int, nn.Module], dict[str, nn.Linear]]:
    """The blocks of a span by index, and their linears to quantize by full name."""
    span = {index: job.blocks.load(index) for index in indices}
    linears: dict[str, nn.Linear] = {}
    for index, block in span.items():
        named = ((f"{job.blocks.names[index]}.{path}", module) for path, module in block.named_modules())
        linears.update(
            (name, module) for name, module in named if isinstance(module, nn.Linear) and name in job.schemes
        )
    return span, linears


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, without a copy in fp32."""
    norms = [torch.linalg.vector_norm(value, dtype=torch.float32) for value in (found - wanted, wanted)]
    return float(norms[0] / norms[1]) if norms[1] > 0 else 0.0


def _attach(
    job: Job,
    span: Mapping[int, nn.Module],
    linears: Mapping[str, nn.Linear],
    importance: dict[str, Tensor],
    smoothed: Sequence[Smoothed] = (),
) -> dict[str, QLinear]:
    """Put a QLinear in the place of each linear; by full name."""
    layers, stage = {}, job.stage
    unreached = tuple(f"{name}." for index in span for name in job.unreached(index))
    for name, linear in linears.items():
        lonely = name.startswith(unreached)  # nothing is known that a fit could go by
        factors = [found for part in smoothed if (found := part.columns(name)) is not None]
        quantizer = Quantizer(
            linear.weight.detach(),
            job.schemes[name],
            weight_slot=Fixed if lonely else stage.weight,
            range_slot=Searched if lonely else stage.range,
            rounding_slot=Nearest if lonely else stage.rounding,
            importance=_behind(importance.pop(name, None), factors),
        )
        layers[name] = QLinear(linear, quantizer, job.schemes[name].activations)
        _replace(job, span, name, layers[name])
    return layers


def _behind(importance: Tensor | None, factors: Sequence[Tensor]) -> Tensor | None:
    """Moments of inputs that are divided by factors [in]."""
    if importance is None:
        return None
    for factor in factors:
        if importance.ndim == 1:
            importance = importance / factor.square()
        else:
            groups = to_groups(factor.unsqueeze(0), importance.shape[1])[0].clamp(min=1e-30)
            importance = importance / (groups.unsqueeze(1) * groups.unsqueeze(2))
    return importance


def _trained_norms(job: Job, span: Mapping[int, nn.Module]) -> dict[str, nn.Module]:
    if job.stage.fit is None or NORM not in job.stage.fit.rates:
        return {}
    return norms_of({job.blocks.names[index]: block for index, block in span.items()})


def _fit(
    job: Job,
    span: Mapping[int, nn.Module],
    layers: Mapping[str, QLinear],
    target: Tensor | None,
    besides: Mapping[str, Sequence[Tensor]],
) -> Outcome | None:
    if job.stage.fit is None or job.stream is None or target is None:
        return None
    # compilers fuse what a transform moves and round it otherwise than when it is folded
    compiled = job.stage.fit.compiled(job.device, sum(linear.numel() for linear in _weights(span)))
    steady = not any(has_experts(block) for block in span.values())  # does every step launch the same work?
    if compiled and steady and not besides.get(TRANSFORM):
        span = {index: cast(nn.Module, torch.compile(block)) for index, block in span.items()}
    with windowed(nn.ModuleList(span.values())):
        return reconstruct(
            functools.partial(_run, job.stream, span),
            {name: layer.quantizer for name, layer in layers.items() if layer.quantizer is not None},
            job.stream.quant,
            target,
            job.stage.fit,
            device=job.device,
            micro_batch=job.micro_batch,
            seed=job.seed + min(span),
            besides=besides,
            capture=steady,
        )


def _weights(span: Mapping[int, nn.Module]) -> list[Tensor]:
    return [module.weight for block in span.values() for module in block.modules() if isinstance(module, QLinear)]


def _fit_largest(job: Job) -> None:
    """One step on the largest span as it is before any fit; the streams stay where they are."""
    assert job.stage.fit is not None and job.stream is not None
    names = job.blocks.names
    sizes = [sum(1 for name in job.schemes if name.startswith(block + ".")) for block in names]
    start = sizes.index(max(sizes)) // job.stage.fit.span * job.stage.fit.span
    indices = range(start, min(start + job.stage.fit.span, len(names)))
    span, linears = _load(job, indices)
    norms = _trained_norms(job, span)
    try:
        layers = _attach(job, span, linears, {})
        _fit(job, span, layers, job.stream.quant, {NORM: free(norms)})
    finally:
        settle(norms)
        for name, linear in linears.items():
            _replace(job, span, name, linear)
        for index in indices:
            job.blocks.unload(index)


def _run(stream: BlockStream, span: Mapping[int, nn.Module], hidden: Tensor) -> Tensor:
    for index, block in span.items():
        hidden = stream.run(block, index, hidden)
    return hidden


def run_block(block: nn.Module, hidden: Tensor, **arguments: Any) -> Tensor:
    """A block's hidden states."""
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def _float_pass(
    job: Job,
    span: Mapping[int, nn.Module],
    linears: Mapping[str, nn.Linear],
    smoothed: Mapping[str, nn.Module],
) -> tuple[Seen, Tensor | None]:
    """Let the float stream through the span: what its linears saw, and the target of the fit.

    Args:
        smoothed: blocks of whose linears the extremes are wanted, by full name.
    """
    stream, fit, stage = job.stream, job.stage.fit, job.stage
    if stream is None:
        return Seen(), None
    target = stream.copy(stream.quant) if fit is not None and fit.target != "float" else None

    def forward() -> None:
        for index, block in span.items():
            stream.advance(stream.fp, block, index)

    importance: dict[str, Tensor] = {}
    blocks = {job.blocks.names[index]: block for index, block in span.items()}
    with Extent(smoothed) as extent, Routed(blocks, job.routed):
        if stage.importance:
            sizes = {name: job.schemes[name].group_in(linear.in_features) for name, linear in linears.items()}
            small = {name: size for name, size in sizes.items() if size <= PRODUCTS_GROUP}
            importance = input_moments(linears, forward, small if stage.products else None)
        else:
            forward()
    if target is not None and fit is not None:
        _retarget(stream, span, target, mean=fit.target == "both")
    return Seen(importance=importance, extremes=extent.found), stream.fp if target is None else target


def _retarget(stream: BlockStream, span: Mapping[int, nn.Module], target: Tensor, mean: bool) -> None:
    """A copy of the quantized stream through the float span; the mean with the float stream, if asked for."""
    for index, block in span.items():
        stream.advance(target, block, index)
    for part in stream.parts() if mean else ():
        target[part] = (target[part] + stream.fp[part]) / 2


def _replace(job: Job, span: Mapping[int, nn.Module], name: str, module: nn.Module) -> None:
    for index, block in span.items():
        prefix = job.blocks.names[index] + "."
        if name.startswith(prefix):
            parent, _, leaf = name.removeprefix(prefix).rpartition(".")
            setattr(block.get_submodule(parent), leaf, module)
