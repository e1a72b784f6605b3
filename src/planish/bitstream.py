"""Bit-stream packing: integer codes of b bits laid end to end, little-endian, in int32 words.

Element e of the packed axis takes bits e*b ... e*b + b - 1 of the stream; a field that doesn't fit in its
word goes on in the next one (3 bits: element 10 takes two bits of word 0 and one of word 1). So 32
elements take exactly b words. GPTQ, AutoRound and compressed-tensors all store this stream, along
different axes. A `Stream` is a QTensor whose codes are kept so: what goes from file to file, or from a file to a
kernel, needn't be unpacked on the way. Knows nothing of tensors' names.

Eight codes are moved at a time: as bytes of a 64-bit integer, neighbours are pushed together in three steps (2, 4,
then 8 of them), each a shift, an or and a mask. Machines are taken to be little-endian, as safetensors takes them.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from planish.qtensor import PARTS, QTensor, beside_codes, moved, same_parts
from planish.scheme import Scheme

WORD = 32  # bits of a word, and the elements after which fields and words line up again

_OCTET = 8  # codes that a 64-bit integer holds as bytes: `bits` bytes when packed
_CHUNK = 1 << 17  # octets at a time, so that what passes over them stays in a CPU's cache


def words_for(length: int, bits: int) -> int:
    """Words that hold `length` codes."""
    return -(-length * bits // WORD)


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Pack codes along an axis.

    Args:
        codes: any integer dtype, each in [0, 2^bits - 1].
        bits: 1 to 8.
        dim: the axis to pack; of n codes become words_for(n, bits) words, bits left over are zero.

    Returns:
        int32, contiguous; as `codes` but for the packed axis.
    """
    rows = codes.to(torch.uint8).movedim(dim, -1)
    length = rows.shape[-1]
    rows = functional.pad(rows, (0, -length % WORD)).contiguous()
    octets = rows.flatten().view(torch.int64)
    packed = torch.empty(len(octets), bits, dtype=torch.uint8, device=codes.device)
    for start in range(0, len(octets), _CHUNK):
        fields = octets[start : start + _CHUNK].clone()
        for step in range(3):
            lower, upper, shift = _masks(bits, step)
            moved = (fields >> shift).bitwise_and_(upper)
            fields.bitwise_and_(lower).bitwise_or_(moved)
        packed[start : start + _CHUNK] = fields.view(torch.uint8).unflatten(0, (-1, _OCTET))[:, :bits]
    words = packed.view(-1).view(torch.int32).unflatten(0, (*rows.shape[:-1], -1))
    return words[..., : words_for(length, bits)].movedim(-1, dim).contiguous()


def unpack(words: Tensor, bits: int, dim: int, length: int) -> Tensor:
    """The `length` codes that `pack` put into words, as contiguous uint8."""
    rows = words.movedim(dim, -1)
    rows = functional.pad(rows, (0, -rows.shape[-1] % bits)).contiguous()
    packed = rows.flatten().view(torch.uint8).view(-1, bits)
    octets = torch.empty(len(packed), dtype=torch.int64, device=words.device)
    for start in range(0, len(packed), _CHUNK):
        part = packed[start : start + _CHUNK]
        fields = functional.pad(part, (0, _OCTET - bits)).view(torch.int64).squeeze(-1)
        for step in reversed(range(3)):
            lower, upper, shift = _masks(bits, step)
            moved = (fields & upper).bitwise_left_shift_(shift)
            fields.bitwise_and_(lower).bitwise_or_(moved)
        octets[start : start + _CHUNK] = fields
    codes = octets.view(torch.uint8).unflatten(0, (*rows.shape[:-1], -1))
    return codes[..., :length].movedim(-1, dim).contiguous()


def _masks(bits: int, step: int) -> tuple[int, int, int]:
    """Where 2^step codes lie, packed, and where their upper neighbours do; and by how much these move for that.

    In each lane of 16 * 2^step bits; as signed 64-bit integers.
    """
    width, lane = bits << step, 8 << step
    lower = sum(((1 << width) - 1) << start for start in range(0, 64, 2 * lane))
    return lower, _signed(lower << width), lane - width


def _signed(mask: int) -> int:
    return mask - (1 << 64) if mask >> 63 else mask


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """A quantized weight matrix [out, in]: `QTensor` but for its codes.

    Args:
        codes: int32 [out, ceil(in * bits / 32)], each row a bit stream.
        scale, zero, offset, order, bits, group_size: as in `QTensor`.
        in_features: codes of a row; the rest of its last word is zero.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None
    order: Tensor | None = None
    bits: int
    group_size: int
    in_features: int

    @classmethod
    def of(cls, q: QTensor) -> "Stream":
        return cls(codes=pack(q.codes, q.bits, 1), in_features=q.shape[1], **beside_codes(q))

    def qtensor(self) -> QTensor:
        return QTensor(codes=unpack(self.codes, self.bits, 1, self.in_features), **beside_codes(self))

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.in_features

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def symmetric(self) -> bool:
        return self.zero is None

    @property
    def scheme(self) -> Scheme:
        """As of `QTensor.scheme`."""
        whole = self.group_size == self.in_features
        return Scheme(bits=self.bits, group_size=None if whole else self.group_size, symmetric=self.symmetric)

    def to(self, device: torch.device | str) -> "Stream":
        """The same on another device."""
        return moved(self, device)

    def equal(self, other: "Stream") -> bool:
        """Is every code, scale, zero and offset the same, and the columns' order and the shape?"""
        sizes = [(stream.bits, stream.group_size, stream.shape) for stream in (self, other)]
        return sizes[0] == sizes[1] and same_parts(self, other)

    def digest(self) -> str:
        """sha256 of every code, scale, zero and offset, of the columns' order and of the shape."""
        found = hashlib.sha256(f"{self.bits} {self.group_size} {self.shape}".encode())
        for name in PARTS:
            value = getattr(self, name)
            found.update(name.encode() if value is None else value.cpu().contiguous().numpy())
        return found.hexdigest()
