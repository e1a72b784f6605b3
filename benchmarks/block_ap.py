"""Block-AP on one block of Llama-2-7B and of Llama-2-70B shape: speed, memory, and hours for the whole model.

    python benchmarks/block_ap.py OUT.json [--tiny]

Random weights, w2g64asym, batches of 2 x 2048 tokens in bf16, W, s and z trained by AdamW. A step's time is the
difference of a long and a short fit. The rate counts the arithmetic of a step (forward, gradients of inputs and
weights, attention's causal half) over its time, next to the rate of a large matrix product measured on the same
GPU. Hours are for 4096 samples of 2048 tokens and two epochs: the larger of computing (steps, and both streams
through the block) and of moving the streams at the measured rate between pinned host memory and the GPU.

The plain way, on the same block: fake-quantization by ordinary tensor operations under autograd, fp32 masters,
fp16 autocast with a gradient scaler, AdamW, as the original does. A dry run on a CPU is --tiny.
"""

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import planish
from planish.log import versions

BATCH, EPOCHS, SAMPLES = 2, 2, 4096
SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1},
}
BLOCKS = {"7B": 32, "70B": 80, "tiny": 2}


def one_block(shape: str, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, num_hidden_layers=1, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        **SHAPES[shape],
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32)
    nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    return model.eval().requires_grad_(False)


def matrix_rate(device: str) -> float:
    """FLOP/s of a large square bf16 product on random data."""
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, 20, device)


def copy_rate(device: str) -> float:
    """Bytes a second from pinned host memory to the GPU."""
    pinned = torch.empty(2**28 if device == "cuda" else 2**20, dtype=torch.uint8, pin_memory=device == "cuda")
    return pinned.nbytes / timed(lambda: pinned.to(device, non_blocking=True, copy=True), 10, device)


def timed(run: Any, times: int, device: str) -> float:
    """Seconds of one call, after some to warm up."""
    for _ in range(3):
        run()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / times


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str, reset: bool = False) -> float:
    """GB that torch held at most."""
    if device != "cuda":
        return 0.0
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def step_flops(block: nn.Module, hidden: int, tokens: int) -> float:
    """Arithmetic of one step: 6 a weight and token, and 3.5 times the forward of causal attention."""
    weights = sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
    return 6 * weights * BATCH * tokens + 4 * BATCH * tokens**2 / 2 * hidden * 3.5


def ours(model: LlamaForCausalLM, ids: Tensor, steps: int, device: str, compile: bool) -> float:
    """Seconds of the fit of so many steps, everything around it included."""
    start = time.perf_counter()
    planish.quantize(
        model, "block_ap", "w2g64asym" if device == "cuda" else "w2g32asym", data=ids, samples=len(ids),
        seqlen=ids.shape[1], steps=steps, span=1, batch_size=BATCH, search=False, storage="host", holdout=4,
        compile=compile, device=device,
    )  # fmt: skip
    synchronize(device)
    return time.perf_counter() - start


class Plain(nn.Module):
    """A linear that fakes quantization by ordinary operations, as the original does."""

    def __init__(self, linear: nn.Linear, group: int) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        groups = weight.view(len(weight), -1, group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        self.weight, self.group = nn.Parameter(weight.clone()), group
        self.scale = nn.Parameter(((high - low) / 3).clamp(1e-4, 1e4))
        self.zero = nn.Parameter((-low / self.scale.detach()).round())

    def forward(self, x: Tensor) -> Tensor:
        def through(values: Tensor) -> Tensor:
            return (values.round() - values).detach() + values

        zero = through(self.zero).clamp(0, 3)
        codes = (through(self.weight.view(len(self.weight), -1, self.group) / self.scale) + zero).clamp(0, 3)
        return functional.linear(x, ((codes - zero) * self.scale).view_as(self.weight))


def plain(model: LlamaForCausalLM, tokens: int, steps: int, device: str) -> float:
    """Seconds of one step of the plain way."""
    block, config = model.model.layers[0].to(torch.float32), model.config
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, Plain(linear, 64 if device == "cuda" else 32))
    trained = [p for module in block.modules() if isinstance(module, Plain) for p in module.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    hidden = torch.randn(BATCH, tokens, config.hidden_size, device=device)
    target = torch.randn_like(hidden)
    rotary = model.model.rotary_emb(hidden, torch.arange(tokens, device=device)[None])

    def step() -> None:
        with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
            output = block(hidden, position_embeddings=rotary)
            loss = functional.mse_loss(output[0] if isinstance(output, tuple) else output, target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    return timed(step, steps, device)


@torch.no_grad()
def forward_seconds(model: LlamaForCausalLM, tokens: int, device: str) -> float:
    """Seconds a sample of the block alone, eight at a time."""
    hidden = torch.randn(8, tokens, model.config.hidden_size, device=device, dtype=model.dtype)
    rotary = model.model.rotary_emb(hidden, torch.arange(tokens, device=device)[None])
    return timed(lambda: model.model.layers[0](hidden, position_embeddings=rotary), 5, device) / 8


def measure(shape: str, tokens: int, steps: int, device: str, rates: tuple[float, float], compile: bool) -> dict:
    matrix, copying = rates
    model = one_block(shape, device)
    hidden = model.config.hidden_size
    flops = step_flops(model.model.layers[0], hidden, tokens)
    ids = torch.randint(0, 4096, (24, tokens), generator=torch.Generator().manual_seed(1))
    peak(device, reset=True)
    ours(model, ids, steps // 4, device, compile)
    most = peak(device)
    short, long = (ours(model, ids, count, device, compile) for count in (steps // 4, steps))
    step = (long - short) / (steps - steps // 4)
    forward = forward_seconds(model, tokens, device)
    stream = SAMPLES * tokens * hidden * 2
    # an epoch reads inputs and targets; going through the block reads and writes both streams
    moved = stream * (2 * EPOCHS + 4)
    computing = SAMPLES * EPOCHS / BATCH * step + 2 * SAMPLES * forward
    seconds = max(computing, moved / copying) * BLOCKS[shape]
    peak(device, reset=True)
    plainly = plain(model, tokens, max(2, steps // 6), device)
    return {
        "shape": shape, "compile": compile, "step_ms": round(1e3 * step, 2),
        "tokens_per_second": round(BATCH * tokens / step), "share_of_matrix_rate": round(flops / step / matrix, 3),
        "peak_gb": most, "computing_hours": round(computing * BLOCKS[shape] / 3600, 2),
        "moving_hours": round(moved / copying * BLOCKS[shape] / 3600, 2), "stream_gb": round(stream / 1e9, 1),
        "hours": round(seconds / 3600, 2), "plain_step_ms": round(1e3 * plainly, 2), "plain_peak_gb": peak(device),
        "times_faster": round(plainly / step, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU")
    args = parser.parse_args()
    device, tokens, steps = ("cpu", 32, 8) if args.tiny else ("cuda", 2048, 64)
    rates = matrix_rate(device), copy_rate(device)
    report: dict[str, Any] = {
        "command": "python benchmarks/block_ap.py OUT.json" + " --tiny" * args.tiny,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions(),
        "matrix_tflops": round(rates[0] / 1e12, 1),
        "host_to_device_gb_per_second": round(rates[1] / 1e9, 1),
        "rows": [],
    }
    for shape in ["tiny"] if args.tiny else ["7B", "70B"]:
        report["rows"].append(measure(shape, tokens, steps, device, rates, compile=False))
        print(json.dumps(report["rows"][-1]), flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
