"""Bench: how fast a model answers, and how near that is to what the device's memory allows.

    found = bench(model, batches=(1, 8), prompt=128, new=128)      found.lines(), found.figures()

A step of decoding reads every weight once, whatever the batch. So its share of the memory's bandwidth, which is
measured beside it by a large copy and a large sum, says how much there is left to win. Prompts are random tokens, and
answers have no end. Figures are medians of RUNS; what happens once (compiling, capturing a graph) comes before.
"""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from planish.decode import Decoder, decodes
from planish.errors import PlanishError
from planish.kernels import choose, cuda_gemv
from planish.kernels.embedding import PackedEmbedding
from planish.kernels.linear import PackedLinear, packed_layers
from planish.log import peak_bytes, versions
from planish.run import device_kind

RUNS = 3
LARGE = {"cuda": 2**31, "cpu": 2**27}  # bytes that are copied and summed


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one batch: seconds to the first token, tokens a second of all rows together after it, and of the measured
    bandwidth the share that reading the weights takes at that rate."""

    batch: int
    first: float
    rate: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured of a model; `memory` is the most it took, `weights` what a step reads, in bytes."""

    device: str
    prompt: int
    new: int
    compiled: bool
    captured: bool
    bandwidth: float
    weights: int
    memory: int
    layers: list[str]
    speeds: list[Speed] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self), "versions": versions()}

    def lines(self) -> list[str]:
        """For a user."""
        how = "one CUDA graph a step" if self.captured else "steps one by one"
        lines = [
            f"{self.device}: {self.bandwidth / 1e9:.0f} GB/s measured; a step reads {self.weights / 1e9:.2f} GB; {how}"
        ]
        lines += self.layers
        lines += [
            f"batch {speed.batch:>3}   first token {1e3 * speed.first:7.1f} ms   {speed.rate:8.1f} tokens/s   "
            f"{speed.share:4.0%} of the bandwidth"
            for speed in self.speeds
        ]
        return [*lines, f"peak memory {self.memory / 1e9:.2f} GB"]


def bench(
    model: PreTrainedModel,
    *,
    batches: Sequence[int] = (1, 8, 32),
    prompt: int = 128,
    new: int = 128,
    compiled: bool = False,
    speed_of_memory: float | None = None,
    **ways: bool,
) -> Bench:
    """Measure a model in memory.

    Args:
        batches: prompts at a time. prompt, new: tokens of each, and of each answer.
        compiled: as of `planish.generate`.
        speed_of_memory: bytes a second, if measured already.
        ways: `overlap` and `one_query`, as of a Decoder.

    Raises:
        PlanishError: for counts below 1, or a model that a Decoder can't take.
    """
    if min(*batches, prompt, new - 1, new) < 1:
        raise PlanishError("batches and --prompt count from 1, and --new from 2")
    if not decodes(model, compiled):
        raise PlanishError(f"{type(model).__name__} has no plain cache of keys and values, which the bench needs")
    device, weights = model.device, bytes_read(model)
    bandwidth = speed_of_memory or bandwidth_of(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    speeds, captured = [], False
    for batch in batches:
        decoder = Decoder(model, batch, prompt + new, compiled=compiled, **ways)
        first, rate = _timed(decoder, batch, prompt, new)
        captured = decoder.captured
        share = rate / batch * weights / bandwidth
        speeds.append(Speed(batch=batch, first=first, rate=rate, share=share))
        del decoder
    return Bench(
        device=device_kind(device),
        prompt=prompt,
        new=new,
        compiled=compiled,
        captured=captured,
        bandwidth=bandwidth,
        weights=weights,
        memory=peak_bytes(device),
        layers=kinds(model, batches[0]),
        speeds=speeds,
    )


def _timed(decoder: Decoder, batch: int, prompt: int, new: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens a second after it."""
    device = decoder.model.device
    made = torch.Generator().manual_seed(0)
    vocabulary = decoder.model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=made).to(device)
    decoder.start(ids)
    decoder.advance(1)
    firsts, rests = [], []
    for _ in range(RUNS):
        firsts.append(seconds(lambda: decoder.start(ids), device))
        rests.append(seconds(lambda: decoder.advance(new - 1), device))
    return statistics.median(firsts), batch * (new - 1) / statistics.median(rests)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """That some work takes, on its device too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def bandwidth_of(device: torch.device) -> float:
    """Bytes a second that memory gives: the better of a copy, counted both ways, and a sum."""
    size = LARGE.get(device.type, LARGE["cpu"])
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copies = [seconds(lambda: target.copy_(source), device) for _ in range(6)]
    sums = [seconds(source.sum, device) for _ in range(6)]
    return max(2 * size / min(copies), size / min(sums))


def bytes_read(model: PreTrainedModel) -> int:
    """Of all weights, without an embedding that is only looked up in."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = isinstance(embedding, PackedEmbedding) or (head is not None and head.weight is embedding.weight)
    skipped = set() if tied else {id(tensor) for tensor in embedding.state_dict(keep_vars=True).values()}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for key, tensor in tensors.items() if key not in skipped)


def kinds(model: PreTrainedModel, rows: int) -> list[str]:
    """Layers of a kind in one line: shape, scheme, and the kernel that multiplies by them."""
    found: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear | nn.Linear):
            shown = re.sub(r"^.*\.\d+\.", "", name)
            text = f"{shown:<24} {layer.out_features} x {layer.in_features}   {_kernel(layer, rows, model.dtype)}"
            found[text] = found.get(text, 0) + 1
    return [f"{count:>4} x {text}" for text, count in found.items()]


def _kernel(layer: PackedLinear | nn.Linear, rows: int, dtype: torch.dtype) -> str:
    if isinstance(layer, nn.Linear):
        return f"{str(layer.weight.dtype).removeprefix('torch.')}   dense"
    if layer.records is not None:
        many = "cuda_gemm" if layer.laid is None else "humming"
        kernel = "cuda_gemv" if rows <= cuda_gemv.MAX_ROWS else many
        joined = "" if layer.siblings is None else f", one of {len(layer.siblings.spans)} joined"
        return f"{layer.scheme}   {kernel}{joined}"
    x = torch.zeros(rows, layer.in_features, dtype=dtype, device=layer.codes.device)
    return f"{layer.scheme}   {choose(layer.packed, x).__name__.rpartition('.')[2]}"


def dense(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, changed in place, with the packed linears' weights in its own dtype."""
    for name, layer in packed_layers(model).items():
        if type(layer) is PackedLinear:
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(layer.qtensor().dequantize(model.dtype), requires_grad=False)
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias, requires_grad=False)
            model.set_submodule(name, linear)
    return model
