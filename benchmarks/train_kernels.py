"""Kernels of training on packed weights: y, dX and ds on codes, beside cuBLAS on dense bf16.

    python benchmarks/train_kernels.py OUT.json [--sweep] [--tiny]

For each shape (out x in), number of tokens and scheme: y and dX with W_hat decoded tile by tile inside the
product ("tiles"), y and dX with W_hat written first and multiplied by cuBLAS ("dense"), and ds in one pass;
each against the same product of plain bf16 matrices, with its peak memory above what the arguments take.
Rates count 2 * tokens * out * in. Every result is held against fp32 on a sample of its rows: `error` is the
largest difference over the largest value. --sweep times other tile shapes on the second shape instead, to
choose the constants of `kernels.triton_train`. --tiny runs small shapes, on a CPU too, where the definitions
stand in for the kernels; its figures mean nothing.
"""

import argparse
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from planish.kernels import train
from planish.kernels.pack import Packed
from planish.log import versions

SHAPES = [(4096, 4096), (4096, 11008), (8192, 28672), (28672, 8192)]
TOKENS = [2048, 4096]
SCHEMES = [(2, 64), (3, 128), (4, 128)]
TILES = [(128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3)]
SAMPLE = 64  # rows of a result that are checked
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

if CUDA:
    from planish.kernels import triton_train

Case = dict[str, object]


