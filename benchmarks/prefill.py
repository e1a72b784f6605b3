"""Kernels of prefill on a GPU: are they right, how fast are they beside cuBLAS, and how is work best cut?

    python benchmarks/prefill.py OUT.json [--check] [--compare] [--tune] [--rows 32,256] [--seconds 540]
    python benchmarks/prefill.py OUT.json --compare --peers ours,passes,decoded,humming,cublas --rows 17,32,64,256,2048

--check holds the product against fp64 and dequantization against the codec, bit for bit, over bits, groups, grids with
and without zeros, scales of either sign, dtypes, ragged shapes and every way to cut work; results start as NaN, and
what is wrong is printed. --compare times them beside cuBLAS and other peers, as benchmarks/kernels.py does, which says
what a figure is; `decoded` is dequantization and cuBLAS, `dequantize` that alone. --tune times the ways to cut work
that the rule of `kernels.cuda_gemm` thinks well of, and prints how good its choice was and rows for TABLES. Without
any of these, all are done.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import kernels
from kernels import CUDA, DEVICE, Calls, Case, Peer, copies, random_weight, seconds
from planish.kernels import cuda_dequantize, cuda_gemm, gemv_layout, humming
from planish.kernels.cuda_gemm import Settings
from planish.kernels.cuda_gemv import DTYPES, card_of
from planish.kernels.gemv_layout import Layout
from planish.kernels.pack import Packed
from planish.log import versions
from planish.qtensor import QTensor

SHAPES = [(4096, 4096), (8192, 8192), (28672, 8192), (12288, 4096), (4096, 11008)]  # out x in
TINY = [(128, 512), (256, 1024)]
SCHEMES = [(2, 64), (2, 128), (3, 128), (4, 128), (8, 128)]
ROWS = [32, 64, 256, 2048]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUMMED = 2**-16  # of |x| |W|^T: what sums in fp32 may be off
CHECKED = (304, 1104), (520, 2048), (136, 264), (1, 32), (77, 4096)
WORTH = 1.5  # ways to cut work that the rule thinks so many times slower than its choice aren't timed


def records_of(q: QTensor) -> tuple[Tensor, Layout]:
    weight = Packed.from_qtensor(q)
    layout = gemv_layout.layout_of(weight)
    records = gemv_layout.write_records(weight, layout)
    settle()
    return records, layout


def settle() -> None:
    """Kernels that overlap read records before kernels ahead of them have ended."""
    if CUDA:
        torch.cuda.synchronize()


def forced(q: QTensor, way: str) -> Peer:
    """Ours by a way of `kernels.cuda_gemm`."""
    records, layout = records_of(q)
    held = copies([records])
    product = partial(cuda_gemm.product, way=way) if CUDA else defined
    settle()
    return Peer(lambda x: [partial(product, x, part, None, layout) for (part,) in held])


def defined(x: Tensor, records: Tensor, bias: None, layout: Layout) -> Tensor:
    return cuda_gemm.packed_gemm(x, records, bias, *layout)


def humming_op(q: QTensor) -> Peer:
    if CUDA and not humming.installed():
        raise ImportError("humming")
    records, layout = records_of(q)
    if CUDA:
        laid = humming.lay_out(records, layout, torch.float16)
    else:
        made = humming.parts(records, layout, torch.float16)
        laid = humming.Laid(made["weight"], made["weight_scale"], made.get("zero_point"))
    held = copies(laid)
    settle()

    def calls(x: Tensor) -> Calls:
        return [partial(humming.humming_gemm, x, records, *part, None, *layout) for part in held]

    return Peer(calls)


def cublas_bf16(q: QTensor) -> Peer:
    held = copies([q.dequantize(torch.bfloat16)])
    return Peer(lambda x: [partial(functional.linear, x, weight) for (weight,) in held], torch.bfloat16)


PEERS = {
    "ours-bf16": partial(kernels.ours, dtype=torch.bfloat16),
    "cublas-bf16": cublas_bf16,
    "decoded": partial(forced, way="decoded"),
    "passes": partial(forced, way="passes"),
    "humming": humming_op,
    "humming-stream-k": kernels.humming,
}


def compile_ahead(wanted: set) -> None:
    """Kernels of (layout, rows, settings, bf16), in parallel."""
    plans = [(layout, cuda_gemm.plan(layout, rows, card_of(0), cut), bf16) for layout, rows, cut, bf16 in wanted]
    keys = {(layout[:3], bf16, plan.settings, plan.records) for layout, plan, bf16 in plans}
    started = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: cuda_gemm._compiled(*key), keys))
    print(f"compiled {len(keys)} kernels in {time.perf_counter() - started:.0f} s", flush=True)


def compile_humming(shapes: list, every: list[int]) -> None:
    """Humming's kernels within our op, in parallel."""
    layouts = [Layout(bits, group, True, *shape) for shape, (bits, group) in itertools.product(shapes, SCHEMES)]
    wanted = list(itertools.product(layouts, {cuda_gemm.rows_of(rows) for rows in every}))
    started = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: humming.compiled(key[0], torch.float16, key[1], 0), wanted))
    print(f"compiled {len(wanted)} of Humming's kernels in {time.perf_counter() - started:.0f} s", flush=True)


