"""Integer products on a GPU: are they right, and how fast are they beside cuBLAS?

    python benchmarks/int8.py OUT.json [--tune] [--seconds 300]

First kernels are held against the definition (kernels/int8.py), bit for bit: tokens of 4 to 8 bits, ragged shapes,
scales of both signs, zeros on either side, and every way to cut work. Then times, as benchmarks/kernels.py takes them:
`ours` is the whole product, activations rounded on the way, `multiply` and `tokens` its two kernels alone;
`cublas` the product of 16-bit numbers; `int_mm` torch._int_mm alone, to int32; `defined` that with activations rounded
and sums scaled in torch. --tune times every way to cut work that the rule thinks within twice its choice, and prints
how good that was and rows for TABLES.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from kernels import DEVICE, Case, copies, random_weight, seconds
from planish.kernels import cuda_gemm, cuda_int8, int8
from planish.kernels.cuda_gemm import Settings
from planish.kernels.cuda_gemv import DTYPES, card_of
from planish.kernels.gemv_layout import STEP, Layout
from planish.kernels.pack import Packed
from planish.log import versions

SHAPES = [(8192, 8192), (4096, 4096)]  # out x in
ROWS = [16, 256, 2048, 4096]
# weight's bits as they are held, token's bits, tokens symmetric; the third is w6a6
SCHEMES = [(8, 8, True), (4, 8, False), (8, 6, False), (4, 4, False)]
CHECKED = [(304, 1104), (520, 2048), (136, 265), (1, 33), (77, 4096)]
WORTH = 2.0
STARTED = time.perf_counter()


def weight_of(shape: tuple[int, int], bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Records, plain codes, and lines, scales of both signs."""
    q = random_weight(*shape, bits, None, symmetric)
    signs = 1 - 2 * torch.randint(0, 2, q.scale.shape, device=DEVICE)
    q = dataclasses.replace(q, scale=(q.scale * signs).half())
    cache: dict[str, Tensor] = {}
    int8.prepare(Packed.from_qtensor(q), cache)
    middle = 2 ** (bits - 1)
    return cache["int8"], (q.codes.int() - middle).to(torch.int8), cache["int8_lines"]


def compile_ahead(wanted: set[tuple[Layout, int, Settings, bool]]) -> None:
    """Kernels of (layout, rows, settings, bf16), in parallel."""
    keys = set()
    for layout, rows, settings, bf16 in wanted:
        plan = cuda_gemm.plan(layout, rows, card_of(0), settings)
        keys.add((layout.bits, bf16, plan.settings, plan.records))
    started = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: cuda_int8._compiled(*key), keys))
    print(f"compiled {len(keys)} kernels in {time.perf_counter() - started:.0f} s", flush=True)


