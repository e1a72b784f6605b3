"""Packed: a QTensor with its codes packed along a row, as every kernel is given it.

A code of b bits lies at bit b * (j mod 8/b) of byte j // (8/b) of its row (little endian), rows padded with
zeros to a multiple of 8 codes. 3 and 6 bits don't divide a byte: they lie as two planes side by side, first the
low 2 or 4 bits packed as above, then the high bits. So a row is always bits * ceil(in / 8) bytes.

Knows nothing of files: the formats have layouts of their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from planish.bitstream import Stream
from planish.qtensor import QTensor, beside_codes, moved

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [out, in], each below 2^bits -> uint8 [out, bits * ceil(in / 8)]."""
    codes = functional.pad(codes, (0, -codes.shape[1] % 8))
    planes, low = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane((codes >> low) & (2**width - 1), width))
        low += width
    return torch.cat(planes, dim=1)


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """uint8 [out, bits * ceil(in / 8)] -> uint8 [out, in]; the inverse of `pack_codes`."""
    eighth = packed.shape[1] // bits
    codes, low = torch.zeros((), dtype=torch.uint8, device=packed.device), 0
    for width in PLANES[bits]:
        plane = packed[:, low * eighth : (low + width) * eighth]
        codes = codes | (_unpack_plane(plane, width) << low)
        low += width
    return codes[:, :in_features]


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    slots = codes.unflatten(1, (-1, 8 // width))
    packed = slots[..., 0]
    for slot in range(1, 8 // width):
        packed = packed | (slots[..., slot] << (slot * width))
    return packed


def _unpack_plane(packed: Tensor, width: int) -> Tensor:
    slots = [(packed >> low) & (2**width - 1) for low in range(0, 8, width)]
    return torch.stack(slots, dim=-1).flatten(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A packed weight matrix [out, in]: `QTensor` but for its codes.

    Args:
        codes: uint8 [out, bits * ceil(in / 8)].
        scale: fp16 [out, G].
        zero: uint8 [out, G], or None for the symmetric constant.
        offset: fp32 [out, G] in weight units, or None.
        bits, group_size: as in `QTensor`.
        in_features: codes of a row; the rest is padding.
        order: as in `QTensor`. Kernels are given weights without one: `PackedLinear` permutes x instead.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    bits: int
    group_size: int
    in_features: int
    order: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @classmethod
    def from_qtensor(cls, q: QTensor) -> "Packed":
        return cls(codes=pack_codes(q.codes, q.bits), in_features=q.shape[1], **beside_codes(q))

    @classmethod
    def from_stream(cls, stream: Stream) -> "Packed":
        """The same weight; but for 3 and 6 bits, which lie in planes here, nothing is unpacked."""
        if len(PLANES[stream.bits]) > 1:
            return cls.from_qtensor(stream.qtensor())
        row = stream.bits * -(-stream.in_features // 8)
        codes = stream.codes.view(torch.uint8)[:, :row].contiguous()
        return cls(codes=codes, in_features=stream.in_features, **beside_codes(stream))

    def to(self, device: torch.device | str) -> "Packed":
        """The same on another device."""
        return moved(self, device)

    def qtensor(self, rows: slice | Tensor = slice(None)) -> QTensor:
        """The exact QTensor of all rows, or of some: a slice of them, or their numbers."""
        return QTensor(
            codes=unpack_codes(self.codes[rows], self.bits, self.in_features),
            scale=self.scale[rows],
            zero=None if self.zero is None else self.zero[rows],
            offset=None if self.offset is None else self.offset[rows],
            bits=self.bits,
            group_size=self.group_size,
            order=self.order,
        )
