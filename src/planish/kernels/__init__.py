"""Kernels: ways to multiply by a packed QTensor, with gradients or without, and the fused fake quantizer.

A kernel is a module with

    supports(weight: Packed, x: Tensor) -> bool
    matmul(x, weight: Packed, bias: Tensor | None, cache: dict[str, Tensor]) -> Tensor

where `cache` belongs to the layer: a kernel keeps there what it made of the weight. The first of KERNELS
that supports a call is taken; the last, the reference, supports every call and defines the result.
"""

from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

from planish.kernels import cpu, cuda_gemv, reference, train
from planish.kernels.pack import Packed

if find_spec("triton"):
    # they register themselves for CUDA
    from planish.kernels import fakequant, merged, tokens, triton_loss, triton_train  # noqa: F401

KERNELS = {"cpu": cpu, "cuda_gemv": cuda_gemv, "train": train, "reference": reference}


def choose(weight: Packed, x: Tensor) -> ModuleType:
    """The kernel for x [..., in] times `weight`."""
    return next(kernel for kernel in KERNELS.values() if kernel.supports(weight, x))