def check() -> list[str]:
    """What is wrong."""
    wrong, cases = [], []
    kinds = itertools.product((4, 8), (True, False), DTYPES, range(4, 9), (True, False))
    ways = list(cuda_gemm.candidates())
    for number, kind in enumerate(kinds):
        for turn in range(2):
            shape, rows = CHECKED[(number + turn) % len(CHECKED)], (1, 17, 130, 300)[(number // 5 + turn) % 4]
            cases.append((*kind, shape, rows, ways[(3 * number + turn) % len(ways)]))
    compile_ahead({(Layout(c[0], STEP, False, *c[5]), c[6], c[7], c[2] == torch.bfloat16) for c in cases})
    for case in cases:
        problem = what_is_wrong(*case)
        if problem:
            wrong.append(f"{case}: {problem}")
            print(wrong[-1], flush=True)
    return wrong


def what_is_wrong(
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    token_bits: int,
    even: bool,
    shape: tuple[int, int],
    rows: int,
    settings: Settings,
) -> str:
    """Empty if the kernels give the definition's bits, twice."""
    records, plain, lines = weight_of(shape, bits, symmetric)
    x = torch.randn(rows, shape[1], device=DEVICE) * torch.logspace(-3, 1, rows, device=DEVICE)[:, None]
    x[::3] = x[::3].abs()
    x, bias = x.to(dtype), torch.randn(shape[0], device=DEVICE).to(dtype)
    expected = int8.defined(x, plain, lines, bias, shape[1], token_bits, even)
    for _ in range(2):
        torch.full((rows, shape[0]), float("nan"), dtype=dtype, device=DEVICE)  # what the allocator gives next
        y = cuda_int8.product(x, records, lines, bias, shape[1], token_bits, even, settings)
        if not torch.equal(y, expected):
            off = (y != expected).nonzero()
            m, n = off[0].tolist()
            return (
                f"{len(off)} of {y.numel()} ({y.isnan().sum().item()} NaN), the first [{m}, {n}] is "
                f"{y[m, n].item():.6g}, not {expected[m, n].item():.6g}; {about_tokens(x, bits, token_bits, even)}"
            )
    return ""


def about_tokens(x: Tensor, bits: int, token_bits: int, even: bool) -> str:
    """Which of what the kernel that rounds them gives are right."""
    lines = cuda_int8.round_tokens(x, bits, token_bits, even)[1]
    found = lines[:, 0].contiguous().view(torch.float32), lines[:, 1], lines[:, 2]
    expected = int8.round_tokens(x, token_bits, even)[1:]
    same = [torch.equal(one, other.view(-1)) for one, other in zip(found, expected, strict=True)]
    return f"scales, zeros, sums of tokens are right: {same}"


def peers(
    shape: tuple[int, int], bits: int, token_bits: int, even: bool
) -> dict[str, Callable[[Tensor], list[Callable[[], Tensor]]]]:
    """Calls of a product for x, by name, one for each copy of the weight."""
    records, plain, lines = weight_of(shape, bits, True)
    held, wide = [part for (part,) in copies([records])], [part for (part,) in copies([plain])]
    layout = cuda_int8.layout_of(records, *shape)
    torch.cuda.synchronize()  # kernels that overlap read records before they wait

    def multiply(x: Tensor) -> list[Callable[[], Tensor]]:
        settings = cuda_int8.choose(layout, len(x), card_of(0))
        given = cuda_int8.round_tokens(x, bits, token_bits, even)
        return [partial(cuda_int8.multiply, *given, part, lines, None, layout, settings, x.dtype) for part in held]

    def bare(x: Tensor) -> list[Callable[[], Tensor]]:
        codes = functional.pad(int8.round_tokens(x, token_bits, even).codes, (0, 0, 0, max(0, int8.FEWEST - len(x))))
        return [partial(torch._int_mm, codes, part.T) for part in wide]

    others = shape[1], token_bits, even
    return {
        "ours": lambda x: [partial(cuda_int8.product, x, part, lines, None, *others) for part in held],
        "multiply": multiply,
        "tokens": lambda x: [partial(cuda_int8.round_tokens, x, bits, token_bits, even)] * 20,
        "int_mm": bare,
        "defined": lambda x: [partial(int8.defined, x, part, lines, None, *others) for part in wide],
    }


def compare(out_of_time: Callable[[], bool]) -> list[Case]:
    """Times, and how many times as fast as cuBLAS on 16-bit numbers."""
    cases: list[Case] = []
    layouts = [Layout(bits, STEP, False, *shape) for bits in (4, 8) for shape in SHAPES]
    chosen = {(each, rows, cuda_int8.choose(each, rows, card_of(0)), True) for each in layouts for rows in ROWS}
    compile_ahead(chosen)
    for shape in SHAPES:
        dense = [part for (part,) in copies([torch.randn(shape, device=DEVICE).bfloat16() * 0.02])]
        x_of = {rows: torch.randn(rows, shape[1], device=DEVICE).bfloat16() for rows in ROWS}
        base = {rows: seconds([partial(functional.linear, x, part) for part in dense]) for rows, x in x_of.items()}
        cases += [{"peer": "cublas", "shape": shape, "rows": rows, "us": took * 1e6} for rows, took in base.items()]
        for scheme in SCHEMES:
            for name, calls in peers(shape, *scheme).items():
                if out_of_time() or (name in ("int_mm", "defined") and scheme != SCHEMES[0]):
                    continue  # the same whatever the bits
                took = {rows: seconds(calls(x)) for rows, x in x_of.items()}
                label = f"w{scheme[0]}a{scheme[1]}{'s' * scheme[2]} {name}"
                about = {"peer": name, "scheme": scheme, "shape": shape}
                cases += [about | {"rows": m, "us": t * 1e6, "times": base[m] / t} for m, t in took.items()]
                each = "   ".join(f"{m}: {t * 1e6:7.1f} us {base[m] / t:4.2f}x" for m, t in took.items())
                print(f"{shape[0]} x {shape[1]}  {label:16} {each}", flush=True)
        each = "   ".join(f"{m}: {t * 1e6:7.1f} us" for m, t in base.items())
        print(f"{shape[0]} x {shape[1]}  cublas bf16      {each}", flush=True)
        torch.cuda.empty_cache()
    return cases


def tune(out_of_time: Callable[[], bool]) -> list[Case]:
    """Times of the ways to cut work that are worth it; tokens are rounded before."""
    cases: list[Case] = []
    for shape, bits in itertools.product(SHAPES, (8, 4)):
        records, _, lines = weight_of(shape, bits, True)
        held, layout = [part for (part,) in copies([records])], cuda_int8.layout_of(records, *shape)
        ways = {rows: ways_worth_it(layout, rows) for rows in ROWS}
        compile_ahead({(layout, rows, cut, True) for rows in ROWS for cut in ways[rows]})
        for rows in ROWS:
            if out_of_time():
                return cases
            given = cuda_int8.round_tokens(torch.randn(rows, shape[1], device=DEVICE).bfloat16(), bits, 8, True)
            others = lines, None, layout

            def time_of(cut: Settings, given=given, others=others, held=held) -> float:
                calls = [partial(cuda_int8.multiply, *given, part, *others, cut, torch.bfloat16) for part in held]
                return seconds(calls, replays=5)

            took = {cut: time_of(cut) for cut in ways[rows]}
            ranked = sorted(took, key=took.get)
            best = ", ".join(f"{tuple(cut)} {took[cut] * 1e6:.1f}" for cut in ranked[:4])
            ratio = took[ways[rows][0]] / took[ranked[0]]
            key = bits, cuda_gemm.rows_of(rows), *shape
            print(f"    {key} rows {rows}: {best}; the rule's {ratio:.2f}", flush=True)
            about = {"bits": bits, "rows": rows, "shape": shape}
            cases += [about | {"settings": list(cut), "us": took[cut] * 1e6} for cut in ranked]
    return cases


def ways_worth_it(layout: Layout, rows: int) -> list[Settings]:
    """The choice first, with other numbers of stages too."""
    first = cuda_int8.choose(layout, rows, card_of(0))
    cost = partial(cuda_int8.clocks, layout, rows, card_of(0))
    ways = [cut for cut in sorted(cuda_gemm.candidates(), key=cost) if cost(cut) <= WORTH * cost(first)]
    others = [first._replace(stages=stages) for stages in (3, 4, 6)]
    return list(dict.fromkeys([first, *ways, *others]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=300, help="start nothing after so long")
    chosen = parser.parse_args()
    result: Case = {"about": {"versions": versions(), "device": torch.cuda.get_device_name()}}

    def out_of_time() -> bool:
        return time.perf_counter() - STARTED > chosen.seconds

    result["wrong"] = wrong = check()
    print(f"checked after {time.perf_counter() - STARTED:.0f} s; wrong: {len(wrong)}", flush=True)
    result["cases"] = compare(out_of_time)
    if chosen.tune:
        result["tuned"] = tune(out_of_time)
    chosen.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(f"{time.perf_counter() - STARTED:.0f} s")
    if wrong:
        raise SystemExit("a kernel is wrong")


if __name__ == "__main__":
    main()
