"""A model's own text as a file, which mixes of benchmarks/compare.py may take a share of.

    python benchmarks/own.py FILE.jsonl MODEL [--windows 512] [--seqlen 2048] [--at-once 256] [--seed 0]

What `--data self` has the model write anew in each run is so written once: a document a window, its tokens as text.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from planish import own_text
from planish.source import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--at-once", type=int, default=own_text.MOST, help="windows written at once, where they fit")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    own_text.MOST = args.at_once
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_source(args.model)
    tokenizer = source.tokenizer()
    start = time.perf_counter()
    ids = own_text.own_windows(
        source, tokenizer, args.windows, args.seqlen, device=device, dtype=torch.bfloat16, seed=args.seed,
        progress=lambda event: print(event.note, flush=True),
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        for row in ids:
            file.write(json.dumps({"text": tokenizer.decode(row, skip_special_tokens=True)}) + "\n")
    print(f"{len(ids)} windows, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
