"""The reference kernel: decode with the codec, then multiply. It defines what the others must match.

    y = x W_hat^T + b,   W_hat rounded once to the dtype of x

The decoded weight is the very one that a fake-quantized layer multiplies by. It lives for one call, in the
dtype of x; what the codec computes in fp32 beside it is bounded by decoding a block of rows at a time.
"""

import torch
from torch import Tensor
from torch.nn import functional

from planish.kernels.pack import Packed

BLOCK = 2**22  # weights decoded at a time: 16 MiB for each fp32 step of the codec


def supports(weight: Packed, x: Tensor) -> bool:
    """Everything."""
    return True


def matmul(x: Tensor, weight: Packed, bias: Tensor | None, cache: dict[str, Tensor]) -> Tensor:
    """x [..., in], any float dtype -> [..., out] in that dtype; keeps nothing in `cache`."""
    return functional.linear(x, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))


def dense(weight: Packed, dtype: torch.dtype) -> Tensor:
    """W_hat [out, in] in `dtype`, the same bits however many rows are decoded at a time."""
    rows = max(1, BLOCK // weight.in_features)
    if weight.out_features <= rows:
        return weight.qtensor().dequantize(dtype)
    shape = weight.out_features, weight.in_features
    values = torch.empty(shape, dtype=dtype, device=weight.codes.device)
    for start in range(0, weight.out_features, rows):
        values[start : start + rows] = weight.qtensor(slice(start, start + rows)).dequantize(dtype)
    return values
