"""GGUF's blocks: the codec between QTensors and the bytes that llama.cpp multiplies by.

A row of a weight is cut into blocks, each with an fp16 scale d and small signed levels: W_hat = d * level. The
level of a code Q is Q - z, so that a scheme whose levels fit a block is held exactly, scales of both signs too:

    Q2_0  64 weights in 18 bytes    levels -1 .. 2       w2: d = -s, level = z - Q
    Q3_K  256 weights in 110 bytes  levels -4 .. 3       w3 where the scales s of 256 weights are d * k, |k| < 32:
                                                         always w3g16k, others only by chance
    Q4_0  32 weights in 18 bytes    levels -8 .. 7       w4; w2asym, w3asym, other w3 (a container)
    Q5_0  32 weights in 22 bytes    levels -16 .. 15     w4asym
    Q8_0  32 weights in 34 bytes    levels -128 .. 127   w8

A block keeps levels, not codes: `decode` gives each group its smallest possible zero point (see `canonical`).
It knows nothing of models or files.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from planish.errors import PlanishError, UnsupportedScheme, nearest
from planish.qtensor import QTensor, from_groups, midpoint, to_groups
from planish.scheme import Scheme


class Kind(NamedTuple):
    """A ggml type: its number, the number of a file of mostly this type, weights and bytes of a block, and the
    weights that share a scale on disk."""

    id: int
    file_type: int
    weights: int = 1
    bytes: int = 1
    step: int = 1


KINDS = {
    "F32": Kind(0, 0, bytes=4),
    "F16": Kind(1, 1, bytes=2),
    "BF16": Kind(30, 32, bytes=2),
    "Q2_0": Kind(42, 41, 64, 18, 64),
    "Q3_K": Kind(11, 11, 256, 110, 16),
    "Q4_0": Kind(2, 2, 32, 18, 32),
    "Q5_0": Kind(6, 8, 32, 22, 32),
    "Q8_0": Kind(8, 7, 32, 34, 32),
}
# (bits, symmetric) -> kinds that hold it, the smallest first
HOLDERS = {
    (2, True): ("Q2_0", "Q4_0"),
    (2, False): ("Q4_0",),
    (3, True): ("Q3_K", "Q4_0"),
    (3, False): ("Q4_0",),
    (4, True): ("Q4_0",),
    (4, False): ("Q5_0",),
    (8, True): ("Q8_0",),
}
# "compatible" leaves out what llama.cpp learned to read in mid-2026
TYPES = {"smallest": (), "compatible": ("Q2_0",)}


def candidates(layer: str, scheme: Scheme, shape: tuple[int, int], types: str = "smallest") -> list[str]:
    """Kinds whose blocks fit a layer, the smallest first; the last one holds it whatever its data.

    Args:
        types: "smallest", or "compatible" for a llama.cpp from before mid-2026.

    Raises:
        UnsupportedScheme: if there is none; names the layer, the reason and the mend.
    """
    if types not in TYPES:
        raise PlanishError(f"no choice of types {types!r}; {nearest(types, TYPES)}")
    columns, group = shape[1], scheme.group_in(shape[1])
    if columns % 32:
        raise UnsupportedScheme(f"{layer}: GGUF needs inputs in multiples of 32, not {columns}; use --format native")
    if (scheme.bits, scheme.symmetric) not in HOLDERS:
        raise UnsupportedScheme(f"{layer}: GGUF has no type for {scheme}; use a symmetric scheme, or --format native")
    known = [kind for kind in HOLDERS[scheme.bits, scheme.symmetric] if kind not in TYPES[types]]
    found = [kind for kind in known if columns % KINDS[kind].weights == 0 and _on_steps(group, columns, kind)]
    if scheme.shared and not found:
        raise UnsupportedScheme(
            f"{layer}: {scheme} is GGUF's Q3_K, which needs inputs in multiples of 256, not {columns}; give this layer "
            "w4g32, which GGUF holds in 4.5 bits as it would any other w3 here (--scheme, or --layers REGEX=w4g32)"
        )
    if found in ([], ["Q3_K"]) and not scheme.shared:
        raise UnsupportedScheme(
            f"{layer}: groups of {group} don't fall on GGUF's blocks of 32; use a group size that is a multiple of 32"
            f"{', or w3g16k' if found else ''}, or --format native"
        )
    return found


def _on_steps(group: int, columns: int, kind: str) -> bool:
    return group % KINDS[kind].step == 0 or group >= columns


def plan_type(layer: str, scheme: Scheme, shape: tuple[int, int], types: str = "smallest") -> str:
    """What a layer will be stored as: "Q4_0", or "Q3_K or Q4_0" where its data decides.

    Raises:
        UnsupportedScheme: if nothing holds it.
    """
    found = candidates(layer, scheme, shape, types)
    return " or ".join(found) if found[0] == "Q3_K" else found[0]  # of w3g16k "Q3_K"


def type_of(layer: str, q: QTensor, types: str = "smallest", shared: bool = False) -> str:
    """The smallest kind that holds a layer exactly.

    Args:
        shared: as of its Scheme, which a QTensor doesn't know.

    Raises:
        UnsupportedScheme: if nothing does.
    """
    if q.offset is not None:
        raise UnsupportedScheme(f"{layer}: GGUF can't hold offsets in weight units; use --format native")
    if q.order is not None:
        raise UnsupportedScheme(f"{layer}: GGUF can't hold columns in another order; use --format native")
    found = candidates(layer, dataclasses.replace(q.scheme, shared=shared), q.shape, types)
    if found[0] == "Q3_K" and common_scale(_scale_of_blocks(q, "Q3_K")) is None:
        del found[0]
    if not found:
        raise UnsupportedScheme(f"{layer}: its scales share none, as those of w3g16k do; the checkpoint is damaged")
    return found[0]


def encode(q: QTensor, kind: str) -> Tensor:
    """Blocks of a layer, uint8 [out, bytes of a row]; `kind` is what `type_of` said."""
    assert q.offset is None, "type_of wasn't asked"
    blocks = _levels(q).unflatten(1, (-1, KINDS[kind].weights))
    return _CODECS[kind][0](blocks, _scale_of_blocks(q, kind)).flatten(1)


def decode(layer: str, data: Tensor, kind: str, scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    """The QTensor that `encode` was given, in its canonical form.

    Args:
        data: uint8 [out, bytes of a row].

    Raises:
        PlanishError: if the scales of a group differ, or levels don't fit the scheme.
    """
    levels, scale = _CODECS[kind][1](data.unflatten(1, (-1, KINDS[kind].bytes)))
    levels, scale = levels.flatten(1), scale.flatten(1)
    group = scheme.group_in(shape[1])
    of_step = torch.arange(scale.shape[1]) * KINDS[kind].step // group
    first = torch.searchsorted(of_step, torch.arange(scheme.groups_in(shape[1])))
    q = _from_levels(levels, scale[:, first].contiguous(), scheme, group)
    if not torch.equal(scale, q.scale[:, of_step]) or int(q.codes.max()) >= 2**scheme.bits:
        raise PlanishError(f"{layer} holds blocks that {scheme} can't have; the file is damaged")
    return q


def canonical(q: QTensor) -> QTensor:
    """The same weights, bit for bit, each group with its smallest possible zero point; a symmetric q is itself."""
    return q if q.zero is None else _from_levels(_levels(q), q.scale, q.scheme, q.group_size)


def _levels(q: QTensor) -> Tensor:
    """Q - z as int8: bytes wrap around to just that, since every level fits."""
    if q.zero is None:
        return (q.codes - midpoint(q.bits)).view(torch.int8)
    groups = to_groups(q.codes, q.group_size) - q.zero.unsqueeze(-1)
    return from_groups(groups, q.shape[1]).contiguous().view(torch.int8)


def _from_levels(levels: Tensor, scale: Tensor, scheme: Scheme, group: int) -> QTensor:
    """Codes are levels + z: z the middle of a symmetric grid, else what makes a group's lowest level 0."""
    if scheme.symmetric:
        codes = levels.view(torch.uint8) + midpoint(scheme.bits)
        return QTensor(codes=codes, scale=scale, zero=None, bits=scheme.bits, group_size=group)
    groups = to_groups(levels, group)
    zero = -groups.amin(-1).clamp(max=0)
    codes = from_groups(groups + zero.unsqueeze(-1), levels.shape[1]).contiguous().view(torch.uint8)
    return QTensor(codes=codes, scale=scale, zero=zero.view(torch.uint8), bits=scheme.bits, group_size=group)


