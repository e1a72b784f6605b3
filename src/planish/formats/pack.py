"""Bit-stream packing: integer codes of b bits laid end to end, little-endian, in int32 words.

Element e of the packed axis takes bits e*b ... e*b + b - 1 of the stream; a field that doesn't fit in its
word goes on in the next one (3 bits: element 10 takes two bits of word 0 and one of word 1). So 32
elements take exactly b words. GPTQ, AutoRound and compressed-tensors all store this stream, along
different axes. Knows nothing of schemes or tensors' names.
"""

import torch
from torch import Tensor
from torch.nn import functional

WORD = 32  # bits of a word, and the elements after which fields and words line up again


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
    length = codes.shape[dim]
    fields = _lined_up(codes.movedim(dim, 0), WORD)
    words = torch.zeros(fields.shape[0], bits, *fields.shape[2:], dtype=torch.int32, device=codes.device)
    for element in range(WORD):
        word, shift = divmod(element * bits, WORD)
        field = fields[:, element].to(torch.int32)
        words[:, word] |= field << shift
        if shift + bits > WORD:
            words[:, word + 1] |= field >> (WORD - shift)
    return words.flatten(0, 1)[: words_for(length, bits)].movedim(0, dim).contiguous()


def unpack(words: Tensor, bits: int, dim: int, length: int) -> Tensor:
    """The `length` codes that `pack` put into words, as contiguous uint8."""
    lined_up = _lined_up(words.movedim(dim, 0), bits)
    fields = torch.empty(lined_up.shape[0], WORD, *lined_up.shape[2:], dtype=torch.uint8, device=words.device)
    for element in range(WORD):
        word, shift = divmod(element * bits, WORD)
        field = lined_up[:, word] >> shift
        if shift + bits > WORD:
            # >> keeps the sign: only the 32 - shift lowest bits of the first part are the field's
            kept = WORD - shift
            field = (field & (2**kept - 1)) | (lined_up[:, word + 1] << kept)
        fields[:, element] = field & (2**bits - 1)
    return fields.flatten(0, 1)[:length].movedim(0, dim).contiguous()


def _lined_up(stream: Tensor, step: int) -> Tensor:
    """[n, ...] -> [ceil(n / step), step, ...], padded with zeros; contiguous, since 32 passes go over it."""
    short = -stream.shape[0] % step
    if short:
        stream = functional.pad(stream, [0, 0] * (stream.dim() - 1) + [0, short])
    return stream.contiguous().unflatten(0, (-1, step))
