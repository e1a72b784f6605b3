"""L4Q by TRL's SFTTrainer: a prepared model is an ordinary one, whatever trains it.

    pip install trl datasets
    python examples/l4q_trl.py models/smollm2 --data train.jsonl [--out out/l4q] [--scheme w4g128] [--steps 32]

Rows of the data have a "text", or "messages", as TRL takes them. The optimizer comes from
`planish.parameter_groups`, since grids and factors have rates of their own.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import planish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, help="a .jsonl file")
    parser.add_argument("--out", type=Path, default=Path("out/l4q"))
    parser.add_argument("--scheme", default="w4g128")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    planish.prepare(model, "l4q", args.scheme, rank=args.rank)
    optimizer = torch.optim.AdamW(planish.parameter_groups(model, "l4q", rank=args.rank))
    with tempfile.TemporaryDirectory() as folder:
        how = SFTConfig(
            output_dir=folder, max_steps=args.steps, max_length=args.seqlen, per_device_train_batch_size=4,
            lr_scheduler_type="cosine", warmup_steps=args.steps // 10, max_grad_norm=1.0, report_to="none",
            save_strategy="no", logging_steps=1, bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=how, train_dataset=load_dataset("json", data_files=args.data, split="train"),
            processing_class=AutoTokenizer.from_pretrained(args.model), optimizers=(optimizer, None),
        )  # fmt: skip
        trainer.train()
    planish.convert(model)
    planish.save(model, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
