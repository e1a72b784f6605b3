"""OmniQuant and what goes with it: quality on SmolLM2, time and memory of large blocks.

    python benchmarks/omniquant.py OUT.json MODEL WIKITEXT2 [--tasks DIR] [--parts quality,blocks] [--tiny]

quality   perplexity on validation and test text after calibration on the same 128 windows as every peer: clipping
          alone at equal tokens and epochs, with channels scaled too, and with activations rounded beside RTN,
          SmoothQuant and rotation alone; with --tasks the mean of seven zero-shot tasks of those.
blocks    one block of Llama-2-7B and of Llama-2-70B shape: seconds of the fit at 128 x 2048 tokens and 20 epochs,
          from a long and a short fit, and its peak memory; and the loop written plainly in PyTorch, one sample a step.

--tiny is a dry run on a CPU. Settings may be named behind --settings, those of SETTINGS if not.
"""

import argparse
import datetime
import json
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
CLIP = ["w4g128asym", "w3g128asym", "w2g128asym", "w2g64asym"]
SETTINGS = [
    "16-bit",
    *[f"omniquant:{scheme}:let=false" for scheme in CLIP],
    "omniquant:w2g128asym:let=false,augment=true",
    "omniquant:w2g64asym:let=false,augment=true",
    "omniquant:w3g128asym:preset=w3a16",
    "omniquant:w2g64asym:preset=w2a16,epochs=20",
    *[f"omniquant:{scheme}:let=true" for scheme in ("w3g128asym", "w2g64asym")],
]
ROUNDED = [
    *[f"{recipe}:w6a6asym" for recipe in ("rtn", "smoothquant", "omniquant", "rotate+omniquant")],
    *[f"{recipe}:w4a4asym" for recipe in ("rtn", "smoothquant", "rotate+rtn", "omniquant")],
    "smoothquant:w4a4asym@down_proj=w4a4hasym",
    "omniquant:w4a4asym@down_proj=w4a4hasym",
    "omniquant:w4a4asym:alpha=0.5",
    "omniquant:w4a4asym:preset=w4a4",
    "rotate+omniquant:w4a4asym",
    "rotate+rtn:w4a4asym@down_proj=w4a4hasym",
    "rotate+omniquant:w4a4asym@down_proj=w4a4hasym",
    "rotate+signround:w4a4asym@down_proj=w4a4hasym",
    *[f"omniquant:{scheme}" for scheme in ("w8a8", "w4a8asym", "w4a4kv4asym")],
]
EPOCHS, SAMPLES = 20, 128


def quantized(model: str, setting: str, windows: Tensor, device: str, few: dict[str, Any]) -> tuple[Any, dict]:
    """The model of a setting, and what making it took."""
    if setting == "16-bit":
        return planish.load(model, device=device), {}
    words, _, layers = setting.partition("@")
    recipe, scheme, *rest = words.split(":")
    keys: dict[str, Any] = dict(pair.split("=") for pair in rest[0].split(",")) if rest else {}
    if "omniquant" in recipe or "signround" in recipe:
        keys = {**few, **keys}
    events: list[Event] = []
    made = planish.quantize(
        model, recipe, scheme, data=windows, samples=len(windows), seqlen=windows.shape[1], device=device,
        progress=events.append, layers=(layers,) if layers else (), **keys,
    )  # fmt: skip
    return made, {"seconds": round(events[-1].seconds, 1), "peak_mib": round(events[-1].peak_bytes / 2**20)}


def quality(args: argparse.Namespace, device: str, keep: Callable[[dict], None]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, test = (read(args.data / name, tokenizer) for name in ("wiki.train.part.raw", "wiki.test.raw"))
    valid = read(args.data / "wiki.valid.tokens", tokenizer)
    windows, limit = random_windows(train, 4 if args.tiny else SAMPLES), 2 if args.tiny else None
    seqlen = 64 if args.tiny else SEQLEN
    few: dict[str, Any] = {"steps": 2} if args.tiny else {}
    for setting in args.settings or [*SETTINGS, *ROUNDED]:
        made, row = quantized(args.model, setting, windows[:, :seqlen], device, few)
        texts = {"valid": valid} if args.tiny else {"valid": valid, "test": test}
        for name, ids in texts.items():
            row[f"{name}_perplexity"] = round(planish.perplexity(made, ids, limit=limit, seqlen=seqlen), 3)
        if args.tasks and (setting in ROUNDED or setting == "16-bit"):
            row["tasks"] = zero_shot.scores(made, tokenizer, args.tasks, 2 if args.tiny else args.questions)
        keep({"setting": setting, **row})
        del made


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


def blocks(args: argparse.Namespace, device: str, keep: Callable[[dict], None]) -> None:
    tokens, steps, batch = (32, 4, 4) if args.tiny else (2048, 48, 4)
    count = 12 if args.tiny else SAMPLES
    for shape in ["tiny"] if args.tiny else ["7B", "70B"]:
        for kind, scheme, keys in (("clip", "w3g32asym" if args.tiny else "w3g128asym", {"let": False}),
                                   ("clip and scale", "w4a4asym", {})):  # fmt: skip
            model = block_ap.one_block(shape, device)
            ids = torch.randint(0, 4096, (count, tokens), generator=torch.Generator().manual_seed(1))
            took = []
            for length in (steps // 4, steps // 4, steps):  # the first compiles
                block_ap.peak(device, reset=True)
                start = time.perf_counter()
                planish.quantize(model, "omniquant", scheme, data=ids, samples=count, seqlen=tokens, steps=length,
                                 span=1, batch_size=batch, storage="device", device=device, **keys)  # fmt: skip
                block_ap.synchronize(device)
                took.append(time.perf_counter() - start)
            most = block_ap.peak(device)
            step = (took[2] - took[1]) / (steps - steps // 4)
            seconds = took[1] + step * (EPOCHS * SAMPLES / batch - steps // 4)
            group = 0 if "a4" in scheme else (32 if args.tiny else 128)
            block_ap.peak(device, reset=True)
            plain = plain_step(model, tokens, device, group, 4 if "a4" in scheme else 16)
            keep({
                "shape": shape, "kind": kind, "scheme": scheme, "step_ms": round(1e3 * step, 2), "batch": batch,
                "sample_ms": round(1e3 * step / batch, 2), "around_seconds": round(took[1], 1), "peak_gb": most,
                "block_seconds": round(seconds), "model_hours": round(seconds * block_ap.BLOCKS[shape] / 3600, 2),
                "plain_sample_ms": round(1e3 * plain, 2), "plain_peak_gb": block_ap.peak(device),
                "times_faster": round(plain * batch / step, 2),
            })  # fmt: skip
            del model


PARTS = {"quality": quality, "blocks": blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--questions", type=int, help="of each task, all if not given")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--settings", nargs="*")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU")
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    report: dict[str, Any] = {
        "command": f"python benchmarks/omniquant.py OUT.json MODEL WIKITEXT2 --parts {args.parts}"
        + " --tiny" * args.tiny,
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

        PARTS[name](args, device, keep)


if __name__ == "__main__":
    main()
