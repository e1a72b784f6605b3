"""Training the scales of a Llama-2-70B-shaped model on one GPU: memory and time of a step.

    python benchmarks/e2e70b.py OUT.json [--tiny]

The model is made of random codes, packed on the GPU: no 16-bit weight of a block ever exists. Its scales are
trained as in E2E-QP (arXiv 2407.11062) by `LeanTrainer` with `Adam8`: one warm-up step, then two that are
timed, each of one sequence of 4096 random tokens, at w2g64 and at w4g128. The rate counts what the step
needs (forward twice, gradients of inputs and of scales, attention with its causal half) next to the rate of
a large matrix product on the same GPU. Exits with 1 if a peak is above its limit or an update was skipped.
--tiny is a dry run on any machine.
"""

import argparse
import datetime
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from planish.arch import discover, linears
from planish.fit.adam8 import Adam8
from planish.fit.lean import LeanTrainer
from planish.fit.objective import Objective, shifted
from planish.kernels.linear import PackedLinear
from planish.kernels.pack import Packed
from planish.log import peak_bytes, versions
from planish.scheme import Scheme
from planish.skeleton import build, put, ready

LIMITS_GB = {"w2g64": 30.0, "w4g128": 44.0}
SAMPLES, TIMED = 4096, 2
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TINY = {**LLAMA_70B, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 1, "vocab_size": 512, "max_position_embeddings": 128}  # fmt: skip


def random_packed(shape: tuple[int, int], scheme: Scheme, device: torch.device) -> PackedLinear:
    """A layer of random codes and of scales of both signs, with which activations keep their size; trainable."""
    rows, columns = shape
    codes = torch.randint(256, (rows, scheme.bits * columns // 8), dtype=torch.uint8, device=device)
    deviation = 2**scheme.bits / 12**0.5
    scale = torch.randn(rows, scheme.groups_in(columns), device=device).mul_(columns**-0.5 / deviation).half()
    layer = PackedLinear(
        Packed(
            codes=codes,
            scale=scale,
            zero=None,
            offset=None,
            bits=scheme.bits,
            group_size=scheme.group_in(columns),
            in_features=columns,
        )
    )
    layer.make_trainable({"scale"})
    return layer


def packed_model(config: dict[str, int], scheme: Scheme, device: torch.device) -> PreTrainedModel:
    """The model, made layer by layer on the device; only its scales require gradients."""
    torch.manual_seed(0)
    settings = LlamaConfig(**config, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    model = ready(build(settings, torch.bfloat16, "the benchmark's model", code=False))
    for name, shape in linears(discover(model), model).items():
        put(model, name, random_packed(shape, scheme, device))
    for name, value in list(model.named_parameters()):
        if value.is_meta:
            real = torch.ones(value.shape, dtype=value.dtype, device=device)
            if value.ndim > 1:
                real.normal_(std=1.0 if "embed" in name else value.shape[1] ** -0.5)
            put(model, name, nn.Parameter(real, requires_grad=False))
    return model.to(device)


def step_flops(model: PreTrainedModel, tokens: int) -> float:
    """8 a weight and token (forward twice, dX and the scales' gradient), 6 in the head, and causal attention."""
    config, weights = model.config, 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            weights += module.in_features * module.out_features
    attention = config.num_hidden_layers * 4 * tokens * tokens / 2 * config.hidden_size * 4.5
    return 8 * weights * tokens + 4 * config.vocab_size * config.hidden_size * tokens + attention


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of a square bf16 product on random data."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronize(device)
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(scheme: Scheme, config: dict[str, int], device: torch.device) -> dict[str, Any]:
    """Build the model, train TIMED steps after one of warm-up; figures of it."""
    start = time.perf_counter()
    model = packed_model(config, scheme, device)
    scales = {name: value for name, value in model.named_parameters() if value.requires_grad}
    objective = Objective(model, discover(model, packed=PackedLinear))

    def loss(hidden: Tensor, part: Any) -> Tensor:
        return objective.of_hidden(hidden, part["labels"])

    trainer = LeanTrainer(model, loss, Adam8(scales.items(), lr=2e-5))
    synchronize(device)
    figures: dict[str, Any] = {
        "scheme": str(scheme),
        "build_seconds": round(time.perf_counter() - start, 2),
        "weights_gb": round(sum(value.nbytes for value in [*model.parameters(), *model.buffers()]) / 1e9, 2),
        "trained_scales": sum(value.numel() for value in scales.values()),
    }
    tokens = config["max_position_embeddings"]
    ids = torch.randint(config["vocab_size"], (1 + TIMED, 1, tokens), generator=torch.Generator().manual_seed(1))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, results = [], []
    for sample in ids:
        began = time.perf_counter()
        results.append(trainer.step({"input_ids": sample, "labels": shifted(sample)}))
        synchronize(device)
        seconds.append(round(time.perf_counter() - began, 3))
        print(f"{scheme}: step of {seconds[-1]} s, {results[-1]}", flush=True)
    a_step = sum(seconds[1:]) / TIMED
    figures |= {
        "peak_gb": round(peak_bytes(device) / 1e9, 2),
        "warm_up_seconds": seconds[0],
        "step_seconds": seconds[1:],
        "tokens_per_second": round(tokens / a_step, 1),
        "step_tflop": round(step_flops(model, tokens) / 1e12, 1),
        "tflops": round(step_flops(model, tokens) / a_step / 1e12, 1),
        f"projected_hours_{SAMPLES}_samples": round(SAMPLES * a_step / 3600, 2),
        "losses": [round(result.loss, 4) for result in results],
        "gradient_norms": [result.norm for result in results],
        "skipped": sum(result.skipped for result in results),
    }
    if device.type == "cuda":
        figures["peak_reserved_gb"] = round(torch.cuda.max_memory_reserved(device) / 1e9, 2)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a few small layers, on a GPU or without one")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("needs a CUDA device; --tiny is a dry run without one")
    report: dict[str, Any] = {
        "command": "python benchmarks/e2e70b.py OUT.json" + (" --tiny" if args.tiny else ""),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": versions(),
        "matrix_tflops": round(matrix_rate(device, 256 if args.tiny else 8192) / 1e12, 1),
        "model": TINY if args.tiny else LLAMA_70B,
        "runs": [],
    }
    failed = False
    for text, limit in LIMITS_GB.items():
        figures = measure(Scheme.parse(text), TINY if args.tiny else LLAMA_70B, device)
        figures |= {"limit_gb": limit, "within_limit": figures["peak_gb"] <= limit}
        failed |= not figures["within_limit"] or figures["skipped"] > 0
        report["runs"].append(figures)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(figures, flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
