"""The layout that the CUDA kernels read a packed weight in: one stream of records, made once when it is loaded.

A record holds 16 outputs by 256 inputs: all that a warp takes at a time. In this order

    codes   [bits][lane 32][16 bytes]       neighbouring lanes read neighbouring 16 bytes
    scales  [8][groups][2]          fp16    outputs g and g + 8 side by side
    zeros   [8][words][2]           uint16  as many groups a word as fit; absent from a symmetric weight

Of each 16 inputs, lane 4 g + t holds 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, of outputs g and g + 8: its fragment of a
tensor core's 16 x 16 operand, so that the kernel of decoding and that of prefill read one layout. Two neighbouring
inputs, a pair, lie in the two halves of a 32-bit word, at the same bit; words of the two outputs alternate. 16 // bits
codes fill a half. Of 3 bits that is five, and one bit over: three words keep the sixteenth code in theirs. Rows and
columns are padded with zeros to whole records.

Knows nothing of devices.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from planish.kernels.pack import Packed, unpack_codes
from planish.qtensor import QTensor

BITS = (2, 3, 4, 8)  # of a code that kernels read
TILE, STEP = 16, 256  # outputs and inputs of a record
PAIRS = 32  # that a lane holds of an output
BLOCK = 2**24  # weights that are laid out at a time: 64 MiB for each step of it


class Layout(NamedTuple):
    """What decides the shape of a weight's records; `group` divides its group size and a record's inputs."""

    bits: int
    group: int
    has_zero: bool
    out_features: int
    in_features: int

    @property
    def tiles(self) -> int:
        return -(-self.out_features // TILE)

    @property
    def steps(self) -> int:
        return -(-self.in_features // STEP)

    @property
    def groups(self) -> int:
        """Groups of a record."""
        return STEP // self.group

    @property
    def zero_bits(self) -> int:
        """Bits that a zero takes: a pair of outputs has whole words."""
        return max(16 // self.groups, 8 if self.bits > 4 else 4)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of a record's codes, scales and zeros."""
        zeros = 2 * self.groups * self.zero_bits if self.has_zero else 0
        return 512 * self.bits, 32 * self.groups, zeros


def layout_of(weight: Packed) -> Layout | None:
    """How a weight would be laid out; None if it can't be: 6 bits, an offset, groups that no 32 divides."""
    whole = weight.group_size >= weight.in_features
    group = STEP if whole else math.gcd(weight.group_size, STEP)
    if weight.bits not in BITS or weight.offset is not None or group < 32:
        return None
    return Layout(weight.bits, group, weight.zero is not None, weight.out_features, weight.in_features)


def write_records(weight: Packed, layout: Layout) -> Tensor:
    """Packed [out, in] -> uint8 [tiles, steps, bytes of a record]."""
    records = weight.codes.new_empty(layout.tiles, layout.steps, sum(layout.sizes))
    column = torch.arange(layout.steps * layout.groups, device=records.device) * layout.group // weight.group_size
    column.clamp_(max=weight.scale.shape[1] - 1)
    for tiles in _blocks(layout):
        rows = slice(tiles.start * TILE, tiles.stop * TILE)
        codes = unpack_codes(weight.codes[rows], weight.bits, weight.in_features)
        parts = [_codes_to_bytes(_tiled(codes, STEP), layout), _tiled(weight.scale[rows][:, column], layout.groups)]
        if weight.zero is not None:
            parts.append(_zeros_to_words(_tiled(weight.zero[rows][:, column], layout.groups), layout))
        parts[1] = parts[1].permute(0, 3, 2, 4, 1)  # [tiles, steps, 8, groups, 2]
        parts = [part.contiguous().flatten(2).view(torch.uint8) for part in parts]
        records[tiles] = torch.cat(parts, dim=2)
    return records


