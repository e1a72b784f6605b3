"""Products of integers: activations rounded token by token to at most 8 bits, times weights with one scale an output.

    y = s_x s_w sum_k (u - t) (w - d) + b
      = s_x s_w (sum_k u w - d sum_k (u - t) - t sum_k w) + b

u and w are codes less half their range, t and d zeros likewise: whole numbers of a byte, whose sums are exact. So
neither the activations nor the weights are rounded a second time, to 16 bits, as a product of fake-quantized ones has
them. A GPU multiplies by `torch._int_mm`, a CPU by fp32 products that are exact; on a Hopper GPU two kernels do it
all (`cuda_int8`). All give the same bits. Knows nothing of layers, nor of how codes were found.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from planish.kernels import cuda_int8, gemv_layout
from planish.kernels.gemv_layout import STEP, Layout
from planish.kernels.pack import Packed
from planish.qtensor import QTensor, midpoint

SMALLEST = 1e-12  # of a token's scale
EXACT = 1024  # products of two bytes that fp32 adds up exactly
FEWEST, MULTIPLE = 32, 8  # rows that torch._int_mm takes, and what divides the other sizes


class Tokens(NamedTuple):
    """Rows as integers: u int8 [rows, in]; s fp32, t and sum_k (u - t) int32, all [rows, 1]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    sum: Tensor


@torch.library.custom_op("planish::int8_product", mutates_args=())
def int8_product(
    x: Tensor, codes: Tensor, lines: Tensor, bias: Tensor | None, in_features: int, token_bits: int, symmetric: bool
) -> Tensor:
    """y [rows, out] in the dtype of x, by `defined`, or a kernel that gives the same bits.

    Args:
        x: [rows, in], float.
        codes: w, int8 [out, in], or records of w + 2^(bits-1), uint8, 4 bits or 8.
        lines: int32 [out, 4]: s_w as the bits of an fp32 number, d, sum_k w, nothing.
        bias: [out] in the dtype of x, or None.
        in_features: of the weight.
        token_bits, symmetric: of the activations' codes.
    """
    return defined(x, codes, lines, bias, in_features, token_bits, symmetric)


@int8_product.register_fake
def _(x: Tensor, codes: Tensor, lines: Tensor, *others) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], lines.shape[0])


@int8_product.register_kernel("cuda")
def _(x: Tensor, codes: Tensor, lines: Tensor, bias: Tensor | None, *others) -> Tensor:  # type: ignore[no-untyped-def]
    if codes.dim() == 3 and x.dtype in cuda_int8.DTYPES and len(x):
        return cuda_int8.product(x, codes, lines, bias, *others)
    return defined(x, codes, lines, bias, *others)


def defined(
    x: Tensor, codes: Tensor, lines: Tensor, bias: Tensor | None, in_features: int, token_bits: int, symmetric: bool
) -> Tensor:
    """What the op gives, step by step."""
    tokens, weight = round_tokens(x, token_bits, symmetric), codes
    if codes.dim() == 3:
        layout = cuda_int8.layout_of(codes, len(lines), in_features)
        weight = (gemv_layout.read_records(codes, layout).codes.int() - midpoint(layout.bits)).to(torch.int8)
    scale, (zero, total) = lines[:, 0].contiguous().view(torch.float32), lines[:, 1:3].unbind(1)
    sums = integer_product(tokens.codes, weight) - zero * tokens.sum - tokens.zero * total
    y = sums.float() * tokens.scale * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def round_tokens(x: Tensor, bits: int, symmetric: bool) -> Tokens:
    """Each row by its own range, in fp32; one with a number that isn't finite has the scale NaN."""
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    half = midpoint(bits)
    reach, steps = (torch.maximum(-low, high), half - 1) if symmetric else (high - low, 2 * half - 1)
    scale = (reach / torch.full_like(reach, steps)).clamp(min=SMALLEST)  # by a number, a GPU multiplies by its inverse
    zero = torch.full_like(scale, half) if symmetric else (-low / scale).round().clamp(0, 2 * half - 1)
    codes = ((x.float() / scale).round() + zero).clamp(0, 2 * half - 1) - half
    scale = scale.where(scale.isfinite(), torch.nan)
    signed, zero = codes.nan_to_num(0).to(torch.int8), (zero.nan_to_num(0) - half).int()
    total = signed.sum(1, keepdim=True, dtype=torch.int32) - x.shape[1] * zero
    return Tokens(signed, scale, zero, total)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """int32 a b^T of int8 a [m, k] and b [n, k]."""
    rows, outputs = len(a), len(b)
    if a.is_cuda and rows:
        a = functional.pad(a, (0, -a.shape[1] % MULTIPLE, 0, max(0, FEWEST - rows)))
        b = functional.pad(b, (0, -b.shape[1] % MULTIPLE, 0, -outputs % MULTIPLE))
        return torch._int_mm(a, b.T)[:rows, :outputs]
    sums = torch.zeros(rows, outputs, dtype=torch.int32, device=a.device)
    for part, other in zip(a.split(EXACT, 1), b.split(EXACT, 1), strict=True):
        sums += (part.float() @ other.float().T).int()
    return sums


