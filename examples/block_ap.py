"""Block-AP on a CPU: SmolLM2-135M-Instruct at 2 bits, beside rounding to nearest with a searched range.

    python examples/block_ap.py models/smollm2 [--out out/block_ap] [--samples 32] [--seqlen 512] [--steps 8]

Both look for the grid (w2g64asym) that loses least on the calibration windows: docstrings of Python's standard
library. Block-AP goes on from there and trains W, s and z, three blocks at a time. Perplexity is on the language
reference that Python carries, which shares no passage with the docstrings. The steps are few, so that two cores need
minutes; a GPU, more text and the defaults do better. Everything here is public API.
"""

import argparse
import time
from pathlib import Path

import torch

import planish
from planish.log import Event

SCHEME = "w2g64asym"
# windows a step, and windows held out: small, since there are few
BATCH, HOLDOUT = 4, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/block_ap"))
    parser.add_argument("--samples", type=int, default=32, help="windows of the calibration text")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps for every three blocks")
    parser.add_argument("--windows", type=int, default=8, help="windows of the perplexity")
    args = parser.parse_args()
    data = {"samples": args.samples, "seqlen": args.seqlen}
    fit = {"steps": args.steps, "batch_size": BATCH, "holdout": HOLDOUT}
    rows = [("16-bit", args.model, 0.0)]
    for recipe, keys in (("rtn", {"search": True}), ("block_ap", fit)):
        folder = args.out / recipe
        print(f"{SCHEME} {recipe} -> {folder}", flush=True)
        start = time.perf_counter()
        planish.quantize_to(args.model, folder, recipe, SCHEME, overwrite=True, progress=show, **data, **keys)
        rows.append((f"{SCHEME} {recipe}", folder, time.perf_counter() - start))
    print(f"\n{'':20}{'perplexity':>12}{'seconds':>10}")
    for name, folder, seconds in rows:
        print(f"{name:20}{perplexity(folder, args.seqlen, args.windows):>12.4g}{seconds:>10.0f}", flush=True)
    print(f"Perplexity on {args.windows} windows of {args.seqlen} tokens of Python's language reference.")


def show(event: Event) -> None:
    """Held-out loss of each span of a fit, before and after."""
    if event.before is not None and event.after is not None:
        print(
            f"    block {event.index}/{event.total}  loss {event.before:.3e} -> {event.after:.3e}  "
            f"{event.seconds:.0f} s",
            flush=True,
        )


def perplexity(folder: Path, seqlen: int, windows: int) -> float:
    """In float32, which every CPU computes at full speed."""
    model = planish.load(folder, dtype=torch.float32)
    return planish.perplexity(model, "embedded-eval", seqlen=seqlen, limit=windows)


if __name__ == "__main__":
    main()
