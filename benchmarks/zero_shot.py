"""Seven zero-shot tasks on full sets: through lm-eval, or by the same prompts without it.

    python benchmarks/zero_shot.py OUT.json DATA FOLDER... [--mmlu] [--limit N] [--plain] [--tiny]

DATA has one folder a task with a .jsonl file, and lm_eval_tasks with lm-eval's YAML files; FOLDER is any model that
`planish.load` takes. A row a model: accuracy and standard error by task, their mean, seconds, and the rows and tokens
that the model read, which say what the time is made of. --mmlu adds MMLU with 5 answered questions of the same subject
before each (L4Q's protocol). --plain needs no lm-eval: prompts are those below, equal to the YAML files'.

    scores(model, tokenizer, DATA, limit=None) -> {"arc_easy": 0.61, ..., "mean": 0.47, "stderr": {...}}

Likelihoods are compared as lm-eval's `acc` has them, not normalised by length. lambada counts a last word that is the
likeliest token by token.
"""

import argparse
import datetime
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import planish
from planish.eval.likelihood import Request, likelihoods
from planish.log import versions

Question = tuple[list[tuple[str, str]], int]  # (context, answer) pairs, and which is right


def _arc(row: dict[str, Any]) -> Question:
    choices = row["choices"]
    context = f"Question: {row['question']}\nAnswer:"
    return [(context, f" {text}") for text in choices["text"]], choices["label"].index(row["answerKey"])


def _boolq(row: dict[str, Any]) -> Question:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return [(context, " no"), (context, " yes")], int(row["label"] if "label" in row else row["answer"])


def _hellaswag(row: dict[str, Any]) -> Question:
    context = f"{row['activity_label']}: {row['ctx']}"
    return [(context, f" {text}") for text in row["endings"]], int(row["label"])


def _piqa(row: dict[str, Any]) -> Question:
    context = f"Question: {row['goal']}\nAnswer:"
    return [(context, f" {row['sol1']}"), (context, f" {row['sol2']}")], int(row["label"])


def _winogrande(row: dict[str, Any]) -> Question:
    before, after = row["sentence"].split("_", 1)
    return [(before + row[option], f" {after.strip()}") for option in ("option1", "option2")], int(row["answer"]) - 1


def _lambada(row: dict[str, Any]) -> Question:
    before, _, last = row["text"].rpartition(" ")
    return [(before, f" {last}")], 0


TASKS: dict[str, Callable[[dict[str, Any]], Question]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "lambada_openai": _lambada,
    "piqa": _piqa,
    "winogrande": _winogrande,
}


