"""The demo: SmolLM2-135M-Instruct at 4, 3 and 2 bits, rounded to nearest and with SignRound, side by side.

    python examples/demo.py models/smollm2 --out out/demo [--tiny]

Calibration is on docstrings of Python's standard library, perplexity on its language reference: texts that
every Python carries, and that share no passage. Settings are small, so that two cores need some minutes; a
GPU and the defaults do better. --tiny only shows that every step works. Everything here is public API.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import planish
from planish.data import tokens
from planish.log import Event

PROMPT = "What does a blacksmith do? Answer in one sentence."


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done.

    Args:
        steps: SignRound's steps for each width; fewer bits need more.
        samples, context: windows of the calibration text and their tokens.
        windows, seqlen: of the perplexity.
        new_tokens: of a sample.
    """

    steps: dict[str, int]
    samples: int
    context: int
    windows: int
    seqlen: int
    new_tokens: int


FULL = Size(steps={"w4g64": 8, "w3g64": 12, "w2g64": 24}, samples=96, context=64, windows=16, seqlen=256,
            new_tokens=32)
TINY = Size(steps={"w2g64": 2}, samples=10, context=32, windows=2, seqlen=64, new_tokens=4)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is measured of one folder."""

    folder: Path
    mib: float
    bits_per_weight: float
    perplexity: float
    tokens_per_second: float
    sample: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--tiny", action="store_true", help="the smallest form")
    args = parser.parse_args()
    size = TINY if args.tiny else FULL
    start = time.perf_counter()
    folders = {"16-bit": args.model}
    for scheme, steps in size.steps.items():
        fit = {"steps": steps, "samples": size.samples, "seqlen": size.context}
        for recipe, keys in (("rtn", {}), ("signround", fit)):
            folder = args.out / f"{scheme}-{recipe}"
            print(f"\n{scheme} {recipe} -> {folder}", flush=True)
            planish.quantize_to(args.model, folder, recipe, scheme, overwrite=True, progress=show, **keys)
            folders[f"{scheme} {recipe}"] = folder
    print("\nmeasuring ...", flush=True)
    measured = {name: measure(folder, args.model, size) for name, folder in folders.items()}
    print_table(measured, size)
    print_samples(measured)
    print(f"\n{time.perf_counter() - start:.0f} s in all; wrote")
    for name, figures in measured.items():
        if name != "16-bit":
            print(f"    {figures.folder}")
    print(f"try: planish generate {figures.folder} \"Your question\"")


def show(event: Event) -> None:
    """Every tenth block of a fit."""
    if event.before is not None and event.after is not None and event.index % 10 == 0:
        left = f"{event.eta:.0f} s left" if event.eta else ""
        print(f"    block {event.index}/{event.total}  loss {event.before:.2e} -> {event.after:.2e}  {left}  "
              f"peak {event.peak_bytes / 2**30:.1f} GiB", flush=True)


@torch.no_grad()
def measure(folder: Path, original: Path, size: Size) -> Figures:
    """Load a folder as anyone would: perplexity in float32, which every CPU computes at full speed, then a sample."""
    model = planish.load(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(original)
    ids = tokens(tokenizer, "embedded-eval")
    perplexity = planish.perplexity(model, ids, seqlen=size.seqlen, limit=size.windows)
    model = planish.load(folder)
    turn = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True).to(model.device)
    timed_generate(model, prompt, 2)  # warm up
    _, first = timed_generate(model, prompt, 1)
    output, seconds = timed_generate(model, prompt, size.new_tokens)
    answer = output[0, prompt["input_ids"].shape[1]:]
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Figures(
        folder=folder, mib=stored / 2**20, bits_per_weight=8 * stored / parameters(original),
        perplexity=perplexity, tokens_per_second=(len(answer) - 1) / (seconds - first),
        sample=tokenizer.decode(answer, skip_special_tokens=True))


def timed_generate(model: Any, prompt: Any, count: int) -> tuple[torch.Tensor, float]:
    """Greedy tokens after a prompt, and the seconds that took."""
    start = time.perf_counter()
    output = model.generate(**prompt, max_new_tokens=count, do_sample=False)
    return output, time.perf_counter() - start


def parameters(folder: Path) -> int:
    """Weights of the 16-bit model, from the header of its file."""
    with open(folder / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return sum(torch.Size(entry["shape"]).numel() for entry in header.values())


def print_table(measured: dict[str, Figures], size: Size) -> None:
    print(f"\n{'':18}{'on disk':>10}{'bits/weight':>13}{'perplexity':>13}{'tokens/s':>11}")
    for name, figures in measured.items():
        value = f"{figures.perplexity:.1f}" if figures.perplexity < 1e4 else f"{figures.perplexity:.1e}"
        print(f"{name:18}{figures.mib:>6.0f} MiB{figures.bits_per_weight:>13.2f}{value:>13}"
              f"{figures.tokens_per_second:>11.1f}")
    print(f"Perplexity on {size.windows} windows of {size.seqlen} tokens of Python's language reference. "
          "Bits a weight count the\nembedding, which stays in 16 bits. The model's linears were 4-bit values "
          "before: 4-bit rows flatter every method.")


def print_samples(measured: dict[str, Figures]) -> None:
    print(f"\n> {PROMPT}")
    for name, figures in measured.items():
        print(f"{name:18}{' '.join(figures.sample.split())}")


if __name__ == "__main__":
    main()
