"""Attention of one query a row over a static cache, for a step of decoding on an NVIDIA GPU.

    out[h] = sum_t softmax_t(scaling q[h] . k[t]) v[t],   t = 0 .. filled

The kernel (cuda_attend.cu, which says how it works) puts the new token's k and v into the cache too, and reads only
what has been filled: how far that is lies on the GPU, so that a CUDA graph is replayed while the cache grows. A head is
cut into as many blocks as keep the GPU busy; they join their parts in a fixed order, so results repeat bit for bit.
sm_80 and later. Knows nothing of models.
"""

import ctypes
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from planish.kernels import cuda_records, nvrtc
from planish.kernels.cuda_gemv import DTYPES, Card, card_of
from planish.kernels.gemv_layout import STEP

DIMS = (64, 96, 128, 256)
WARPS = 8
MOST_HEADS = 4  # that a block takes: what it reads serves all, but each takes registers
MOST_PARTS = 8  # blocks of a cluster that every GPU with clusters has room for
LEAST = 32  # tokens of a full cache that make a block of their own worth while


class Cut(NamedTuple):
    """How a call is launched: query heads of a block, blocks that share a head's tokens, whether those are a cluster,
    blocks in all, bytes of shared memory."""

    heads: int
    parts: int
    cluster: bool
    blocks: int
    shared: int


def supports(device: torch.device, dtype: torch.dtype, dim: int, value_dim: int) -> bool:
    """Heads of these sizes, in 16 bits, on an NVIDIA GPU that the compiler knows."""
    if device.type != "cuda" or dtype not in DTYPES or dim not in DIMS or dim != value_dim:
        return False
    major, minor = card_of(device.index or 0).capability
    return major >= 8 and f"sm_{major}{minor}" in nvrtc.targets()


@torch.library.custom_op("planish::attend_one", mutates_args=("keys", "values"))
def attend_one(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, filled: Tensor, scaling: float
) -> Tensor:
    """Put the new token's key and value into the cache, and attend to all in it; here its definition, for any device.

    Args:
        query: [batch, heads, 1, dim].
        key, value: [batch, kv_heads, 1, dim]; kv_heads divides heads.
        keys, values: [batch, kv_heads, length, dim], contiguous; at `filled` they are written.
        filled: int64, one number: tokens in the cache before this one, fewer than length.
        scaling: of scores.

    Returns:
        [batch, 1, heads, dim].
    """
    keys.index_copy_(2, filled.view(1), key)
    values.index_copy_(2, filled.view(1), value)
    seen, grouped = int(filled) + 1, query.shape[1] != keys.shape[1]
    out = functional.scaled_dot_product_attention(
        query, keys[:, :, :seen], values[:, :, :seen], scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous()


@attend_one.register_fake
def _(query: Tensor, *rest) -> Tensor:  # type: ignore[no-untyped-def]
    batch, heads, _, dim = query.shape
    return query.new_empty(batch, 1, heads, dim)


@attend_one.register_kernel("cuda")
def _(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, filled: Tensor, scaling: float
) -> Tensor:
    device, (batch, heads, _, dim), (kv_heads, length) = query.device, query.shape, keys.shape[1:3]
    assert keys.is_contiguous() and values.is_contiguous() and heads % kv_heads == 0
    out = query.new_empty(batch, 1, heads, dim)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    card = card_of(device.index or 0)
    cut, overlap = plan(batch, heads, kv_heads, length, dim, card), card.capability >= (9, 0)
    alone = cut.parts == 1 or cut.cluster
    states = None if alone else query.new_empty(cut.blocks, cut.heads, dim + 2, dtype=torch.float32)
    given = [query, key, value, keys, values, filled, out, states, scaling * math.log2(math.e)]
    with torch.cuda.device(device):
        kernels = _kernels(device.index or 0, dim, query.dtype == torch.bfloat16, cut)
        sizes = [heads // kv_heads, length, cut.parts]
        cluster = cut.parts if cut.cluster else 1
        nvrtc.launch(kernels["attend"], (cut.blocks, 1), 32 * WARPS, cut.shared, [*given, *sizes], overlap, cluster)
        if states is not None:
            nvrtc.launch(kernels["join"], (cut.blocks // cut.parts, 1), 128, 0, [states, out, cut.parts], overlap)
    return out


def plan(batch: int, heads: int, kv_heads: int, length: int, dim: int, card: Card) -> Cut:
    """A block takes as many of the heads that share keys as it may; tokens are shared while processors are idle."""
    shared_by = heads // kv_heads
    each = next(count for count in range(MOST_HEADS, 0, -1) if shared_by % count == 0)
    places = batch * heads // each
    parts = 1
    while 2 * parts * places <= card.processors and 2 * parts <= min(MOST_PARTS, length // LEAST):
        parts *= 2
    shared = 4 * (WARPS + 1) * each * (dim + 2)
    return Cut(each, parts, parts > 1 and card.capability >= (9, 0), places * parts, shared)


def macros(dim: int, bf16: bool, heads: int, cluster: bool, overlap: bool) -> dict[str, int]:
    """What cuda_attend.cu is compiled for."""
    made = cuda_records.macros((4, STEP, False), bf16, overlap)
    return made | {"DIM": dim, "HEADS": heads, "WARPS": WARPS, "CLUSTER": int(cluster)}


def source() -> str:
    """The kernel's text: what kernels share, and its own."""
    return cuda_records.source("cuda_attend")


@functools.cache
def _kernels(device: int, dim: int, bf16: bool, cut: Cut) -> dict[str, ctypes.c_void_p]:
    capability = card_of(device).capability
    code = _compiled(dim, bf16, cut.heads, cut.cluster, capability)
    return {name: nvrtc.load_kernel(code, name, cut.shared) for name in ("attend", "join")}


@functools.cache
def _compiled(dim: int, bf16: bool, heads: int, cluster: bool, capability: tuple[int, int]) -> bytes:
    made = macros(dim, bf16, heads, cluster, capability >= (9, 0))
    return nvrtc.compile_source(source(), made, f"sm_{capability[0]}{capability[1]}")