def read_lines(file: Path) -> list[dict[str, Any]]:
    # not splitlines(): JSON strings may hold U+2028 and the like
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _encoded(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[Request]:
    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    wholes, starts = ids([context + answer for context, answer in pairs]), ids([context for context, _ in pairs])
    cuts = [min(len(start), len(whole) - 1) for whole, start in zip(wholes, starts, strict=True)]
    return [(whole[:cut], whole[cut:]) for whole, cut in zip(wholes, cuts, strict=True)]


def scores(model: Any, tokenizer: Any, folder: Path, limit: int | None = None, batch: int | None = None) -> Any:
    """Accuracy by task, their mean, and standard errors.

    Args:
        limit: questions of each task, all if not given.
        batch: rows at once; by their tokens if not given.
    """
    found: dict[str, float] = {}
    errors = {}
    for name, read in TASKS.items():
        (file,) = sorted((folder / name).glob("*.jsonl"))
        rows = read_lines(file)[:limit]
        questions = [read(row) for row in rows]
        values = iter(likelihoods(model, _encoded(tokenizer, [p for pairs, _ in questions for p in pairs]),
                                  batch_size=batch))  # fmt: skip
        right = 0
        for pairs, label in questions:
            mine = [next(values) for _ in pairs]
            right += mine[0][1] if len(mine) == 1 else max(range(len(mine)), key=lambda i: mine[i][0]) == label  # noqa: B023
        share = right / len(questions)
        found[name] = round(share, 4)
        errors[name] = round(math.sqrt(share * (1 - share) / max(len(questions) - 1, 1)), 4)
    return {**found, "mean": round(sum(found.values()) / len(found), 4), "stderr": errors}


def mmlu(data: Path) -> list[tuple[dict[str, Any], int]]:
    """MMLU's subjects as tasks of lm-eval's, the shots of each its own five; and the questions of each."""
    import datasets

    choices = "".join(f"{letter}. {{{{choices[{index}]}}}}\n" for index, letter in enumerate("ABCD"))
    dev, test = (read_lines(data / "mmlu" / f"{name}.jsonl") for name in ("dev", "test"))
    found = []
    for subject in sorted({row["subject"] for row in test}):
        own = {name: datasets.Dataset.from_list([row for row in split if row["subject"] == subject])
               for name, split in (("dev", dev), ("test", test))}  # fmt: skip
        title = subject.replace("_", " ")
        task = {
            "task": f"mmlu_{subject}",
            "custom_dataset": lambda own=own, **_: own,
            "output_type": "multiple_choice",
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "description": f"The following are multiple choice questions (with answers) about {title}.\n\n",
            "doc_to_text": "{{question.strip()}}\n" + choices + "Answer:",
            "doc_to_target": "answer",
            "doc_to_choice": ["A", "B", "C", "D"],
            "metric_list": [{"metric": "acc"}],
        }
        found.append((task, len(own["test"])))
    return found


def mmlu_score(model: Any, data: Path, how: dict[str, Any]) -> dict[str, float]:
    """Accuracy over all questions, and its standard error."""
    tasks = mmlu(data)
    found = planish.evaluate(model, [task for task, _ in tasks], shots=5, **how)
    counts = [min(count, how["limit"] or count) for _, count in tasks]
    values = [found[task["task"]] for task, _ in tasks]
    total = sum(counts)
    acc = sum(count * value["acc"] for count, value in zip(counts, values, strict=True)) / total
    error = math.hypot(*(count * value.get("stderr", 0.0) for count, value in zip(counts, values, strict=True))) / total
    return {"acc": round(acc, 4), "stderr": round(error, 4)}


def by_lm_eval(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The same through `planish.evaluate`."""
    counts: dict[str, int] = {}
    how: dict[str, Any] = {"tokenizer": tokenizer, "limit": args.limit, "task_data": args.data, "counts": counts}
    tasks = {} if args.only_mmlu else planish.evaluate(model, list(TASKS), **how)
    found: dict[str, Any] = {"tasks": tasks, **counts}
    if tasks:
        found["mean"] = round(sum(metrics["acc"] for metrics in tasks.values()) / len(tasks), 4)
    if args.mmlu or args.only_mmlu:
        more: dict[str, int] = {}
        found["mmlu, 5-shot"] = {**mmlu_score(model, args.data, {**how, "counts": more}), **more}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--plain", action="store_true", help="without lm-eval")
    parser.add_argument("--mmlu", action="store_true")
    parser.add_argument("--only-mmlu", action="store_true")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device")
    parser.add_argument("--tiny", action="store_true", help="three questions of each on the CPU: a dry run")
    args = parser.parse_args()
    if args.tiny:
        args.limit, args.device = 3, "cpu"
    report = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": []}
    for folder in args.models:
        model, tokenizer = planish.load(folder, device=args.device), AutoTokenizer.from_pretrained(folder)
        start = time.perf_counter()
        found = scores(model, tokenizer, args.data, args.limit) if args.plain else by_lm_eval(model, tokenizer, args)
        seconds = round(time.perf_counter() - start, 1)
        row = {"model": folder, "plain": args.plain, "limit": args.limit, "seconds": seconds, **found}
        print(json.dumps(row), flush=True)
        report |= {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
            "versions": versions(),
            "rows": [*report["rows"], row],
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
