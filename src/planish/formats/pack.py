"""Bit-stream packing: integer codes of b bits laid end to end, little-endian, in int32 words.

Element e of the packed axis takes bits e*b ... e*b + b - 1 of the stream; a field that doesn't fit in its
word goes on in the next one (3 bits: element 10 takes two bits of word 0 and one of word 1). So 32
elements take exactly b words. GPTQ, AutoRound and compressed-tensors all store this stream, along
different axes. Knows nothing of schemes or tensors' names.

Eight codes are moved at a time: as bytes of a 64-bit integer, neighbours are pushed together in three steps (2, 4,
then 8 of them), each a shift, an or and a mask. Machines are taken to be little-endian, as safetensors takes them.
"""

import torch
from torch import Tensor
from torch.nn import functional

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
