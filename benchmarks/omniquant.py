"""OmniQuant and what goes with it: quality on SmolLM2, time and memory of large blocks.

    python benchmarks/omniquant.py OUT.json MODEL WIKITEXT2 --parts PART[,PART] [--settings S ...] [--keep DIR] [--tiny]

clip, let     weights only: perplexity on validation and test text after calibration on the same 128 windows as every
              peer, ranges clipped alone at equal tokens and epochs, and with channels scaled too.
w6a6, w4a4    activations rounded too, beside RTN, SmoothQuant and rotation alone; `more` has variations.
batches       the same epochs in steps of 1 to 16 samples.
tasks         the mean of seven zero-shot tasks (--tasks DIR) of each model that was kept by --keep.
blocks        one block of Llama-2-7B and of Llama-2-70B shape: seconds of the fit at 128 x 2048 tokens and 20 epochs,
              scaled from a long and a short fit, and its peak memory; and the loop written plainly in PyTorch, one
              sample a step, of which ten steps are timed.

Each setting prints a line of JSON as it is done, and each span of blocks one on stderr, so that a run that is cut off
has told something. --settings takes some of a part's settings, or others. --tiny is a dry run on a CPU.
"""

import argparse
import datetime
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import block_ap
import torch
import zero_shot
from smollm2 import SEQLEN, random_windows, read
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer

import planish
from planish.log import Event, versions

# recipe:scheme[:key=value,...]; layers as REGEX=SCHEME behind a @
SCHEMES = ("w4g128asym", "w3g128asym", "w2g128asym", "w2g64asym")
SETTINGS = {
    "clip": [
        "16-bit",
        *[f"omniquant:{scheme}:let=false" for scheme in SCHEMES],
        *[f"omniquant:{scheme}:let=false,augment=true" for scheme in ("w2g128asym", "w2g64asym")],
        "omniquant:w3g128asym:preset=w3a16",
        "omniquant:w2g64asym:preset=w2a16,epochs=20",
    ],
    "let": [f"omniquant:{scheme}:let={let}" for scheme in SCHEMES for let in ("false", "true")],
    "w6a6": ["16-bit", *[f"{recipe}:w6a6asym" for recipe in ("rtn", "smoothquant", "omniquant", "rotate+omniquant")]],
    "w4a4": [
        "16-bit",
        *[f"{recipe}:w4a4asym" for recipe in ("rtn", "smoothquant", "rotate+rtn", "omniquant", "rotate+omniquant")],
        "rotate+rtn:w4a4asym@down_proj=w4a4hasym",
        "rotate+omniquant:w4a4asym@down_proj=w4a4hasym",
    ],
    "more": [
        "smoothquant:w4a4asym@down_proj=w4a4hasym",
        "omniquant:w4a4asym@down_proj=w4a4hasym",
        "omniquant:w4a4asym:alpha=0.5",
        "omniquant:w4a4asym:preset=w4a4",
        "rotate+signround:w4a4asym@down_proj=w4a4hasym",
        *[f"omniquant:{scheme}" for scheme in ("w8a8", "w4a8asym", "w4a4kv4asym")],
    ],
    "batches": [
        *[f"omniquant:w3g128asym:let=false,batch_size={size}" for size in (1, 4, 8, 16)],
        *[f"omniquant:w4a4asym:batch_size={size}" for size in (1, 4, 8)],
    ],
    "blocks": [f"{shape}:{kind}" for shape in ("7B", "70B") for kind in ("clip", "let")],
}
EPOCHS, SAMPLES = 20, 128


def told(setting: str) -> Callable[[Event], None]:
    """A line on stderr for each span of blocks."""

    def progress(event: Event) -> None:
        loss = "" if event.after is None else f", loss {event.before:.4g} to {event.after:.4g}"
        at = f"{event.index}/{event.total}, {event.seconds:.1f} s"
        print(f"{setting}: {at}{loss} {event.note}", file=sys.stderr, flush=True)

    return progress


