"""Records: a weight as the decode kernels read it, and in no other form beside it.

    records = Records.of(stream)     what `gemv_layout.write_records` makes of the same weight, bit for bit
    records.qtensor()                the QTensor it was, exactly
    multiply(x, records)             by a decode kernel for few rows, by a product for many, ours or Humming's

They are made of the bit stream that files hold, on the GPU and, but for 3 bits, without unpacking a code: neighbours
lie together in the stream, and in the two halves of a record's word. They are carried there together, and parted then
by swapping fields, pairs of these, and fours. Knows nothing of layers and files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from planish.bitstream import Stream
from planish.kernels import cuda_gemm, cuda_gemv, gemv_layout
from planish.kernels.gemv_layout import STEP, TILE, Layout
from planish.kernels.humming import Laid, humming_gemm
from planish.kernels.pack import Packed
from planish.qtensor import QTensor

LANES = 4  # that have each a pair of eight inputs
SWAPS = ((2, 0x0C0C0C0C), (4, 0x00F000F0), (8, 0x0000FF00))  # that take even fields to a word's low half


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """A packed weight matrix [out, in].

    Args:
        tiles: uint8 [tiles, steps, bytes of a record].
        layout: what decides their shape.
        group_size, order: as in `QTensor`; the layout's own groups may be shorter.
    """

    tiles: Tensor
    layout: Layout
    group_size: int
    order: Tensor | None = None

    @classmethod
    def of(cls, weight: Stream | Packed | QTensor) -> "Records | None":
        """The same weight; None if it can't be laid out so."""
        stream = weight if isinstance(weight, Stream) else Stream.of(_qtensor(weight))
        layout = layout_of(stream)
        if layout is None:
            return None
        return cls(tiles=write(stream, layout), layout=layout, group_size=stream.group_size, order=stream.order)

    def qtensor(self) -> QTensor:
        """The exact QTensor, in its own groups."""
        layout, grid = self.layout, -(-self.layout.in_features // self.group_size)
        fine = gemv_layout.read_records(self.tiles, layout)
        step = max(1, self.group_size // layout.group)
        scale, zero = (
            None if part is None else part[:, ::step][:, :grid].contiguous() for part in (fine.scale, fine.zero)
        )
        assert scale is not None
        return QTensor(
            codes=fine.codes, scale=scale, zero=zero, bits=layout.bits, group_size=self.group_size, order=self.order
        )


Weight = Packed | Records


def hold(stream: Stream, dtype: torch.dtype) -> Weight:
    """A weight as a model that isn't trained shall hold it: records where a GPU reads them for activations of `dtype`,
    else codes."""
    records = Records.of(stream) if reads(stream.codes.device, dtype) else None
    return records or Packed.from_stream(stream)


def reads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a decode kernel for activations of `dtype` on a device."""
    return device.type == "cuda" and dtype in cuda_gemv.DTYPES and cuda_gemv._runs_on(device.index or 0)


def multiply(x: Tensor, tiles: Tensor, layout: Layout, bias: Tensor | None = None, laid: Laid | None = None) -> Tensor:
    """x [..., in] times the weight of records -> [..., out], in the dtype of x; no gradient. By Humming where it is
    laid out for that too, and `humming.takes` it."""
    rows = x.reshape(-1, layout.in_features)
    bias = None if bias is None else bias.to(x.dtype)
    if laid is not None:
        y = humming_gemm(rows, tiles, *laid, bias, *layout)
    elif x.dtype not in cuda_gemv.DTYPES:
        y = functional.linear(rows, gemv_layout.read_records(tiles, layout).dequantize(x.dtype), bias)
    else:
        few = 0 < rows.shape[0] <= cuda_gemv.MAX_ROWS
        y = (cuda_gemv.packed_gemv if few else cuda_gemm.packed_gemm)(rows, tiles, bias, *layout)
    return y.view(*x.shape[:-1], layout.out_features)


def layout_of(stream: Stream) -> Layout | None:
    """How a weight is laid out, if it can be."""
    return gemv_layout.layout_of(stream)  # type: ignore[arg-type]


def write(stream: Stream, layout: Layout) -> Tensor:
    """uint8 [tiles, steps, bytes of a record] of a stream [out, in]."""
    records = stream.codes.new_empty(layout.tiles, layout.steps, sum(layout.sizes), dtype=torch.uint8)
    codes, scales, zeros = records.split(layout.sizes, dim=2)
    # [tiles, steps, bits, 8, lanes, words, outputs] of [tiles, outputs, 8, steps, bits, words, lanes]
    if layout.bits == 3:
        words = _three_bit_words(_octets(stream, layout).unflatten(4, (2, 16, 3)))
        codes.view(torch.int32).unflatten(2, (3, 8, LANES, 2, 2)).copy_(words.permute(0, 3, 5, 2, 4, 6, 1))
    else:
        pairs = _pairs(_octets(stream, layout), layout.bits)
        shape = layout.bits, 8, LANES, 2, 2, pairs.shape[6]
        codes.view(pairs.dtype).unflatten(2, shape).copy_(pairs.permute(0, 3, 4, 2, 7, 5, 1, 6))
        _part(codes.view(torch.int32), layout.bits)
    column = torch.arange(layout.steps * layout.groups, device=records.device) * layout.group // stream.group_size
    column.clamp_(max=stream.scale.shape[1] - 1)
    scale = gemv_layout._tiled(stream.scale[:, column], layout.groups).permute(0, 3, 2, 4, 1)
    scales.view(torch.float16).unflatten(2, scale.shape[2:]).copy_(scale)
    if stream.zero is not None:
        zero = gemv_layout._tiled(stream.zero[:, column], layout.groups)
        words = gemv_layout._zeros_to_words(zero, layout).flatten(2)
        zeros.view(torch.int16).copy_(words)
    return records


def _octets(stream: Stream, layout: Layout) -> Tensor:
    """uint8 [tiles, outputs, 8, steps, bytes of 256 inputs], padded with zeros."""
    octets = stream.codes.view(torch.uint8)
    width = STEP // 8 * layout.bits * layout.steps
    octets = functional.pad(octets, (0, width - octets.shape[1], 0, -octets.shape[0] % TILE))
    return octets.unflatten(0, (-1, 2, 8)).unflatten(3, (layout.steps, -1))


def _pairs(octets: Tensor, bits: int) -> Tensor:
    """[..., bits, 2, n, lanes]: what lies in a word of a lane, in n parts, neighbouring codes still together."""
    if bits == 8:
        return octets.view(torch.int16).unflatten(4, (bits, 2, 2, LANES))
    if bits == 4:
        return octets.unflatten(4, (bits, 2, 4, LANES))
    # a byte holds pairs of two lanes
    twos = octets.unflatten(4, (bits, 2, 2, 4, 2)).transpose(7, 8).contiguous().view(torch.int32).squeeze(-1)
    return _part(twos, 4).view(torch.int16)


def _part(words: Tensor, bits: int) -> Tensor:
    """int32 words of fields, changed in place: the even ones to the low half, the odd ones to the high half."""
    for shift, mask in SWAPS:
        if shift >= bits:
            moved = (words >> shift).bitwise_xor_(words).bitwise_and_(mask)
            words.bitwise_xor_(moved).bitwise_xor_(moved << shift)
    return words


def _three_bit_words(octets: Tensor) -> Tensor:
    """uint8 [..., 2, 16, 3] -> int32 [..., lanes, bits, 2]: of 16 pairs, five lie in each of three words, and the last
    one's bits above them."""
    low, middle, high = octets.to(torch.int32).unbind(-1)
    eight = low.bitwise_or_(middle << 8).bitwise_or_(high << 16)
    pairs = eight.unsqueeze(-3) >> torch.arange(0, 24, 6, device=octets.device, dtype=torch.int32).view(LANES, 1, 1)
    pairs = (pairs & 7).bitwise_or_((pairs & 0o70) << 13)
    spare, words = pairs[..., 15], []
    for word in range(3):
        fields = pairs[..., 5 * word : 5 * word + 5].unbind(-1)
        joined = (spare >> word & 0x10001) << 15
        for place, field in enumerate(fields):
            joined.bitwise_or_(field << 3 * place)
        words.append(joined)
    return torch.stack(words, dim=-1).flatten(-2).unflatten(-1, (3, 2))


def _qtensor(weight: Packed | QTensor) -> QTensor:
    return weight if isinstance(weight, QTensor) else weight.qtensor()