def read_records(records: Tensor, layout: Layout) -> QTensor:
    """The weight that records hold, group by group of theirs; what `write_records` made them of, decoded the same."""
    kinds = [part.contiguous() for part in records.split(layout.sizes, dim=2)]
    codes = torch.cat([_bytes_to_codes(kinds[0][tiles], layout) for tiles in _blocks(layout)])
    grids = [kinds[1].view(torch.float16).unflatten(2, (8, layout.groups, 2))]
    if layout.has_zero:
        grids.append(_words_to_zeros(kinds[2], layout))
    columns = -(-layout.in_features // layout.group)
    rows = [grid.permute(0, 4, 2, 1, 3).flatten(3).flatten(0, 2)[: layout.out_features, :columns] for grid in grids]
    return QTensor(
        codes=codes[: layout.out_features, : layout.in_features],
        scale=rows[0],
        zero=rows[1] if layout.has_zero else None,
        bits=layout.bits,
        group_size=layout.group,
    )


def _blocks(layout: Layout) -> Iterator[slice]:
    height = max(1, BLOCK // (TILE * STEP * layout.steps))
    return (slice(start, min(start + height, layout.tiles)) for start in range(0, layout.tiles, height))


def _tiled(values: Tensor, width: int) -> Tensor:
    """[rows, n] -> [tiles, 2, 8, steps, width], padded with zeros."""
    padded = functional.pad(values, (0, -values.shape[1] % width, 0, -values.shape[0] % TILE))
    return padded.unflatten(1, (-1, width)).unflatten(0, (-1, 2, 8))


def _codes_to_bytes(codes: Tensor, layout: Layout) -> Tensor:
    """uint8 [tiles, 2, 8, steps, 256] -> int32 [tiles, steps, bits, 32, 4]."""
    low, high = codes.unflatten(4, (PAIRS, 4, 2)).to(torch.int32).unbind(-1)  # eight inputs, t, code of a pair
    pairs = (low | high << 16).permute(0, 3, 2, 5, 4, 1)  # [tiles, steps, 8, 4, PAIRS, 2]
    if layout.bits == 3:
        units = pairs.unflatten(4, (2, 16))
        fields, spare = units[..., :15, :].unflatten(5, (3, 5)), units[..., 15, :]
        words = _joined(fields, 3, 6)
        words |= torch.stack([(spare >> bit & 0x10001) << 15 for bit in range(3)], dim=5)
        words = words.flatten(4, 5)
    else:
        words = _joined(pairs.unflatten(4, (-1, 16 // layout.bits)), layout.bits, 5)
    lanes = words.flatten(2, 3).flatten(3).unflatten(3, (layout.bits, 4))
    return lanes.transpose(2, 3)


def _bytes_to_codes(codes: Tensor, layout: Layout) -> Tensor:
    """uint8 [tiles, steps, 512 * bits] -> uint8 [16 * tiles, 256 * steps]."""
    lanes = codes.contiguous().view(torch.int32).unflatten(2, (layout.bits, 32, 4)).transpose(2, 3)
    words = lanes.flatten(3).unflatten(3, (-1, 2)).unflatten(2, (8, 4))
    if layout.bits == 3:
        units = words.unflatten(4, (2, 3))
        spare = [(word >> 15 & 0x10001) << bit for bit, word in enumerate(units.unbind(5))]
        spare_pairs = (spare[0] | spare[1] | spare[2]).unsqueeze(5)
        pairs = torch.cat([_fields(units, 3, 6).flatten(5, 6), spare_pairs], dim=5).flatten(4, 5)
    else:
        pairs = _fields(words, layout.bits, 5).flatten(4, 5)
    both = torch.stack([pairs & 0xFFFF, pairs >> 16 & 0xFFFF], dim=-1).to(torch.uint8)  # ..., PAIRS, output, code
    return both.permute(0, 5, 2, 1, 4, 3, 6).flatten(3).flatten(0, 2)


def _zeros_to_words(zero: Tensor, layout: Layout) -> Tensor:
    """uint8 [tiles, 2, 8, steps, groups] -> int16 [tiles, steps, 8, words, 2]."""
    grouped = zero.permute(0, 3, 2, 4, 1).to(torch.int32).unflatten(3, (-1, 16 // layout.zero_bits))
    return _joined(grouped, layout.zero_bits, 4).to(torch.int16)


def _words_to_zeros(zeros: Tensor, layout: Layout) -> Tensor:
    """uint8 [tiles, steps, bytes] -> uint8 [tiles, steps, 8, groups, 2]."""
    words = zeros.contiguous().view(torch.int16).to(torch.int32).unflatten(2, (8, -1, 2))
    shifts = range(0, 16, layout.zero_bits)
    return torch.stack([words >> shift & (2**layout.zero_bits - 1) for shift in shifts], 4).flatten(3, 4).byte()


def _joined(fields: Tensor, bits: int, dim: int) -> Tensor:
    """int32 fields along `dim` -> words that hold the first in their lowest bits (of each half), `dim` gone."""
    first, *others = fields.unbind(dim)
    for place, field in enumerate(others, 1):
        first = first | field << place * bits
    return first


def _fields(words: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse of `_joined`; fields of both halves stay in theirs."""
    mask = (2**bits - 1) * 0x10001
    return torch.stack([words >> place * bits & mask for place in range(16 // bits)], dim)
