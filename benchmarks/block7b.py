"""One Llama-2-7B-shaped block with random weights: how fast the fit runs, and against auto-round.

    python benchmarks/block7b.py OUT.json [--auto-round TOKENIZER] [--steps 200]

Cached inputs are 128 x 2048 tokens (embeddings of random tokens), batch 8, bf16. The rate counts the
arithmetic that the fit needs (forward, gradients of inputs and weights, attention with its causal half)
over the time of the steps, next to the rate of a large matrix product measured on the same GPU. With
--auto-round the peer tunes the same block on the same windows, and both are held against eight windows
that neither saw: mean squared error of the block's output. Last, three blocks with the defaults stand for
the whole model of 32.
"""

import argparse
import datetime
import json
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import planish
from planish.log import versions

TOKENS, SAMPLES, BATCH, WIDTH = 2048, 128, 8, 4096
DEVICE = "cuda"


def model_7b(blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=WIDTH, intermediate_size=WIDTH * 43 // 16, num_hidden_layers=blocks,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    return model.eval().requires_grad_(False)


def matrix_rate() -> float:
    """FLOP/s of an 8192 x 8192 x 8192 bf16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        a @ b
    end.record()
    end.synchronize()
    return 20 * 2 * 8192**3 / (start.elapsed_time(end) / 1e3)


def step_flops(model: LlamaForCausalLM) -> float:
    """Arithmetic of one step: 6 a weight and token, and 3.5 times the forward of causal attention."""
    block, hidden = model.model.layers[0], model.config.hidden_size
    weights = sum(module.weight.numel() for module in block.modules() if isinstance(module, torch.nn.Linear))
    attention = 4 * BATCH * TOKENS * TOKENS / 2 * hidden * 3.5
    return 6 * weights * BATCH * TOKENS + attention


@torch.no_grad()
def block_output(model, ids: torch.Tensor) -> torch.Tensor:
    """What the block makes of the windows, before the final norm: fp32 [n, tokens, hidden]."""
    kept = []
    handle = model.model.layers[0].register_forward_hook(
        lambda module, args, out: kept.append((out[0] if isinstance(out, tuple) else out).float())
    )
    model.model(ids, use_cache=False)
    handle.remove()
    return kept[0]


def ours(model, ids: torch.Tensor, scheme: str, steps: int, **keys) -> tuple[dict, object]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    events: list = []
    start = time.perf_counter()
    quantized = planish.quantize(
        model,
        "signround",
        scheme,
        data=ids,
        samples=len(ids),
        seqlen=TOKENS,
        steps=steps,
        progress=events.append,
        **keys,
    )
    torch.cuda.synchronize()
    return {
        "steps": steps,
        **keys,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "before": events[-1].before,
        "after": events[-1].after,
    }, quantized


def peer(model, ids: torch.Tensor, scheme: planish.Scheme, tokenizer: str, steps: int):
    import auto_round
    import auto_round.calib_dataset as calibration
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoTokenizer

    loader = [{"input_ids": w, "attention_mask": torch.ones_like(w)} for w in ids.split(BATCH)]
    calibration.get_dataloader = lambda *args, **kwargs: loader
    how = QuantizationScheme(
        bits=scheme.bits, group_size=scheme.group_size, sym=scheme.symmetric, data_type="int", act_bits=16
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    tuned, _ = auto_round.AutoRound(
        model,
        AutoTokenizer.from_pretrained(tokenizer),
        scheme=how,
        iters=steps,
        nsamples=len(ids),
        seqlen=TOKENS,
        batch_size=BATCH,
        dataset="fixed-windows",
    ).quantize()
    torch.cuda.synchronize()
    return {
        "version": auto_round.__version__,
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }, tuned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--auto-round", metavar="TOKENIZER")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--scheme", default="w4g128")
    args = parser.parse_args()
    scheme = planish.Scheme.parse(args.scheme)
    ids = torch.randint(0, 4096, (SAMPLES + 8, TOKENS), generator=torch.Generator().manual_seed(1))
    unseen, ids = ids[:8].to(DEVICE), ids[8:]
    report: dict = {
        "command": f"python benchmarks/block7b.py OUT.json --steps {args.steps} --scheme {args.scheme}"
        + (" --auto-round TOKENIZER" if args.auto_round else ""),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
    }
    model = model_7b(1)
    target = block_output(model, unseen)

    def write() -> None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    def loss(quantized) -> float:
        return (block_output(quantized.to(DEVICE), unseen) - target).square().mean().item()

    rate, flops = matrix_rate(), step_flops(model)
    report |= {"matrix_tflops": round(rate / 1e12, 1), "step_tflop": round(flops / 1e12, 2), "ours": []}
    for compile in (False, True):
        rows = []
        for steps in (args.steps // 4, args.steps // 2, args.steps):
            row, quantized = ours(model, ids, args.scheme, steps, compile=compile, span=1)
            rows.append({**row, "unseen_loss": loss(quantized)})
            del quantized
            print(rows[-1], flush=True)
        a_step = (rows[-1]["seconds"] - rows[-2]["seconds"]) / (args.steps - args.steps // 2)
        summary = {"compile": compile, "step_ms": round(1e3 * a_step, 2),
                   "share_of_matrix_rate": round(flops / a_step / rate, 3)}  # fmt: skip
        report["ours"].append({**summary, "runs": rows})
        print(summary, flush=True)
    write()
    whole, _ = ours(model_7b(3), ids, args.scheme, args.steps)
    report["whole_model"] = {**whole, "blocks": 3, "projected_seconds_32_blocks": round(whole["seconds"] / 3 * 32)}
    print(report["whole_model"], flush=True)
    write()
    if args.auto_round:
        row, tuned = peer(model.to("cpu"), ids, scheme, args.auto_round, args.steps)
        report["auto_round"] = {**row, "unseen_loss": loss(tuned)}
        del tuned
        print(report["auto_round"], flush=True)
    write()


if __name__ == "__main__":
    main()