def _scale_of_blocks(q: QTensor, kind: str) -> Tensor:
    """Scales as a kind stores them, fp16 [out, blocks, scales of a block]."""
    starts = torch.arange(0, q.shape[1], KINDS[kind].step, device=q.scale.device)
    per_block = KINDS[kind].weights // KINDS[kind].step
    return q.scale[:, starts // q.group_size].unflatten(1, (-1, per_block))


def common_scale(scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """d (fp16 [out, blocks, 1]) and k (int64 [..., n], each in -32 .. 31) with scale = d * k exactly; None if there are
    none.

    An fp16 number is a multiple of 2^-24; the greatest d is the greatest common divisor and gives the least k. It
    divides a number of 11 significant bits, so it has no more itself.
    """
    units = (scale.double() * 2**24).long()
    divisor = units
    while divisor.shape[-1] > 1:
        divisor = torch.gcd(*divisor.chunk(2, -1))
    divisor = divisor.abs().clamp(min=1)
    k = units // divisor
    flip = torch.where(k.amax(-1, keepdim=True) > 31, -1, 1)  # there is a -32 but no +32
    k *= flip
    if int(k.max()) > 31 or int(k.min()) < -32:
        return None
    return (flip * divisor * 2**-24).half(), k


# One pair of functions for each kind, blocks [out, n, weights] of levels with scales [out, n, m] <-> bytes [out, n, b]


def _as_bytes(scale: Tensor) -> Tensor:
    return scale.half().contiguous().view(torch.uint8)


def _as_scale(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16)


def _pack_q2_0(levels: Tensor, scale: Tensor) -> Tensor:
    fields = (1 - levels).to(torch.uint8).unflatten(-1, (-1, 4))  # level -q of scale -s, from -1 on
    return torch.cat([_as_bytes(-scale), _gather_bits(fields, 2, -1)], -1)


def _unpack_q2_0(data: Tensor) -> tuple[Tensor, Tensor]:
    fields = _spread_bits(data[..., 2:].unsqueeze(-1), 2, 4, -1).flatten(-2)
    return 1 - fields.to(torch.int8), -_as_scale(data[..., :2])


def _pack_q3_k(levels: Tensor, scale: Tensor) -> Tensor:
    found = common_scale(scale)
    assert found is not None, "type_of wasn't asked"
    codes = (levels + 4).to(torch.uint8)
    low = _gather_bits((codes & 3).unflatten(-1, (2, 4, 32)), 2, -2).flatten(-2)
    high = _gather_bits((codes >> 2).unflatten(-1, (8, 32)), 1, -2)
    k = (found[1] + 32).to(torch.uint8).unflatten(-1, (4, 4))
    nibbles = (k[..., :2, :] & 15) | (k[..., 2:, :] & 15) << 4
    return torch.cat([high, low, nibbles.flatten(-2), _gather_bits(k >> 4, 2, -2), _as_bytes(found[0])], -1)


def _unpack_q3_k(data: Tensor) -> tuple[Tensor, Tensor]:
    high, low, nibbles, rest, d = data.split([32, 64, 8, 4, 2], -1)
    codes = _spread_bits(low.unflatten(-1, (2, 1, 32)), 2, 4, -2).flatten(-3)
    codes = codes | _spread_bits(high.unsqueeze(-2), 1, 8, -2).flatten(-2) << 2
    k = torch.cat([nibbles & 15, nibbles >> 4], -1) | _spread_bits(rest.unsqueeze(-2), 2, 4, -2).flatten(-2) << 4
    return codes.to(torch.int8) - 4, (_as_scale(d).float() * (k.float() - 32)).half()


def _pack_q4_0(levels: Tensor, scale: Tensor) -> Tensor:
    low, high = (levels + 8).to(torch.uint8).chunk(2, -1)
    return torch.cat([_as_bytes(scale), low | high << 4], -1)


def _unpack_q4_0(data: Tensor) -> tuple[Tensor, Tensor]:
    pairs = data[..., 2:]
    return torch.cat([pairs & 15, pairs >> 4], -1).to(torch.int8) - 8, _as_scale(data[..., :2])


def _pack_q5_0(levels: Tensor, scale: Tensor) -> Tensor:
    codes = (levels + 16).to(torch.uint8)
    low, high = (codes & 15).chunk(2, -1)
    fifth = _gather_bits((codes >> 4).unflatten(-1, (4, 8)), 1, -1)
    return torch.cat([_as_bytes(scale), fifth, low | high << 4], -1)


def _unpack_q5_0(data: Tensor) -> tuple[Tensor, Tensor]:
    d, fifth, pairs = data.split([2, 4, 16], -1)
    codes = torch.cat([pairs & 15, pairs >> 4], -1) | _spread_bits(fifth.unsqueeze(-1), 1, 8, -1).flatten(-2) << 4
    return codes.to(torch.int8) - 16, _as_scale(d)


def _pack_q8_0(levels: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([_as_bytes(scale), levels.view(torch.uint8)], -1)


def _unpack_q8_0(data: Tensor) -> tuple[Tensor, Tensor]:
    return data[..., 2:].contiguous().view(torch.int8), _as_scale(data[..., :2])


def _gather_bits(fields: Tensor, bits: int, dim: int) -> Tensor:
    """Bytes whose lowest field is the first along `dim`."""
    parts = fields.unbind(dim)
    packed = parts[0].clone()
    for index, part in enumerate(parts[1:], 1):
        packed |= part << index * bits
    return packed


def _spread_bits(data: Tensor, bits: int, count: int, dim: int) -> Tensor:
    """The inverse of `_gather_bits`, along a `dim` of size 1."""
    return torch.cat([data >> index * bits & 2**bits - 1 for index in range(count)], dim)


_CODECS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "Q2_0": (_pack_q2_0, _unpack_q2_0),
    "Q3_K": (_pack_q3_k, _unpack_q3_k),
    "Q4_0": (_pack_q4_0, _unpack_q4_0),
    "Q5_0": (_pack_q5_0, _unpack_q5_0),
    "Q8_0": (_pack_q8_0, _unpack_q8_0),
}
