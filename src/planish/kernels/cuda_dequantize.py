"""Decoding a packed weight on an NVIDIA GPU, from the layout of `cuda_gemv`, for a product by cuBLAS.

    W_hat = s (Q - z), rounded once to the dtype of x: the reference's, bit for bit

The kernel is CUDA C++ (cuda_dequantize.cu, which says how it works). sm_80 and later. Knows nothing of layers.
"""

import ctypes
import functools

import torch
from torch import Tensor

from planish.kernels import cuda_records, nvrtc
from planish.kernels.cuda_gemv import card_of
from planish.kernels.gemv_layout import Layout

WARPS, SHARED = 8, 8 * 16 * 272  # of a block, as in cuda_dequantize.cu


def dequantize(records: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """W_hat [out, in] in bf16 or fp16, on the records' GPU."""
    device = records.device
    y = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device=device)
    overlap = card_of(device.index or 0).capability >= (9, 0)
    with torch.cuda.device(device):
        kernel = _kernel(device.index or 0, layout[:3], dtype == torch.bfloat16, overlap)
        sizes = layout.in_features, layout.out_features, layout.tiles, layout.steps
        first = cuda_records.first(layout.bits, dtype == torch.bfloat16)
        blocks = -(-layout.tiles * layout.steps // WARPS)
        nvrtc.launch(kernel, (blocks, 1), 32 * WARPS, SHARED, [records, y, *sizes, first], overlap)
    return y


def source() -> str:
    """The kernel's text."""
    return cuda_records.source("cuda_dequantize")


@functools.cache
def _kernel(device: int, layout: tuple[int, int, bool], bf16: bool, overlap: bool) -> ctypes.c_void_p:
    capability = card_of(device).capability
    macros = cuda_records.macros(layout, bf16, overlap)
    code = nvrtc.compile_source(source(), macros, f"sm_{capability[0]}{capability[1]}")
    return nvrtc.load_kernel(code, "dequantize", SHARED)
