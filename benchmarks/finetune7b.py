"""Memory and seconds a step of finetuning at Llama-2-7B's shape: L4Q, with W0 in 16 or 8 bits, beside LoRA in 16 bits.

    python benchmarks/finetune7b.py --out finetune7b.json            one GPU, each way in a process of its own
    python benchmarks/finetune7b.py --tiny                           a few seconds on a CPU, to see that it runs

Random weights, batch 1 of 2048 random tokens, w4g128, rank 4 (L4Q's), blocks recomputed in the backward pass, the
head's loss some tokens at a time for all; forward and backward pass are one CUDA graph, as in Planish's trainer
(`--eager` launches them from Python, for which a slow host takes longer than the GPU). Ways: `l4q`, `l4q int8`, `ste`
(the same quantizer by plain autograd, which keeps what it makes of each weight until a block's backward is done) and
`lora` (unmerged, in 16 bits). AdamW in fp32, or moments in 8 bits. The grid starts unclipped, which takes no search. A
whole model is measured, nothing is projected; `--blocks` cuts it, and is then said. Peak is what torch held at most,
seconds the median of the steps.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import planish
from planish.arch import discover
from planish.fit.adam8 import Adam8
from planish.fit.graphed import Graphed
from planish.fit.objective import Objective, shifted
from planish.qtensor import fake_quantize, from_groups, to_groups
from planish.quant import QLinear

SCHEME, RANK = "w4g128", 4
LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
         "tie_word_embeddings": False, "max_position_embeddings": 2048}  # fmt: skip
TINY = {**LLAMA, "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
WAYS = [(way, adam) for adam in ("adamw", "adam8") for way in ("lora", "l4q", "l4q int8", "ste")]


class Lora(nn.Module):
    """y = x W0^T + (x A^T) B^T, W0 frozen in 16 bits, factors in fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        device = linear.weight.device
        self.a = nn.Parameter(torch.randn(RANK, linear.in_features, device=device) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = functional.linear(functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return functional.linear(x, self.weight) + low


class Straight(nn.Module):
    """What L4Q multiplies by, by plain autograd."""

    def __init__(self, layer: QLinear) -> None:
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.layer.quantizer
        assert quantizer is not None
        slot = quantizer.weight
        merged = torch.addmm(self.layer.weight.float(), slot.b, slot.a, alpha=slot.alpha)
        grid = quantizer.range()
        groups = to_groups(merged, quantizer.group_size)
        weight = fake_quantize(groups, None, grid.scale, grid.zero, quantizer.scheme.bits, x.dtype)
        return functional.linear(x, from_groups(weight, self.in_features))


def replaced(model: nn.Module, kind: type[nn.Module], make: type[nn.Module]) -> None:
    for name in [name for name, part in model.model.layers.named_modules() if isinstance(part, kind)]:  # type: ignore
        parent, _, leaf = name.rpartition(".")
        owner = model.model.layers.get_submodule(parent)  # type: ignore[union-attr, operator]
        setattr(owner, leaf, make(getattr(owner, leaf)))


def model_of(way: str, blocks: int, tiny: bool, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**(TINY if tiny else LLAMA), num_hidden_layers=blocks))
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    if way == "lora":
        replaced(model, nn.Linear, Lora)
    else:
        base = "int8" if way == "l4q int8" else "16"
        planish.prepare(model, "l4q", SCHEME, rank=RANK, base=base, search=False)
    if way == "ste":
        replaced(model, QLinear, Straight)
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})  # nothing is dropped
    return model.train()


def measure(way: str, adam: str, args: argparse.Namespace) -> dict[str, object]:
    """One way in this process."""
    device = torch.device("cpu" if args.tiny or not torch.cuda.is_available() else "cuda")
    blocks, tokens = (2, 32) if args.tiny else (args.blocks, 2048)
    start = time.perf_counter()
    model = model_of(way, blocks, args.tiny, device)
    ready = time.perf_counter() - start
    classes = (QLinear, Lora, Straight)
    objective = Objective(model, discover(model, classes))
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    plain = functools.partial(torch.optim.AdamW, fused=device.type == "cuda")
    make = functools.partial(Adam8, seed=0) if adam == "adam8" else plain
    optimizer = make([{"params": trained if adam == "adam8" else [value for _, value in trained], "lr": 1e-5}])  # type: ignore[operator]
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    graphed = Graphed(objective) if device.type == "cuda" and not args.eager else None
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        batch = {"input_ids": ids, "labels": shifted(ids)}
        if graphed:
            loss = graphed(batch)
        else:
            loss = objective(**batch)["loss"]
            loss.backward()
        if adam == "adam8":
            for _, value in trained:
                optimizer.step_one(value)
        else:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "way": way, "adam": adam, "blocks": blocks, "trained": sum(value.numel() for _, value in trained),
        "gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "captured": bool(graphed and graphed.graph),
        "seconds": statistics.median(seconds[2:]), "ready": ready, "loss": loss.item(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="the first two aren't counted")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--out", type=Path)
    every = ",".join(f"{way}:{adam}" for way, adam in WAYS)
    parser.add_argument("--only", default=every, help="which, as lora:adamw,l4q:adamw")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "ADAM"), help="measure one way in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args)))
        return
    rows = []
    for way, adam in (pair.split(":") for pair in args.only.split(",")):
        given = ["--blocks", str(args.blocks), "--steps", str(args.steps)]
        given += ["--tiny"] * args.tiny + ["--eager"] * args.eager
        command = [sys.executable, __file__, "--one", way, adam, *given]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{way:<10}{adam:<8}failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        first = next(other for other in rows if other["adam"] == adam)
        memory = "" if row["gb"] is None else f"{row['gb']:7.2f} GB {row['gb'] / first['gb']:5.2f}x"
        ratio = row["seconds"] / first["seconds"]
        print(f"{way:<10}{adam:<8}{memory} {row['seconds']:8.3f} s {ratio:5.2f}x  loss {row['loss']:.3f}", flush=True)
    if args.out:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        args.out.write_text(json.dumps({"card": card, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
