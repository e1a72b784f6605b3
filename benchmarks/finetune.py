"""Ways to fine-tune a model that shall have few bits, under one budget of tokens: held-out loss and accuracy on GSM8K.

    python benchmarks/finetune.py OUT.json MODEL DATA WORK [--rows "lora qlora:w2g64 ..."] [--texts valid|test] [--tiny]

MODEL is the bf16 folder of examples/get_smollm2.py; DATA has gsm8k/ and self_instruct_seed/ with .jsonl files; WORK is
a folder for what rows share (text, models to start from, adapters). A row is NAME[:SCHEME][:key=value,...]:

    16-bit        the model as it is                    ptq       quantized, not trained (--ptq names the recipe)
    lora          LoRA in 16 bits (peft)                qlora     LoRA on the frozen weights of ptq, not merged
    qlora-merged  that adapter merged, quantized again by `requantize=` (rtn, searched, if not given)
    anything else a recipe, through planish.finetune: from the float model, or from start=, which is ptq or a recipe
                  (l4q:w2g64:start=block_ap,distill=0.02); e2e_qp always starts so, at ptq if nothing is said

lora and qlora take rate=, rank= and alpha=. All train on the same windows for the same epochs, on answers only. The
loss is the mean over the tokens of answers held out; accuracy the share of questions whose final number is exact, by
greedy decoding. Both are of a valid split cut from train by a seed; with --texts test accuracy is of GSM8K's test set,
and the loss of both, once.
Each row is written as soon as it is had, and rows that OUT.json holds aren't run again.
"""

import argparse
import datetime
import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import planish
from planish.bench import dense
from planish.data import Chat, Conversation, encode
from planish.errors import PlanishError
from planish.eval.answers import answers
from planish.instruct import Examples, load_examples
from planish.log import versions
from planish.recipes import RECIPES, describe

