"""Kernels of packed weights side by side: ours, cuBLAS on 16-bit weights, torch's int4, gemlite, Humming.

    python benchmarks/kernels.py OUT.json [--peers ours,cublas] [--shapes 8192x8192] [--rows 1,8] [--seconds 540]
    python benchmarks/kernels.py OUT.json --tune [--seconds 540]

A figure is the time of one product within a CUDA graph that holds one product for each of several copies of the
weight, together larger than four L2 caches, so that weights come from memory; the median of some replays. `share` is
the limit over that time, by bytes or by arithmetic: codes, 16 bits of scale and a packed zero for each group, read at
3.0 TB/s, or 750 TFLOP/s. `error` is the relative error of the result against fp32. A peer that isn't installed, or
can't do a case, is reported as such. benchmarks/prefill.py has more about many rows.

--tune first holds the kernel against fp32 over all that it claims, then times settings (`kernels.cuda_gemv.Settings`)
for each bit width, rows and size, first how blocks are cut, then the rest, and prints rows for its TABLES.
--tiny runs small shapes, on a CPU too, where definitions stand in for kernels; its figures mean nothing.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from planish.kernels import cuda_gemm, cuda_gemv, gemv_layout
from planish.kernels.cuda_gemv import Settings
from planish.kernels.pack import Packed
from planish.log import versions
from planish.qtensor import QTensor

STARTED = time.perf_counter()
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = [(28672, 8192), (8192, 8192), (22016, 4096), (12288, 4096), (4096, 11008), (4096, 4096)]  # out x in
SCHEMES = [(2, 64), (2, 128), (3, 128), (4, 128)]
ROWS = [1, 2, 4, 8, 16]
BANDWIDTH, ARITHMETIC = 3.0e12, 750e12  # bytes and operations a second
COLD = 220e6  # bytes of all copies together
MOST_COPIES = 40

Calls = list[Callable[[], Tensor]]
Case = dict[str, object]


class Peer(NamedTuple):
    """A kernel with its weight: calls of one product for x [rows, in], one for each copy of the weight."""

    calls: Callable[[Tensor], Calls]
    dtype: torch.dtype = torch.float16


def random_weight(
    out_features: int, in_features: int, bits: int, group: int | None, symmetric: bool = False
) -> QTensor:
    """Both extreme codes lie in each group, so that any min/max quantizer finds the same grid."""
    made = torch.Generator(DEVICE).manual_seed(0)
    group = group or in_features
    grid = out_features, -(-in_features // group)

    def integers(size: tuple[int, int]) -> Tensor:
        return torch.randint(0, 2**bits, size, dtype=torch.uint8, generator=made, device=DEVICE)

    codes = integers((out_features, in_features))
    codes[:, ::group], codes[:, 1::group] = 0, 2**bits - 1
    scale = (0.01 + 0.01 * torch.rand(grid, generator=made, device=DEVICE)).half()
    zero = None if symmetric else integers(grid)
    return QTensor(codes=codes, scale=scale, zero=zero, bits=bits, group_size=group)


def copies(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    tensors = list(tensors)
    size = sum(tensor.nbytes for tensor in tensors)
    count = min(MOST_COPIES, math.ceil(COLD / size)) if CUDA else 1
    return [tensors] + [[tensor.clone() for tensor in tensors] for _ in range(count - 1)]


def ours(q: QTensor, dtype: torch.dtype = torch.float16) -> Peer:
    weight = Packed.from_qtensor(q)
    layout = gemv_layout.layout_of(weight)
    held = copies([gemv_layout.write_records(weight, layout)])
    if not CUDA:
        return Peer(lambda x: [partial(cuda_gemv.packed_gemv, x, part, None, *layout) for (part,) in held], dtype)
    torch.cuda.synchronize()

    def calls(x: Tensor) -> Calls:
        product = cuda_gemv.multiply if len(x) <= cuda_gemv.MAX_ROWS else cuda_gemm.product
        return [partial(product, x, part, None, layout) for (part,) in held]

    return Peer(calls, dtype)


def cublas(q: QTensor) -> Peer:
    held = copies([q.dequantize(torch.float16)])
    return Peer(lambda x: [partial(functional.linear, x, weight) for (weight,) in held])


def int4(q: QTensor) -> Peer:
    """w = (q - 8) * s + t in bf16."""
    if q.bits != 4:
        raise NotImplementedError("4 bits only")
    words = torch.ops.aten._convert_weight_to_int4pack((q.codes[:, ::2] << 4 | q.codes[:, 1::2]).contiguous(), 8)
    scale = q.scale.float()
    grid = torch.stack([scale, (8 - q.zero.float()) * scale], dim=-1).transpose(0, 1).contiguous().bfloat16()
    product = torch.ops.aten._weight_int4pack_mm
    held = copies([words, grid])
    return Peer(lambda x: [partial(product, x, a, q.group_size, b) for a, b in held], torch.bfloat16)


def gemlite(q: QTensor) -> Peer:
    from gemlite.helper import A16Wn

    linear = A16Wn(device=DEVICE, dtype=torch.float16)
    linear = linear.from_weights(q.codes, q.scale, q.zero.half(), q.bits, q.group_size)
    held, meta = copies(linear.get_tensor_args()), linear.get_meta_args()
    return Peer(lambda x: [partial(torch.ops.gemlite.forward_functional, x, None, part, meta, -1) for part in held])


def humming(q: QTensor) -> Peer:
    from humming.forward import humming_forward
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    out_features, in_features = q.shape
    config = {"dtype": f"uint{q.bits}", "group_size": q.group_size, "has_zero_point": True}
    layer = HummingLayer(
        shape_n=out_features, shape_k=in_features, weight_config=config, input_config=None, torch_dtype=torch.float16
    ).cuda()
    layer.load_from_unquantized(q.dequantize(torch.float16))
    layer.transform()
    every = "weight", "weight_scale", "zero_point", "weight_scale_2"
    names = [name for name in every if getattr(layer, name, None) is not None]
    held = copies([getattr(layer, name).data for name in names])

    def calls(x: Tensor) -> Calls:
        chosen = get_heuristics_config(layer.humming_config, shape_m=len(x))
        return [
            partial(humming_forward, layer.humming_config, x, locks=layer.locks, tuning_config=chosen,
                    **dict(zip(names, part, strict=True)))
            for part in held
        ]  # fmt: skip

    return Peer(calls)


PEERS = {"ours": ours, "cublas": cublas, "int4": int4, "gemlite": gemlite, "humming": humming}


def seconds(calls: Calls, replays: int = 9) -> float:
    """Of one call."""
    if not CUDA:
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(2):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(before.elapsed_time(after) for before, after in itertools.pairwise(marks))
    return times[replays // 2] / 1e3 / len(calls)


def limit(q: QTensor, rows: int, name: str) -> float:
    """Seconds that reading the weight takes at BANDWIDTH, or multiplying by it at ARITHMETIC."""
    bits = 16 if name.startswith("cublas") else q.bits + (16 + q.bits) / min(q.group_size, q.shape[1])
    return q.codes.numel() * max(bits / 8 / BANDWIDTH, 2 * rows / ARITHMETIC)


def relative_error(y: Tensor, x: Tensor, q: QTensor) -> float:
    expected = x.float() @ q.dequantize().T
    return ((y.float() - expected).norm() / expected.norm()).item()


def measure(name: str, q: QTensor, every: list[int], out_of_time: Callable[[], bool]) -> list[Case]:
    """Cases of one peer and weight; what goes wrong is a case too."""
    about: Case = {"peer": name, "out": q.shape[0], "in": q.shape[1], "bits": q.bits, "group": q.group_size}
    if out_of_time():
        return [about | {"missing": "out of time"}]
    cases: list[Case] = []
    try:
        peer = PEERS[name](q)
        for rows in every:
            x = torch.randn(rows, q.shape[1], device=DEVICE).to(peer.dtype)
            calls = peer.calls(x)
            error = relative_error(calls[-1](), x, q)
            took = seconds(calls)
            figures = {"us": took * 1e6, "share": limit(q, rows, name) / took, "error": error}
            cases.append(about | {"rows": rows} | figures)
    except ImportError as problem:
        return [about | {"missing": f"not installed: {problem}"}]
    except Exception as problem:  # noqa: BLE001  (a peer may fail in any way; the others are still measured)
        cases.append(about | {"missing": f"{type(problem).__name__}: {str(problem)[:200]}"})
    return cases


def compare(
    peers: list[str], shapes: list, every: list[int], out_of_time: Callable[[], bool], schemes: list = SCHEMES
) -> list[Case]:
    """Every peer on every shape and scheme; those that compile for long come last."""
    cases: list[Case] = []
    for name, shape, scheme in itertools.product(peers, shapes, schemes):
        if name.startswith("cublas") and scheme != schemes[0]:
            continue  # its weights have 16 bits whatever the scheme
        found = measure(name, random_weight(*shape, *scheme), every, out_of_time)
        cases += found
        for case in found:
            figures = case.get("missing") or f"{case['us']:8.2f} us  {case['share']:.0%}  error {case['error']:.1e}"
            label = f"{name:12} {shape[0]:5} x {shape[1]:5}  w{scheme[0]}g{scheme[1]}"
            print(f"{label:40} rows {case.get('rows', '-'):>4}  {figures}", flush=True)
        if CUDA:
            torch.cuda.empty_cache()
    return cases


def check() -> list[str]:
    """Where the kernel is wrong: all that it claims, on ragged shapes too, against fp64."""
    wrong = []
    shapes = (200, 1100), (1040, 4096), (21, 201)
    grids = list(itertools.product((2, 3, 4, 8), (32, 64, 128, None), (True, False), shapes))
    layouts = [gemv_layout.Layout(b, g or gemv_layout.STEP, not sym, *shape) for b, g, sym, shape in grids]
    compile_ahead((layout, rows, None, bf16) for layout in layouts for rows in (1, 8, 16) for bf16 in (True, False))
    for bits, group, symmetric, shape in grids:
        q = random_weight(*shape, bits, group, symmetric)
        weight, exact = Packed.from_qtensor(q), q.dequantize().double()
        layout = gemv_layout.layout_of(weight)
        records = gemv_layout.write_records(weight, layout)
        torch.cuda.synchronize()
        for rows, dtype in itertools.product((1, 3, 8, 16), cuda_gemv.DTYPES):
            x = (torch.randn(rows, shape[1], device=DEVICE) * torch.logspace(-3, 2, rows, device=DEVICE)[:, None]).to(
                dtype
            )
            bias = torch.randn(shape[0], device=DEVICE).to(dtype)
            y = cuda_gemv.multiply(x, records, bias, layout)
            expected, size = x.double() @ exact.T + bias, x.double().abs() @ exact.abs().T + bias.abs()
            same = torch.equal(y, cuda_gemv.multiply(x, records, bias, layout))
            error = ((y.double() - expected).abs() / size).max().item()
            if not error <= (2**-8 if dtype == torch.bfloat16 else 2**-11) + 2**-16 or not same:
                wrong.append(f"w{bits} g{group} symmetric={symmetric} {shape} rows={rows} {dtype}: {error:.2e} {same=}")
    return wrong


def first_settings(columns: int) -> list[Settings]:
    """How a block may be cut."""
    if columns == 1:
        cuts = [(4, 4), (8, 2), (8, 3), (16, 1), (16, 2)]
        return [Settings(w, t, 4, b) for w, b in cuts for t in (1, 2, 4) if t <= w // 4 or t == 1]
    cuts = [(8, 1), (8, 2), (16, 1)]
    return [Settings(w, t, 3, b, 2, True) for w, b in cuts for t in (1, 2, 4, 8)]


def second_settings(best: Settings, columns: int) -> list[Settings]:
    """The rest, one by one."""
    others = [best._replace(tall=3 - best.tall), best._replace(overlap=False)]
    if columns > 1:
        others += [best._replace(apart=False), best._replace(apart=False, tall=1)]
    return others


def third_settings(best: Settings) -> list[Settings]:
    return [best._replace(stages=stages) for stages in (2, 3, 4, 6, 8) if stages != best.stages]


def tune(shapes: list, out_of_time: Callable[[], bool]) -> list[Case]:
    """The best settings for each (bits, columns, size), by the geometric mean over that size's shapes."""
    cases: list[Case] = []
    for columns, (bits, group) in itertools.product((8, 16, 1), [(2, 64), (3, 128), (4, 128), (8, 128)]):
        sizes: dict[str, list] = {}
        for shape in shapes:
            weight = Packed.from_qtensor(random_weight(*shape, bits, group))
            layout = gemv_layout.layout_of(weight)
            held = copies([gemv_layout.write_records(weight, layout)])
            x = torch.randn(columns, shape[1], device=DEVICE).bfloat16()
            sizes.setdefault(cuda_gemv.size_of(layout), []).append((layout, [part for (part,) in held], x))
        torch.cuda.synchronize()
        layouts = [layout for items in sizes.values() for layout, _, _ in items]
        compile_ahead((layout, columns, cut, True) for layout in layouts for cut in first_settings(columns))
        for size, items in sizes.items():
            if out_of_time():
                print("out of time before", bits, columns, size)
                return cases
            took = {settings: time_settings(items, settings) for settings in first_settings(columns)}
            for more in (partial(second_settings, columns=columns), third_settings):
                later = more(min(took, key=took.get))
                compile_ahead((layout, columns, cut, True) for layout, _, _ in items for cut in later)
                took |= {settings: time_settings(items, settings) for settings in later}
            ranked = sorted(took, key=took.get)
            print(f"    ({bits}, {columns}, {size!r}): {ranked[0]},  # {took[ranked[0]] * 1e6:.2f} us", flush=True)
            cases += [
                {"bits": bits, "columns": columns, "size": size, "settings": list(s), "us": took[s] * 1e6}
                for s in ranked
            ]
        del sizes
        torch.cuda.empty_cache()
    return cases