def random_weight(out_features: int, in_features: int, bits: int, group: int) -> Packed:
    """Random bytes are codes, whatever the bits."""
    grid = out_features, -(-in_features // group)
    return Packed(
        codes=torch.randint(0, 256, (out_features, bits * in_features // 8), dtype=torch.uint8, device=DEVICE),
        scale=(0.01 * torch.randn(grid, device=DEVICE)).half().float(),
        zero=None,
        offset=None,
        bits=bits,
        group_size=group,
        in_features=in_features,
    )


def seconds(work: Callable[[], object]) -> float:
    """Of one call, after two that don't count: 40 ms of calls or at least three."""
    for _ in range(2):
        work()
    repeats, first = 3, _elapsed(work, 3)
    if first < 0.04 * 3:
        repeats = min(200, max(3, round(0.04 / max(first / 3, 1e-6))))
        return _elapsed(work, repeats) / repeats
    return first / repeats


def _elapsed(work: Callable[[], object], repeats: int) -> float:
    if not CUDA:
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for _ in range(repeats):
        work()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def measured(work: Callable[[], Tensor], flops: float, expected: Tensor) -> Case:
    """Time, rate, memory and error of a product; `expected` is its first rows in fp32."""
    result = work()[:SAMPLE].float()
    error = ((result - expected).abs().max() / expected.abs().max()).item()
    peak = 0
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    taken = seconds(work)
    return {"us": round(1e6 * taken, 1), "tflops": round(flops / taken / 1e12, 1), "peak_mib": round(peak / 2**20, 1),
            "error": float(f"{error:.2g}")}  # fmt: skip


def group_sums(grad_weight: Tensor, weight: Packed, rows: slice) -> Tensor:
    """ds of a few rows of dW in fp32."""
    q = weight_rows(weight, rows)
    return (grad_weight * (q.codes.float() - 2 ** (weight.bits - 1))).unflatten(1, (-1, weight.group_size)).sum(-1)


def weight_rows(weight: Packed, rows: slice):
    """The QTensor of a few rows; its scales back in fp16."""
    parts = {name: getattr(weight, name) for name in ("zero", "offset", "bits", "group_size", "in_features")}
    return Packed(codes=weight.codes[rows], scale=weight.scale[rows].half(), **parts).qtensor()


def ways(weight: Packed) -> dict[str, tuple[Callable, Callable]]:
    """y and dX by each way there is on this device."""
    if not CUDA:
        return {"dense": (lambda x: train.multiply(x, weight, None), lambda grad: train.multiply_back(grad, weight))}
    return {
        name: (
            lambda x, through=through: triton_train.multiply(x, weight, None, through),
            lambda grad, through=through: triton_train.multiply_back(grad, weight, through),
        )
        for name, through in (("tiles", False), ("dense", True))
    }


def case(x: Tensor, grad: Tensor, weight: Packed) -> Case:
    """Every product of one layer on codes."""
    flops, row = 2 * len(x) * weight.out_features * weight.in_features, {}
    dense = train.dense(weight, x.dtype).float()
    y, grad_x = x[:SAMPLE].float() @ dense.T, grad[:SAMPLE].float() @ dense
    del dense
    rows = slice(0, SAMPLE)
    grad_scale = group_sums(grad[:, rows].float().T @ x.float(), weight, rows)
    for name, (forward, back) in ways(weight).items():
        row[f"y_{name}"] = measured(lambda forward=forward: forward(x), flops, y)
        row[f"dx_{name}"] = measured(lambda back=back: back(grad), flops, grad_x)
    sums = triton_train.grid_gradients if CUDA else train.grid_gradients
    row["ds"] = measured(lambda: sums(grad, x, weight, False)[0], flops, grad_scale)
    return row


def plain(x: Tensor, grad: Tensor, out_features: int) -> Case:
    """The three products of a plain bf16 linear."""
    weight = 0.01 * torch.randn(out_features, x.shape[1], device=DEVICE).to(x.dtype)
    flops = 2 * len(x) * weight.numel()
    exact = weight.float()
    return {
        "y": measured(lambda: x @ weight.T, flops, x[:SAMPLE].float() @ exact.T),
        "dx": measured(lambda: grad @ weight, flops, grad[:SAMPLE].float() @ exact),
        "dw": measured(lambda: grad.T @ x, flops, grad[:, :SAMPLE].float().T @ x.float()),
    }


def activations(tokens: int, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(tokens, n, device=DEVICE, dtype=torch.bfloat16) for n in (in_features, out_features))


def compare(shapes: list, tokens: list) -> list[Case]:
    rows: list[Case] = []
    for (out_features, in_features), count in ((s, t) for s in shapes for t in tokens):
        x, grad = activations(count, out_features, in_features)
        size = {"out": out_features, "in": in_features, "tokens": count}
        rows.append({**size, "scheme": "bf16", **plain(x, grad, out_features)})
        show(rows[-1])
        for bits, group in SCHEMES:
            weight = random_weight(out_features, in_features, bits, group)
            rows.append({**size, "scheme": f"w{bits}g{group}", **case(x, grad, weight)})
            show(rows[-1])
    return rows


def sweep(out_features: int, in_features: int, tokens: int) -> list[Case]:
    """y, dX (by tiles) and ds with each tile shape."""
    rows: list[Case] = []
    x, grad = activations(tokens, out_features, in_features)
    for numbers in TILES:
        triton_train.PRODUCT = triton_train.GRID = triton_train.Tiles(*numbers)
        for bits, group in SCHEMES[::2]:
            row = case(x, grad, random_weight(out_features, in_features, bits, group))
            found = {name: part for name, part in row.items() if not name.endswith("dense")}
            rows.append({"tiles": numbers, "scheme": f"w{bits}g{group}", **found})
            show(rows[-1])
    return rows


def show(row: Case) -> None:
    size = " ".join(str(part) for part in row.values() if not isinstance(part, dict))
    parts = (f"{name} {part['us']} us {part['tflops']} T" for name, part in row.items() if isinstance(part, dict))
    print(size, *parts, sep="  ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not CUDA and not args.tiny:
        parser.error("needs a CUDA device; --tiny runs without one")
    if args.sweep and not CUDA:
        parser.error("--sweep needs a CUDA device")
    torch.manual_seed(0)
    options = "".join(f" --{name}" for name in ("sweep", "tiny") if getattr(args, name))
    start = time.perf_counter()
    shapes, tokens = ([(128, 256), (256, 128)], [64]) if args.tiny else (SHAPES, TOKENS)
    rows = sweep(*shapes[1], tokens[-1]) if args.sweep else compare(shapes, tokens)
    report = {
        "command": f"python benchmarks/train_kernels.py OUT.json{options}",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