SCHEMES = ("w4g128", "w3g128", "w2g64")
ROWS = ("ptq", "qlora", "qlora-merged", "peqa", "lrqat", "l4q", "l4q:start=block_ap,distill=0.02")
FROM_QUANTIZED = ("e2e_qp",)
VALID = 512  # questions cut from GSM8K's train split; and VALID_OTHER instructions of the other set
VALID_OTHER = 16
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def conversations(data: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of messages: train, valid and test; GSM8K's questions come first in the last two."""

    def rows(name: str) -> list[dict[str, Any]]:
        # not splitlines(): JSON strings may hold U+2028 and the like
        return [json.loads(line) for line in (data / name).read_text(encoding="utf-8").split("\n") if line]

    def chat(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    def shuffled(found: list[Any]) -> list[Any]:
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        return [found[index] for index in order.tolist()]

    sums, test = ([chat(row["question"], row["answer"]) for row in rows(f"gsm8k/{name}.jsonl")]
                  for name in ("train", "test"))  # fmt: skip
    asked = [(f"{row['instruction']}\n\n{row['input']}".strip(), row["output"])
             for row in rows("self_instruct_seed/train.jsonl")]  # fmt: skip
    sums, others = shuffled(sums), shuffled([chat(*pair) for pair in asked])
    return {
        "train": sums[VALID:] + others[VALID_OTHER:],
        "valid": sums[:VALID] + others[:VALID_OTHER],
        "test": test,
    }


class Bench:
    """What rows share: text, windows, and models to start from, made once in the work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work
        self.device = "cpu" if args.tiny or not torch.cuda.is_available() else "cuda"
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.chats = conversations(args.data, args.seed)
        self.work.mkdir(parents=True, exist_ok=True)
        for name, rows in self.chats.items():
            file = self.work / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def examples(self, name: str, samples: int) -> Examples:
        return load_examples(self.tokenizer, self.work / f"{name}.jsonl", samples, self.args.seqlen, self.args.seed)

    def about(self) -> dict[str, Any]:
        """What every training has in common."""
        args = self.args
        return {"data": self.work / "train.jsonl", "samples": args.windows, "seqlen": args.seqlen, "seed": args.seed,
                "device": self.device}  # fmt: skip

    def start(self, recipe: str, scheme: str) -> Path:
        """A folder of the model quantized by a recipe, or by --ptq's."""
        name, _, preset = (self.args.ptq if recipe == "ptq" else recipe).partition("@")
        folder = self.work / f"{name}{preset}-{scheme}"
        if not folder.is_dir():
            few = {"samples": self.args.windows} if self.args.tiny else {"samples": 128}
            planish.quantize_to(self.args.model, folder, name, scheme, preset=preset or None, format="native",
                                **{**self.about(), **few})  # fmt: skip
        return folder

    def loss(self, model: Any, name: str) -> float:
        """Mean over the tokens of the answers."""
        found = self.examples(name, 4 if self.args.tiny else 100_000)
        total, count = 0.0, 0
        with torch.no_grad():
            for ids, labels in zip(found.ids.split(8), found.labels.split(8), strict=True):
                total += float(answer_loss(model, ids.to(self.device), labels.to(self.device)))
                count += int((labels[:, 1:] != -100).sum())
        return total / count

    def accuracy(self, model: Any, name: str) -> tuple[float, float]:
        """Share of questions whose final number is exact, and its standard error."""
        rows = self.chats[name][: min(self.args.questions, VALID)]
        chat = Chat(self.tokenizer, name)
        asked = (Conversation(row["messages"][:1], name) for row in rows)
        prompts = [encode(self.tokenizer, chat.render(turn, add_generation_prompt=True)) for turn in asked]
        given = answers(model, prompts, new_tokens=self.args.new_tokens, batch_size=self.args.questions)
        texts = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in given)
        right = [final_number(text) == final_number(row["messages"][1]["content"])
                 for text, row in zip(texts, rows, strict=True)]  # fmt: skip
        share = sum(right) / len(right)
        return share, math.sqrt(share * (1 - share) / max(len(right) - 1, 1))


def final_number(text: str) -> float | None:
    """The number behind ####, else the last one."""
    found = NUMBER.findall(text.rpartition("####")[2])
    return float(found[0 if "####" in text else -1].replace(",", "")) if found else None


def answer_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Sum over the tokens that have a label."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def with_lora(bench: Bench, model: Any, keys: dict[str, str]) -> Any:
    """A model whose peft adapter was trained: AdamW, a cosine, losses divided by the answers' tokens of the step."""
    from peft import LoraConfig, get_peft_model

    args, rate, rank = bench.args, float(keys.get("rate", 5e-4)), int(keys.get("rank", 16))
    torch.manual_seed(args.seed)
    config = LoraConfig(r=rank, lora_alpha=float(keys.get("alpha", 2 * rank)), target_modules="all-linear")
    model = get_peft_model(model, config)
    train = bench.examples("train", args.windows)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    steps = max(int(len(train.ids) * args.epochs) // args.batch, 1)
    drawn = torch.Generator().manual_seed(args.seed)
    order = torch.cat([torch.randperm(len(train.ids), generator=drawn) for _ in range(math.ceil(args.epochs) + 1)])
    model.train()
    for step in range(steps):
        rise = min((step + 1) / max(0.03 * steps, 1), 1.0)
        optimizer.param_groups[0]["lr"] = rate * rise * (1 + math.cos(math.pi * step / steps)) / 2
        index = order[step * args.batch : (step + 1) * args.batch]
        count = (train.labels[index][:, 1:] != -100).sum()
        for part in index.split(args.micro):
            ids, labels = (tensor[part].to(bench.device) for tensor in (train.ids, train.labels))
            with torch.autocast(bench.device, torch.bfloat16, enabled=bench.device == "cuda"):
                loss = answer_loss(model, ids, labels) / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def dense_folder(bench: Bench, scheme: str) -> Path:
    """The ptq model with its weights in 16 bits: what QLoRA multiplies by."""
    folder = bench.work / f"dense-{scheme}"
    if not folder.is_dir():
        quantized = dense(planish.load(bench.start("ptq", scheme), device="cpu"))
        model = AutoModelForCausalLM.from_pretrained(bench.args.model, dtype=quantized.dtype)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(bench.work / "dense-new")
        bench.tokenizer.save_pretrained(bench.work / "dense-new")
        (bench.work / "dense-new").rename(folder)
    return folder


def qlora(bench: Bench, scheme: str, keys: dict[str, str]) -> Any:
    """The trained model; its adapter stays in the work folder for the merged row."""
    model = with_lora(bench, planish.load(dense_folder(bench, scheme), device=bench.device), keys)
    model.save_pretrained(adapter_folder(bench, scheme, keys))
    return model


def adapter_folder(bench: Bench, scheme: str, keys: dict[str, str]) -> Path:
    own = "".join(f"-{key}{value}" for key, value in sorted(keys.items()) if key != "requantize")
    return bench.work / f"adapter-{scheme}{own}"


def merged(bench: Bench, scheme: str, keys: dict[str, str]) -> Any:
    """The adapter in the weights, and these quantized again."""
    folder = adapter_folder(bench, scheme, keys)
    if not folder.is_dir():
        qlora(bench, scheme, keys)
    name, _, preset = keys.get("requantize", "rtn").partition("@")
    how = {"search": True} if name == "rtn" else {}
    about = {**bench.about(), "samples": min(bench.args.windows, 128)}
    return planish.quantize(str(dense_folder(bench, scheme)), name, scheme, preset=preset or None, adapter=folder,
                            **about, **how)  # fmt: skip


def by_recipe(bench: Bench, name: str, scheme: str, keys: dict[str, str]) -> Any:
    """A recipe through planish.finetune; its folder is removed again."""
    own, args = describe(name)["keys"], bench.args
    keys = dict(keys)
    start = keys.pop("start", "ptq" if name in FROM_QUANTIZED else None)
    folder = None if start is None else bench.start(start, scheme)
    budget = {"epochs": args.epochs, "batch_size": args.batch}
    counts = {f"e2e_{key}" if f"e2e_{key}" in own else key: value for key, value in budget.items()}
    if folder is not None and "start" in own:
        keys["start"], folder = str(folder), None  # beside the float model
    model, text = (args.model, scheme) if folder is None else (folder, None)
    out = bench.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    planish.finetune(model, out, name, text, batch_size=args.micro, keys={**counts, **keys}, **bench.about())
    found = planish.load(out, device=bench.device)
    shutil.rmtree(out)
    return found


def made(bench: Bench, row: str) -> tuple[Any, dict[str, Any]]:
    """The model of a row, and what making it took."""
    name, scheme, keys = parse(row)
    for start in {keys.get("start", "ptq"), "ptq"} if name not in ("16-bit", "lora") else ():
        if scheme and (start == "ptq" or start in RECIPES):
            bench.start(start, scheme)  # what rows share isn't a row's time
    began = time.perf_counter()
    if name == "16-bit":
        model = planish.load(bench.args.model, device=bench.device)
    elif name == "ptq":
        model = planish.load(bench.start("ptq", scheme), device=bench.device)
    elif name == "lora":
        model = with_lora(bench, planish.load(bench.args.model, device=bench.device), keys)
    elif name in ("qlora", "qlora-merged"):
        model = (qlora if name == "qlora" else merged)(bench, scheme, keys)
    else:
        model = by_recipe(bench, name, scheme, keys)
    pure = name not in ("16-bit", "lora", "qlora")
    return model, {"only_few_bits": pure, "seconds": round(time.perf_counter() - began, 1)}


def parse(row: str) -> tuple[str, str, dict[str, str]]:
    """NAME[:SCHEME][:key=value,...]"""
    name, *rest = row.split(":")
    scheme = next((part for part in rest if "=" not in part), "")
    return name, scheme, dict(pair.split("=", 1) for part in rest if "=" in part for pair in part.split(","))


def every_row(rows: str | None) -> list[str]:
    """As asked for; a row without a scheme is one of each. Of the default ones those whose recipe is there."""
    asked = rows.split() if rows else ["16-bit", "lora", *ROWS]
    own = ("16-bit", "lora", "ptq", "qlora", "qlora-merged", "peqa")
    found = []
    for row in asked:
        name, scheme, _ = parse(row)
        if not rows and name not in own and name not in RECIPES:
            print(f"{row}: there is no such recipe yet, left out", flush=True)
        elif scheme or name in ("16-bit", "lora"):
            found.append(row)
        else:
            found += [":".join([name, scheme, *row.split(":")[1:]]) for scheme in SCHEMES]
    return found


def measure(bench: Bench, row: str) -> dict[str, Any]:
    model, facts = made(bench, row)
    began = time.perf_counter()
    for name in ("valid", "test") if bench.args.texts == "test" else ("valid",):
        facts[f"{name}_loss"] = round(bench.loss(model, name), 4)
        if bench.args.questions and name == bench.args.texts:
            share, error = bench.accuracy(model, name)
            facts |= {f"{name}_accuracy": round(share, 4), f"{name}_stderr": round(error, 4)}
    return {**facts, "evaluation_seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", help="separated by spaces; all if not given")
    parser.add_argument("--texts", choices=("valid", "test"), default="valid")
    parser.add_argument("--ptq", default="planish@light", help="RECIPE[@PRESET] of the models to start from")
    parser.add_argument("--windows", type=int, default=2048)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--micro", type=int, default=16, help="windows in one pass")
    parser.add_argument("--questions", type=int, default=400, help="for accuracy; 0 measures the loss alone")
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="four windows, two questions, on the CPU: a dry run")
    args = parser.parse_args()
    if args.tiny:
        args.windows, args.seqlen, args.epochs, args.batch, args.micro = 4, 256, 1.0, 2, 2
        args.questions, args.new_tokens, args.ptq = 2, 8, "rtn"
    bench = Bench(args)
    shared = ("windows", "seqlen", "epochs", "batch", "questions", "seed", "ptq")
    budget = {name: getattr(args, name) for name in shared}
    report = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": []}
    for row in every_row(args.rows):
        facts = {"row": row, **budget}
        done = [known for known in report["rows"] if all(known.get(key) == value for key, value in facts.items())]
        if any(f"{args.texts}_loss" in known for known in done):
            continue
        try:
            facts |= measure(bench, row)
        except (PlanishError, ImportError, torch.OutOfMemoryError) as error:
            facts["error"] = str(error).splitlines()[0]
        print(json.dumps(facts), flush=True)
        report |= {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if bench.device == "cuda" else "cpu",
            "versions": versions(),
            "rows": [*(known for known in report["rows"] if known not in done or "error" not in known), facts],
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
