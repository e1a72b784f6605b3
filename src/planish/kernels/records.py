"""Records: a weight as the decode kernels read it, and in no other form beside it.

    records = Records.of(stream)     what `gemv_layout.write_records` makes of the same weight, bit for bit
    records.qtensor()                the QTensor it was, exactly
    multiply(x, records)             by a decode kernel for few rows, by a product for many

They are made of the bit stream that files hold, on the GPU, without unpacking a code: eight codes lie in `bits`
bytes of the stream, and their even and odd ones in the two halves of a record's word. Fields are moved there by
swapping neighbours, then pairs, then fours. Knows nothing of layers and files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from planish.bitstream import Stream
from planish.kernels import cuda_gemv, gemv_layout
from planish.kernels.gemv_layout import STEP, TILE, Layout
from planish.kernels.pack import Packed
from planish.qtensor import QTensor

SLABS, LANES = 8, 4  # of a record's 256 inputs: 8 slabs of 4 lanes of 8 inputs
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


def multiply(x: Tensor, tiles: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the weight of records -> [..., out], in the dtype of x; no gradient."""
    rows = x.reshape(-1, layout.in_features)
    bias = None if bias is None else bias.to(x.dtype)
    few = rows.shape[0] <= cuda_gemv.MAX_ROWS and x.dtype in cuda_gemv.DTYPES
    product = cuda_gemv.packed_gemv if few and rows.shape[0] else packed_dense
    return product(rows, tiles, bias, *layout).view(*x.shape[:-1], layout.out_features)


@torch.library.custom_op("planish::packed_dense", mutates_args=())
def packed_dense(
    x: Tensor,
    records: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
    has_zero: bool,
    out_features: int,
    in_features: int,
) -> Tensor:
    """y [rows, out] by a W_hat that is decoded for this call; of any rows and float dtype."""
    q = gemv_layout.read_records(records, Layout(bits, group, has_zero, out_features, in_features))
    return functional.linear(x, q.dequantize(x.dtype), bias)


@packed_dense.register_fake
def _(x: Tensor, records: Tensor, bias: Tensor | None, *layout) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], layout[3])


def layout_of(stream: Stream) -> Layout | None:
    """How a weight is laid out, if it can be."""
    return gemv_layout.layout_of(stream)  # type: ignore[arg-type]


def write(stream: Stream, layout: Layout) -> Tensor:
    """uint8 [tiles, steps, bytes of a record] of a stream [out, in]."""
    records = stream.codes.new_empty(layout.tiles, layout.steps, sum(layout.sizes), dtype=torch.uint8)
    codes, scales, zeros = records.split(layout.sizes, dim=2)
    # [tiles, steps, bits, 8, lanes, words, outputs] of [tiles, outputs, 8, steps, bits, words, lanes]
    codes = codes.view(torch.int32).unflatten(2, (layout.bits, 8, LANES, 2, 2))
    codes.copy_(_lane_words(stream, layout).permute(0, 3, 4, 2, 6, 5, 1))
    column = torch.arange(layout.steps * layout.groups, device=records.device) * layout.group // stream.group_size
    column.clamp_(max=stream.scale.shape[1] - 1)
    scale = gemv_layout._tiled(stream.scale[:, column], layout.groups).permute(0, 3, 2, 4, 1)
    scales.view(torch.float16).unflatten(2, scale.shape[2:]).copy_(scale)
    if stream.zero is not None:
        zero = gemv_layout._tiled(stream.zero[:, column], layout.groups)
        words = gemv_layout._zeros_to_words(zero, layout).flatten(2)
        zeros.view(torch.int16).copy_(words)
    return records


def _lane_words(stream: Stream, layout: Layout) -> Tensor:
    """int32 [tiles, 2, 8, steps, bits, 2, lanes]: the words of each output and lane, in their order."""
    bits, width = layout.bits, STEP // 8 * layout.bits * layout.steps
    octets = stream.codes.view(torch.uint8)
    octets = functional.pad(octets, (0, width - octets.shape[1], 0, -octets.shape[0] % TILE))
    octets = octets.unflatten(0, (-1, 2, 8)).unflatten(3, (layout.steps, -1))
    if bits == 3:
        return _three_bit_words(octets.unflatten(4, (2, SLABS // 2, LANES, 3))).flatten(4, 5).unflatten(4, (3, 2))
    if bits == 2:  # a word holds those of two slabs
        pairs = octets.view(torch.int16).unflatten(4, (2, 2, 2, LANES)).to(torch.int32)
        words = (pairs[..., 0, :] & 0xFFFF).bitwise_or_(pairs[..., 1, :] << 16)
    elif bits == 4:
        words = octets.view(torch.int32).unflatten(4, (4, 2, LANES)).clone()
    else:
        words = octets.view(torch.int32).unflatten(4, (SLABS, LANES, 2)).transpose(5, 6).contiguous()
    return _halved(words, bits)


def _halved(words: Tensor, bits: int) -> Tensor:
    """int32 words of fields, changed in place: the even ones to the low half, the odd ones to the high half."""
    for shift, mask in SWAPS:
        if shift >= bits:
            moved = (words >> shift).bitwise_xor_(words).bitwise_and_(mask)
            words.bitwise_xor_(moved).bitwise_xor_(moved << shift)
    return words


def _three_bit_words(octets: Tensor) -> Tensor:
    """uint8 [..., 2, 4, lanes, 3] -> int32 [..., 2, 3, lanes]: of 16 pairs, five lie in each of three words, and the
    last one's bits above them."""
    low, middle, high = octets.to(torch.int32).unbind(-1)
    eight = low.bitwise_or_(middle << 8).bitwise_or_(high << 16)
    pairs = _even_threes(eight) | _even_threes(eight >> 3) << 16
    first, second, third, fourth = pairs.unbind(-2)
    words = [
        first | (second & 0x70007) << 12,
        (second >> 3 & 0x1FF01FF) | (third & 0x3F003F) << 9,
        (third >> 6 & 0x3F003F) | (fourth & 0x1FF01FF) << 6,
    ]
    spare = fourth >> 9
    return torch.stack([word | (spare >> bit & 0x10001) << 15 for bit, word in enumerate(words)], dim=-2)


def _even_threes(eight: Tensor) -> Tensor:
    """The even ones of eight codes of 3 bits, side by side."""
    codes = eight & 0o07070707
    codes = (codes | codes >> 3) & 0o00770077
    return (codes | codes >> 6) & 0o7777


def _qtensor(weight: Packed | QTensor) -> QTensor:
    return weight if isinstance(weight, QTensor) else weight.qtensor()