def compile_ahead(wanted: Iterable[tuple[gemv_layout.Layout, int, Settings | None, bool]]) -> None:
    """Compile kernels for (layout, rows, settings or the table's, bf16), in parallel."""
    card, needed = cuda_gemv.card_of(0), set()
    for layout, rows, settings, bf16 in wanted:
        settings = settings or cuda_gemv.settings_for(layout, rows, card.capability)
        launch = cuda_gemv.plan(layout, rows, card, settings)
        needed.add((layout[:3], bf16, launch[:3], card.capability))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: cuda_gemv._compiled(*key), needed))


def time_settings(items: list, settings: Settings) -> float:
    """Geometric mean over shapes of the seconds of one product; infinite if it fails or is wrong."""
    logs = []
    for layout, held, x in items:
        calls = [partial(cuda_gemv.multiply, x, part, None, layout, settings) for part in held]
        expected = cuda_gemv.multiply(x, held[0], None, layout)
        error = ((calls[0]() - expected).float().norm() / expected.float().norm()).item()
        if not error < 2**-8:
            print("WRONG", layout, settings, error)
            return math.inf
        logs.append(math.log(seconds(calls, replays=5)))
    return math.exp(sum(logs) / len(logs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", action="store_true", help="choose settings instead of comparing")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--peers", default=",".join(PEERS), help="which to compare")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x")
    parser.add_argument("--shapes", help="which out x in, as 28672x8192,8192x8192")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing after so long")
    chosen = parser.parse_args()
    shapes = [(128, 512), (80, 1024)] if chosen.tiny else SHAPES
    if chosen.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in chosen.shapes.split(",")]

    def out_of_time() -> bool:
        return time.perf_counter() - STARTED > chosen.seconds

    about = {"versions": versions(), "device": torch.cuda.get_device_name() if CUDA else "cpu", "tune": chosen.tune}
    result: Case = {"about": about}
    if chosen.tune:
        wrong = result["wrong"] = check()
        print(
            f"checked after {time.perf_counter() - STARTED:.0f} s; wrong: {len(wrong)}",
            *wrong[:20],
            sep="\n",
            flush=True,
        )
        result["cases"] = tune(shapes, out_of_time)
    else:
        rows = [int(count) for count in chosen.rows.split(",")]
        result["cases"] = compare(chosen.peers.split(","), shapes, rows, out_of_time)
    chosen.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"{time.perf_counter() - STARTED:.0f} s")
    if result.get("wrong"):
        raise SystemExit("the kernel is wrong")


if __name__ == "__main__":
    main()