def those_chosen(shapes: list, every: list[int]) -> Iterator[tuple]:
    """What `kernels.cuda_gemm.product` will take."""
    for shape, (bits, group), rows, bf16 in itertools.product(shapes, SCHEMES, every, (False, True)):
        layout = Layout(bits, group, True, *shape)
        settings = cuda_gemm.choose(layout, rows, card_of(0))
        if settings is not None:
            yield layout, rows, settings, bf16


def signed_weight(shape: tuple[int, int], bits: int, group: int | None, symmetric: bool) -> QTensor:
    q = random_weight(*shape, bits, group, symmetric)
    signs = 1 - 2 * torch.randint(0, 2, q.scale.shape, device=q.scale.device)
    return dataclasses.replace(q, scale=(q.scale * signs).half())


def what_is_wrong(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> str:
    """Empty if y is x W^T + b as near as fp32 sums are."""
    expected, size = x.double() @ weight.T + bias, x.double().abs() @ weight.abs().T + bias.abs()
    off = (y.double() - expected).abs()
    wrong = ~(off <= ROUNDING[y.dtype] * expected.abs() + SUMMED * size)
    if not wrong.any():
        return ""
    rows, outputs = wrong.any(1).nonzero().flatten().tolist(), wrong.any(0).nonzero().flatten().tolist()
    m, n = wrong.nonzero()[0].tolist()
    return (
        f"{wrong.sum().item()} of {wrong.numel()} ({y.isnan().sum().item()} NaN), rows {rows[:3]}..{rows[-1]}, "
        f"outputs {outputs[:3]}..{outputs[-1]}; [{m}, {n}] is {y[m, n].item():.5g}, not {expected[m, n].item():.5g}"
    )


def cases_to_check() -> list[tuple]:
    """(bits, group, symmetric, dtype, shape, rows, settings): each way to cut work with each kind of weight's bits."""
    ways = list(cuda_gemm.candidates())
    grids = itertools.product((2, 3, 4, 8), (32, 64, 128, None), (True, False), DTYPES)
    cases = []
    for number, grid in enumerate(grids):
        for turn in range(3):
            settings = ways[(5 * number + turn * 7) % len(ways)]
            shape = CHECKED[(number + turn) % len(CHECKED)]
            cases.append((*grid, shape, (17, 130, 300)[(number + turn) % 3], settings))
    return cases


def check(out_of_time: Callable[[], bool]) -> list[str]:
    """What is wrong."""
    wrong, cases = [], cases_to_check()
    layouts = [Layout(b, g or gemv_layout.STEP, not sym, *shape) for b, g, sym, _, shape, _, _ in cases]
    compile_ahead({(layout, c[5], c[6], c[3] == torch.bfloat16) for layout, c in zip(layouts, cases, strict=True)})
    for bits, group, symmetric, dtype, shape, rows, settings in cases:
        if out_of_time():
            return [*wrong, "out of time"]
        q = signed_weight(shape, bits, group, symmetric)
        records, layout = records_of(q)
        weight = q.dequantize(dtype)
        about = f"w{bits} g{group} symmetric={symmetric} {dtype} {shape} rows={rows} {settings}"
        if not torch.equal(cuda_dequantize.dequantize(records, layout, dtype), weight):
            wrong.append(f"dequantize {about}")
            print(wrong[-1], flush=True)
        x = torch.randn(rows, shape[1], device=DEVICE) * torch.logspace(-2, 2, rows, device=DEVICE)[:, None]
        x, bias = x.to(dtype), torch.randn(shape[0], device=DEVICE).to(dtype)
        found = []
        for _ in range(2):
            torch.full((rows, shape[0]), float("nan"), dtype=dtype, device=DEVICE)  # what the allocator gives next
            found.append(cuda_gemm.multiply(x, records, bias, layout, settings))
        torch.cuda.synchronize()
        problem = what_is_wrong(found[0], x, weight.double(), bias.double())
        if problem or not torch.equal(*found):
            wrong.append(f"gemm {about}: {problem or 'not the same again'}")
            print(wrong[-1], flush=True)
    return wrong


def tune(shapes: list, every: list[int], out_of_time: Callable[[], bool]) -> list[Case]:
    """Times of the ways to cut work that are worth it, in bf16."""
    cases: list[Case] = []
    for (bits, group), shape in itertools.product([(4, 128), (2, 64), (3, 128), (8, 128)], shapes):
        records, layout = records_of(random_weight(*shape, bits, group))
        held = [part for (part,) in copies([records])]
        ways = {rows: ways_worth_it(layout, rows) for rows in every}
        compile_ahead({(layout, rows, cut, True) for rows in every for cut in ways[rows]})
        for rows in every:
            if out_of_time():
                print("out of time before", bits, shape, rows)
                return cases
            x = torch.randn(rows, shape[1], device=DEVICE).bfloat16()
            took = {cut: time_of(x, held, layout, cut) for cut in ways[rows]}
            ranked = sorted(took, key=took.get)
            ratio = took[ways[rows][0]] / took[ranked[0]]
            best = ", ".join(f"{tuple(cut)} {took[cut] * 1e6:.1f}" for cut in ranked[:4])
            print(f"    ({bits}, {rows}, {shape[0]}, {shape[1]}): {best}; the rule's {ratio:.2f}", flush=True)
            about = {"bits": bits, "group": group, "rows": rows, "shape": shape}
            cases += [about | {"settings": list(cut), "us": took[cut] * 1e6} for cut in ranked]
        torch.cuda.empty_cache()
    return cases


def ways_worth_it(layout: Layout, rows: int) -> list[Settings]:
    """The rule's choice first, with other numbers of stages too."""

    def cost(settings: Settings) -> float:
        return cuda_gemm.clocks(layout, rows, card_of(0), settings)

    ways = sorted(cuda_gemm.candidates(), key=cost)
    ways = [cut for cut in ways if cost(cut) <= WORTH * cost(ways[0])]
    others = [ways[0]._replace(stages=stages) for stages in (3, 4, 5, 6, 8)]
    return list(dict.fromkeys([*ways, *others]))


def time_of(x: Tensor, held: list[Tensor], layout: Layout, settings: Settings) -> float:
    calls = [partial(cuda_gemm.multiply, x, part, None, layout, settings) for part in held]
    return seconds(calls, replays=5)


def time_dequantize(shapes: list, out_of_time: Callable[[], bool]) -> list[Case]:
    """And the share of a copy's bandwidth, by what is written."""
    cases: list[Case] = []
    for shape, (bits, group) in itertools.product(shapes, SCHEMES):
        if out_of_time():
            break
        records, layout = records_of(random_weight(*shape, bits, group))
        calls = [partial(cuda_dequantize.dequantize, part, layout, torch.bfloat16) for (part,) in copies([records])]
        took = seconds(calls)
        rate = (2 * shape[0] * shape[1] + records.nbytes) / took / 1e12
        print(f"dequantize {shape[0]} x {shape[1]} w{bits}g{group} {took * 1e6:.1f} us {rate:.2f} TB/s", flush=True)
        cases.append({"peer": "dequantize", "shape": shape, "bits": bits, "group": group, "us": took * 1e6})
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("check", "compare", "tune"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="rows of x")
    parser.add_argument("--peers", default="cublas,cublas-bf16,ours,ours-bf16,decoded", help="which to compare")
    parser.add_argument("--tiny", action="store_true", help="compare small shapes")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing after so long")
    chosen = parser.parse_args()
    every = not (chosen.check or chosen.compare or chosen.tune or chosen.tiny)
    rows, peers = [int(count) for count in chosen.rows.split(",")], chosen.peers.split(",")
    shapes, started = TINY if chosen.tiny else SHAPES[: chosen.shapes], time.perf_counter()
    result: Case = {"about": {"versions": versions(), "device": torch.cuda.get_device_name() if CUDA else "cpu"}}
    kernels.PEERS.update(PEERS)

    def out_of_time() -> bool:
        return time.perf_counter() - started > chosen.seconds

    if chosen.check or every:
        result["wrong"] = wrong = check(out_of_time)
        print(f"checked after {time.perf_counter() - started:.0f} s; wrong: {len(wrong)}", flush=True)
    if chosen.compare or chosen.tiny or every:
        if CUDA:
            compile_ahead(set(those_chosen(shapes, rows)))
        if CUDA and "humming" in peers and humming.installed():
            compile_humming(shapes, rows)
        result["cases"] = kernels.compare(peers, shapes, rows, out_of_time, SCHEMES)
        result["dequantize"] = time_dequantize(shapes, out_of_time) if CUDA else []
    if chosen.tune or every:
        result["tuned"] = tune(shapes, rows, out_of_time)
    chosen.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"{time.perf_counter() - started:.0f} s")
    if result.get("wrong"):
        raise SystemExit("a kernel is wrong")


if __name__ == "__main__":
    main()
