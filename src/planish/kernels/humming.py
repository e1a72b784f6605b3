"""Prefill by Humming (`pip install 'planish[cuda]'`): many rows times large packed weights of 2, 3, 4 or 8 bits.

    y = x W_hat^T + b,   W_hat = s (Q - z) rounded once to the dtype of x, as the reference rounds it

Humming is given codes, scales and zeros as they are and quantizes nothing anew. It subtracts z (2^(bits - 1) where the
grid is symmetric) from a code exactly and multiplies by s, whose sign it keeps. In fp16 that is W_hat, bit for bit; in
bf16 it wants scales of bf16, so that these are rounded, by up to 2^-9. It would apply one scale of a whole row to sums
that are rounded to fp16 already, and may have overflowed: such rows have groups of 128 here, of equal scales. A bias
is added to the rounded result.

It has a layout of its own, which lies beside the records and takes as much memory again. Its kernels are compiled when
they are first needed, for a shape and a class of rows, with settings by its rules; none is timed. Stream-K is
switched off: it adds parts of a sum in the dtype of y, and where there are more than three (or on Hopper) in
the order in which they come, so that results wouldn't repeat bit for bit. Knows nothing of layers.
"""

import functools
import importlib.util
import json
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from planish import bitstream
from planish.kernels import cuda_gemm, gemv_layout
from planish.kernels.cuda_gemv import DTYPES, MAX_ROWS, card_of, size_of
from planish.kernels.gemv_layout import Layout

TOLERANCE = 3 * 2**-9  # of |x| |W_hat|^T + |b|, element by element: roundings of s, W_hat and y in bf16
GROUP = 128  # inputs of a group, at most
MULTIPLE = 128  # of outputs and inputs: what its rules for all GPUs can cut
# weights (`cuda_gemv.size_of`) and rows that others are as fast for, or faster: small ones decoded for cuBLAS, and two
# passes of the decode kernel. Measured where it was forced, on an H100: benchmarks/results/prefill-2026-11-26.json
SIZES, FEW = ("medium", "large"), 2 * MAX_ROWS


class Laid(NamedTuple):
    """A weight as Humming reads it for activations of the dtype of `scale`."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None


@torch.library.custom_op("planish::humming_gemm", mutates_args=())
def humming_gemm(
    x: Tensor,
    records: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    has_zero: bool,
    out_features: int,
    in_features: int,
) -> Tensor:
    """y [rows, out] = x W_hat^T + b; here its definition, for any device.

    Args:
        x: [rows, in], bf16 or fp16.
        records: uint8, of `write_records`; what Humming was given it for.
        weight, scale, zero: of `lay_out`.
        bias: [out] in the dtype of x, or None.
        bits, group, has_zero, out_features, in_features: the records' `Layout`.
    """
    q = gemv_layout.read_records(records, Layout(bits, group, has_zero, out_features, in_features))
    return functional.linear(x, q.dequantize(x.dtype), bias)


@humming_gemm.register_fake
def _(x: Tensor, records: Tensor, weight: Tensor, scale: Tensor, zero, bias, *layout) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], layout[3])


@humming_gemm.register_kernel("cuda")
def _(x: Tensor, records: Tensor, weight: Tensor, scale: Tensor, zero, bias, *layout) -> Tensor:  # type: ignore[no-untyped-def]
    if not len(x):
        return x.new_empty(0, layout[3])
    from humming import ops

    x = x.contiguous()
    x = x.clone() if x.data_ptr() % 16 else x
    kernel = compiled(Layout(*layout), x.dtype, cuda_gemm.rows_of(len(x)), x.device.index or 0)
    with torch.cuda.device(x.device):
        y = ops.launch_kernel(configs=kernel, inputs=x, weight=weight, weight_scale=scale, zero_point=zero)
    return y if bias is None else y.add_(bias)


def takes(laid: Laid | None, x: Tensor) -> bool:
    """Whether x [..., in] is a product for a weight so laid out."""
    return laid is not None and laid.scale.dtype == x.dtype and x.numel() > FEW * x.shape[-1]


def hold(records: Tensor, layout: Layout, dtype: torch.dtype) -> Laid | None:
    """The weight of records for activations of `dtype`, where tables (`cuda_gemm.WAYS`) have Humming take many rows
    and it can; else None."""
    if not (records.is_cuda and dtype in DTYPES and installed() and supports(layout)):
        return None
    if cuda_gemm.ways_of(card_of(records.device.index or 0).capability)[0] != "humming":
        return None
    try:
        return lay_out(records, layout, dtype)
    except Exception as problem:  # noqa: BLE001  (another package may fail in any way, and ours goes on without it)
        warnings.warn(f"Humming is installed but can't be used, prompts go without it: {problem}", stacklevel=2)
        return None


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("humming") is not None


def supports(layout: Layout) -> bool:
    """Outputs and inputs in whole tiles, whatever bits and groups; no small weight."""
    return size_of(layout) in SIZES and layout.out_features % MULTIPLE == 0 and layout.in_features % MULTIPLE == 0


def lay_out(records: Tensor, layout: Layout, dtype: torch.dtype) -> Laid:
    """The weight of records on a GPU for activations of `dtype`; by Humming, which `supports` has been asked for."""
    from humming import transform

    config = _config(layout, dtype, records.device.index or 0)
    with torch.cuda.device(records.device):
        made = transform.transform_humming_tensors(config, parts(records, layout, dtype))
    for tensor in made.values():  # else CUDA graphs of torch.compile would copy them at each replay
        torch._dynamo.mark_static_address(tensor)
    return Laid(made["weight"], made["weight_scale"], made.get("zero_point"))


def parts(records: Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """What Humming is given: codes as bit streams int32 [out, in * bits / 32], scales [out, G] in `dtype`, and zeros
    as bit streams int32 [out * bits / 32, G]; of groups of at most GROUP."""
    q = gemv_layout.read_records(records, layout)
    first = torch.arange(0, layout.in_features, min(layout.group, GROUP), device=records.device) // layout.group
    made = {"weight": bitstream.pack(q.codes, q.bits, 1), "weight_scale": q.scale[:, first].to(dtype)}
    return made if q.zero is None else made | {"zero_point": bitstream.pack(q.zero[:, first], q.bits, 0)}


@functools.cache
def _config(layout: Layout, dtype: torch.dtype, device: int) -> Any:
    """Humming's own description of a layer."""
    from humming import schema, transform

    grid = schema.HummingWeightSchema(
        b_dtype=f"uint{layout.bits}", weight_scale_group_size=min(layout.group, GROUP), has_zero_point=layout.has_zero
    )
    return transform.prepare_layer_config(
        layout.out_features, layout.in_features, grid, torch_dtype=dtype, device=torch.device("cuda", device)
    )


@functools.cache
def compiled(layout: Layout, dtype: torch.dtype, rows: int, device: int) -> Tensor:
    """int64 on the CPU: what Humming launches for up to so many rows (of `cuda_gemm.rows_of`), compiled here."""
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    config = _config(layout, dtype, device)
    chosen = get_heuristics_config(config, shape_m=rows, device=device) | {"use_stream_k": False}
    return HummingKernel.prepare_kernels(config.to_str(), None, json.dumps(chosen), device)
