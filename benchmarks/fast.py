"""The preset `fast` beside other toolkits that don't train either: seconds and perplexity of rounding alone.

    python benchmarks/fast.py OUT.json MODEL WIKITEXT2 [--schemes w4g128,w3g128,w2g64] [--peers hqq,auto-round]
        [--device cuda] [--limit WINDOWS]

Peers: HQQ's optimised rounding (no data), and AutoRound with no iterations, its "opt-RTN", symmetric as ours, given 64
windows of 512 tokens of WIKITEXT2's wiki.train.part.raw. `fast` takes 16 windows of 512 of the text that Python
carries. Perplexity is that of wiki.test.raw, windows of 2048, the first --limit of them if given. Seconds are from the
model's folder to the quantized model in memory, imports aside. Peers are imported only if asked for; rows are written
as they come.
"""

import argparse
import datetime
import importlib
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import beside
import torch
from compare import tokens_of, windows
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import planish
from planish.data import join_rows
from planish.log import versions
from planish.scheme import Scheme


def ours(args: argparse.Namespace, scheme: Scheme) -> PreTrainedModel:
    return planish.quantize(args.model, "planish", str(scheme), preset="fast", device=args.device)


def hqq(args: argparse.Namespace, scheme: Scheme) -> PreTrainedModel:
    from hqq.core.quantize import Quantizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(args.device)
    for linear in (part for part in model.model.layers.modules() if isinstance(part, torch.nn.Linear)):
        found = Quantizer.quantize(
            linear.weight.data.float(), nbits=scheme.bits, channel_wise=True, group_size=scheme.group_size, axis=1,
            optimize=True, round_zero=scheme.bits == 4, bitpack=False, compute_dtype=torch.float32, device=args.device,
        )  # fmt: skip
        linear.weight.data.copy_(Quantizer.dequantize(*found).reshape(linear.weight.shape))
    return model


def auto_round(args: argparse.Namespace, scheme: Scheme) -> PreTrainedModel:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = join_rows((args.data / "wiki.train.part.raw").read_text(encoding="utf-8"))
    return beside.auto_round(args.model, scheme, windows([tokens_of(tokenizer, text)], 64, 512, 0), 0, args.device)


PEERS = {"planish": ours, "hqq": hqq, "auto-round": auto_round}
IMPORTS = {"planish": "planish.api", "hqq": "hqq.core.quantize", "auto-round": "auto_round"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--schemes", default="w4g128,w3g128,w2g64")
    parser.add_argument("--peers", default="", help=f"besides planish, of {', '.join(PEERS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    peers = args.peers.split(",") if args.peers else []
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = join_rows((args.data / "wiki.test.raw").read_text(encoding="utf-8"))
    test = tokens_of(tokenizer, text)
    report: dict[str, Any] = {
        "command": f"python benchmarks/fast.py OUT.json MODEL WIKITEXT2 --schemes {args.schemes} --peers {args.peers}"
        + (f" --limit {args.limit}" if args.limit else ""),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": versions() | {name: metadata.version(name) for name in peers},
        "rows": [],
    }
    for name in ["planish", *peers]:
        importlib.import_module(IMPORTS[name])
    for scheme in map(Scheme.parse, args.schemes.split(",")):
        for name in ["planish", *peers]:
            start = time.perf_counter()
            model = PEERS[name](args, scheme)
            row: dict[str, Any] = {"who": name, "scheme": str(scheme), "seconds": round(time.perf_counter() - start, 1)}
            row["test"] = round(planish.perplexity(model.eval(), test, seqlen=2048, limit=args.limit), 3)
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
