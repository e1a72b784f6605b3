"""Bits by layer against one width for all: perplexity by bits a weight, scales and zero points counted.

    python benchmarks/bits.py OUT.json MODEL WIKITEXT2 [--recipe rtn search=true] [--schemes w2g64,w2.5g64,...]
        [--windows 128] [--seqlen 2048] [--limit N] [--tiny]

By default the uniform schemes w2g64, w2g128, w3g64, w3g128, w4g128 and the averages w2.25g64, w2.5g64, w3.0g64 and
w3.5g128. Calibration is WikiText-2's training text, and perplexity is on its validation text, as benchmarks/compare.py
takes both. The last column says how a mixture compares with the straight line, in log perplexity, between the uniform
schemes next to it: below 0 it is better than what a model of either width, or a part of each, would give.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from compare import detokenised, windows
from transformers import AutoTokenizer

import planish
from planish.data import join_rows
from planish.folder import schemes_of
from planish.log import versions

SCHEMES = "w2g64,w2g128,w3g64,w3g128,w4g128,w2.25g64,w2.5g64,w3.0g64,w3.5g128"


def bits_of(model: Any) -> float:
    """Stored bits a weight of the quantized linears."""
    parts = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
    bits = weights = 0.0
    for name, scheme in schemes_of(model).items():
        if scheme is not None:
            count = parts[name].out_features * parts[name].in_features
            bits, weights = bits + count * scheme.bits_per_weight(parts[name].in_features), weights + count
    return bits / weights


def against_line(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Log perplexity above (+) or below (-) the line between the uniform neighbours; None at an end."""
    uniform = sorted((other["bits"], math.log(other["valid"])) for other in rows if "." not in other["scheme"])
    below = [point for point in uniform if point[0] <= row["bits"]]
    above = [point for point in uniform if point[0] >= row["bits"]]
    if "." not in row["scheme"] or not below or not above:
        return None
    (x0, y0), (x1, y1) = below[-1], above[0]
    line = y0 if x1 == x0 else y0 + (y1 - y0) * (row["bits"] - x0) / (x1 - x0)
    return round(math.log(row["valid"]) - line, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", nargs="+", default=["rtn", "search=true"], help="and its keys, preset= among them")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--windows", type=int, default=128, help="of calibration")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--limit", type=int, help="windows of the validation text")
    parser.add_argument("--tiny", action="store_true", help="a dry run")
    args = parser.parse_args()
    samples, seqlen, limit = (8, 64, 1) if args.tiny else (args.windows, args.seqlen, args.limit)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def read(name: str) -> str:
        return join_rows((args.data / name).read_text(encoding="utf-8"))

    train, valid = (
        torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in (read("wiki.train.part.raw"), detokenised(read("wiki.valid.tokens")))
    )
    recipe, keys = args.recipe[0], dict(pair.split("=") for pair in args.recipe[1:])
    rows: list[dict[str, Any]] = []
    for scheme in args.schemes.split(","):
        start = time.perf_counter()
        about = {"data": windows([train], samples, seqlen, 0), "samples": samples, "seqlen": seqlen}
        model = planish.quantize(args.model, recipe, scheme, **about, **keys)
        row = {"scheme": scheme, "bits": round(bits_of(model), 4), "seconds": round(time.perf_counter() - start, 1)}
        row["valid"] = round(planish.perplexity(model, valid, seqlen=seqlen, limit=limit), 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
        report = {
            "recipe": args.recipe, "windows": samples, "seqlen": seqlen, "limit": limit, "versions": versions(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "rows": [other | {"against_line": against_line(other, rows)} for other in rows],
        }  # fmt: skip
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    for other in sorted(report["rows"], key=lambda one: one["bits"]):
        figures = f"{other['bits']:.3f} bits  perplexity {other['valid']:9.3f}  {other['against_line']}"
        print(f"{other['scheme']:12} {figures}")


if __name__ == "__main__":
    main()