def quantized(setting: str, windows: Tensor, device: str, args: argparse.Namespace) -> tuple[Any, dict]:
    """The model of a setting, and what making it took; its folder is kept if asked for."""
    if setting == "16-bit":
        return planish.load(args.model, device=device), {}
    words, _, layers = setting.partition("@")
    recipe, scheme, *rest = words.split(":")
    keys: dict[str, Any] = dict(pair.split("=") for pair in rest[0].split(",")) if rest else {}
    if "batch_size" in keys:
        keys["batch_size"] = int(keys["batch_size"])
    if args.tiny and ("omniquant" in recipe or "signround" in recipe):
        keys["steps"] = 2
    with tempfile.TemporaryDirectory() as folder:
        out = (args.keep or Path(folder)) / re.sub(r"\W+", "_", setting)
        made = planish.quantize_to(
            args.model, out, recipe, scheme, data=windows, samples=len(windows), seqlen=windows.shape[1],
            device=device, format="native", progress=told(setting), layers=(layers,) if layers else (),
            overwrite=True, **keys,
        )  # fmt: skip
        loaded = planish.load(out, device=device)
    figures = made.figures
    return loaded, {"seconds": round(figures["seconds"], 1), "peak_mib": round(figures["peak_bytes"] / 2**20)}


def quality(part: str, args: argparse.Namespace, device: str, keep: Callable[[dict], None]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, valid = (read(args.data / name, tokenizer) for name in ("wiki.train.part.raw", "wiki.valid.tokens"))
    texts = {"valid": valid} if args.tiny else {"valid": valid, "test": read(args.data / "wiki.test.raw", tokenizer)}
    windows, limit = random_windows(train, args.samples)[:, : args.seqlen], 2 if args.tiny else args.limit
    for setting in args.settings or SETTINGS[part]:
        made, row = quantized(setting, windows, device, args)
        for name, ids in texts.items():
            length = 64 if args.tiny else SEQLEN
            row[f"{name}_perplexity"] = round(planish.perplexity(made, ids, limit=limit, seqlen=length), 3)
        keep({"setting": setting, **row})
        del made


def tasks(part: str, args: argparse.Namespace, device: str, keep: Callable[[dict], None]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for folder in (Path(args.model), *sorted(args.keep.iterdir())):
        name = "16-bit" if folder == Path(args.model) else folder.name
        if not args.settings or name in args.settings:
            scores = zero_shot.scores(planish.load(folder, device=device), tokenizer, args.tasks, args.questions)
            keep({"model": name, **scores})


class Plain(nn.Module):
    """A linear as the original has it: ends, factors, grid and codes by ordinary operations, every step."""

    def __init__(self, linear: nn.Linear, group: int, bits: int, act_bits: int) -> None:
        super().__init__()
        self.weight, self.top, self.act_top = linear.weight, 2**bits - 1, 2**act_bits - 1
        self.group = group or linear.in_features
        shape = (linear.out_features, linear.in_features // self.group, 1)
        self.low, self.high = (nn.Parameter(torch.full(shape, 4.0, device=linear.weight.device)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(linear.in_features, device=linear.weight.device))

    def grid(self, values: Tensor, low: Tensor, high: Tensor, top: int) -> Tensor:
        scale = ((high - low) / top).clamp(1e-5, 1e4)
        zero = (-low / scale).round()
        steps = values / scale
        return (((steps.round() - steps).detach() + steps + zero).clamp(0, top) - zero) * scale

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        if self.act_top < 2**16 - 1:
            weight, x = weight * self.scale, x / self.scale
            x = self.grid(x, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), self.act_top)
        groups = weight.view(len(weight), -1, self.group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        values = self.grid(groups, torch.sigmoid(self.low) * low, torch.sigmoid(self.high) * high, self.top)
        return functional.linear(x, values.view_as(weight))


def plain_step(model: Any, tokens: int, device: str, group: int, act_bits: int) -> float:
    """Seconds a sample of the plain loop, one sample a step as published, bf16 autocast."""
    block, config = model.model.layers[0].to(torch.float32), model.config
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, Plain(linear, group, 4, act_bits))
    parts = [part for part in block.modules() if isinstance(part, Plain)]
    trained = [parameter for part in parts for parameter in (part.low, part.high)]
    trained += [part.scale for part in parts] if act_bits < 16 else []
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    hidden = torch.randn(1, tokens, config.hidden_size, device=device)
    target = torch.randn_like(hidden)
    rotary = model.model.rotary_emb(hidden, torch.arange(tokens, device=device)[None])

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            output = block(hidden, position_embeddings=rotary)
            loss = functional.mse_loss(output[0] if isinstance(output, tuple) else output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # a loss that isn't finite is looked for at each step, as there

    return block_ap.timed(step, 2 if device == "cpu" else 10, device)


def ours(setting: str, model: Any, count: int, steps: int, batch: int, tokens: int, device: str) -> float:
    """Seconds of a fit of so many steps, everything around it included."""
    scheme, keys = ("w4a4asym", {}) if setting.endswith("let") else ("w3g128asym", {"let": False})
    scheme = "w3g32asym" if device == "cpu" and "g128" in scheme else scheme
    ids = torch.randint(0, 4096, (count, tokens), generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    planish.quantize(
        model, "omniquant", scheme, data=ids, samples=count, seqlen=tokens, steps=steps, span=1, batch_size=batch,
        storage="device", device=device, progress=told(setting), **keys,
    )  # fmt: skip
    block_ap.synchronize(device)
    return time.perf_counter() - start


def blocks(part: str, args: argparse.Namespace, device: str, keep: Callable[[dict], None]) -> None:
    tokens, steps, batch, count = (32, 8, 4, 12) if args.tiny else (2048, 48, 4, SAMPLES)
    for setting in args.settings or (["tiny:clip", "tiny:let"] if args.tiny else SETTINGS["blocks"]):
        shape, kind = setting.split(":")
        model, short = block_ap.one_block(shape, device), steps // 4
        warm = ours(setting, model, count, short, batch, tokens, device)  # compiles; with fewer samples not all of it
        block_ap.peak(device, reset=True)
        little, much = (ours(setting, model, count, length, batch, tokens, device) for length in (short, steps))
        step = (much - little) / (steps - short)
        seconds = little + step * (EPOCHS * SAMPLES / batch - short)
        row = {
            "shape": shape, "kind": kind, "step_ms": round(1e3 * step, 2), "batch": batch,
            "sample_ms": round(1e3 * step / batch, 2), "warm_up_seconds": round(warm, 1),
            "around_seconds": round(little - short * step, 1), "peak_gb": block_ap.peak(device),
            "block_seconds": round(seconds), "model_hours": round(seconds * block_ap.BLOCKS[shape] / 3600, 2),
        }  # fmt: skip
        print(json.dumps(row), file=sys.stderr, flush=True)  # before the plain loop, which may find no room
        block_ap.peak(device, reset=True)
        group, act_bits = (0, 4) if kind == "let" else (32 if args.tiny else 128, 16)
        plain = plain_step(model, tokens, device, group, act_bits)
        times = {"plain_sample_ms": round(1e3 * plain, 2), "times_faster": round(plain * batch / step, 2)}
        keep({**row, **times, "plain_peak_gb": block_ap.peak(device)})
        del model


PARTS = {**dict.fromkeys(SETTINGS, quality), "tasks": tasks, "blocks": blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--parts", default="clip,let,w6a6,w4a4,blocks", help=", ".join(PARTS))
    parser.add_argument("--settings", nargs="*", help="instead of a part's own")
    parser.add_argument("--keep", type=Path, help="folder for the quantized models, a folder each")
    parser.add_argument("--tasks", type=Path, help="folder of the zero-shot tasks")
    parser.add_argument("--questions", type=int, help="of each task, all if not given")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="windows of calibration")
    parser.add_argument("--seqlen", type=int, default=SEQLEN, help="tokens of one")
    parser.add_argument("--limit", type=int, help="windows of the perplexity, all if not given")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    if args.tiny:
        args.samples, args.seqlen = 4, 64
    report: dict[str, Any] = {
        "command": f"python benchmarks/omniquant.py OUT.json MODEL WIKITEXT2 --parts {args.parts} --samples "
        f"{args.samples} --seqlen {args.seqlen}"
        + f" --limit {args.limit}" * bool(args.limit)
        + (f" --settings {' '.join(args.settings)}" if args.settings else ""),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions(),
    }
    for name in args.parts.split(","):
        rows = report[name] = []

        def keep(row: dict, rows: list = rows) -> None:
            rows.append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")

        PARTS[name](name, args, device, keep)


if __name__ == "__main__":
    main()