def supports(weight: Packed, x: Tensor, token_bits: int, symmetric: bool) -> bool:
    """One scale an output, no gradient, and sums that 32 bits hold whatever the codes."""
    if weight.scale.shape[1] != 1 or weight.offset is not None or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return x.is_floating_point() and largest(weight, token_bits, symmetric) < 2**31


def largest(weight: Packed, token_bits: int, symmetric: bool) -> int:
    """What a sum may come to; a weight of 4 bits is multiplied 16 times itself."""
    left = 2 ** (token_bits - 1) if symmetric else 2**token_bits - 1
    right = 2 ** (weight.bits - 1) if weight.zero is None else 2**weight.bits - 1
    return left * right * (16 if weight.bits <= 4 else 1) * weight.in_features


def matmul(
    x: Tensor, weight: Packed, bias: Tensor | None, cache: dict[str, Tensor], token_bits: int, symmetric: bool
) -> Tensor:
    """x [..., in] -> [..., out]; `prepare` fills `cache` at the first call."""
    if "int8" not in cache:
        prepare(weight, cache)
    bias = None if bias is None else bias.to(x.dtype)
    rows = x.reshape(-1, weight.in_features)
    y = int8_product(rows, cache["int8"], cache["int8_lines"], bias, weight.in_features, token_bits, symmetric)
    return y.view(*x.shape[:-1], weight.out_features)


@torch.no_grad()
def prepare(weight: Packed, cache: dict[str, Tensor]) -> None:
    """Codes and lines of `int8_product`, on the device; records where the Hopper kernels do it."""
    q = weight.qtensor()
    signed = (q.codes.int() - midpoint(q.bits)).to(torch.int8)
    zero = torch.zeros_like(q.scale) if q.zero is None else q.zero.int() - midpoint(q.bits)
    parts = [q.scale.float().view(torch.int32), zero.int(), signed.sum(1, keepdim=True, dtype=torch.int32)]
    cache["int8_lines"] = torch.cat([*parts, torch.zeros_like(parts[1])], dim=1)
    cache["int8"] = records_of(signed, q) if cuda_int8.runs_on(signed.device) else signed
    if signed.is_cuda:
        torch.cuda.current_stream(signed.device).synchronize()  # kernels that overlap read weights before they wait


def records_of(signed: Tensor, q: QTensor) -> Tensor:
    """Of codes less half their range, int8 [out, in]: of 4 bits if they fit, else of 8."""
    bits = 4 if q.bits <= 4 else 8
    codes = (signed.int() + midpoint(bits)).to(torch.uint8)
    widened = QTensor(codes=codes, scale=q.scale, zero=None, bits=bits, group_size=q.shape[1])
    return gemv_layout.write_records(Packed.from_qtensor(widened), Layout(bits, STEP, False, *q.shape))
