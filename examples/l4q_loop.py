"""L4Q in a loop of one's own: finetune a float model so that what is trained is what is deployed.

    python examples/l4q_loop.py models/smollm2 --data train.jsonl [--out out/l4q] [--scheme w4g128] [--steps 32]

`planish.prepare` puts factors of low rank inside a quantizer on each linear of the blocks, `planish.parameter_groups`
gives them and the grids to any torch optimizer, `planish.convert` packs the model: codes and scales, no adapter. Rows
are conversations or text; the loss is on answers. `planish finetune --recipe l4q` does this with all around it.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import planish
from planish.instruct import load_examples

BATCH, WARMUP = 4, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="embedded", help="text or conversations")
    parser.add_argument("--out", type=Path, default=Path("out/l4q"))
    parser.add_argument("--scheme", default="w4g128")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    examples = load_examples(tokenizer, args.data, BATCH * args.steps, args.seqlen, 0)

    planish.prepare(model, "l4q", args.scheme, rank=args.rank)
    optimizer = torch.optim.AdamW(planish.parameter_groups(model, "l4q", rank=args.rank))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=args.steps, pct_start=WARMUP,
        cycle_momentum=False,
    )  # fmt: skip
    order = torch.randint(len(examples.ids), (args.steps, BATCH))
    for step, rows in enumerate(order):
        loss = model(examples.ids[rows].to(device), labels=examples.labels[rows].to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(f"step {step + 1}/{args.steps}  loss {loss.item():.4f}", flush=True)

    planish.convert(model)
    planish.save(model, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
