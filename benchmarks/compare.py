"""Recipes compared under one protocol: seconds, peak memory and perplexity, over several seeds.

    python benchmarks/compare.py OUT.json MODEL WIKITEXT2 --recipes planish,signround --schemes w2g64,w3g128
        [--seeds 3] [--first-seed 0] [--calibration wikitext|mix|c4_sample=3,gsm8k=1] [--texts valid|test]
        [--limit N] [--tiny]

A recipe may have a scheme and keys of its own: planish:w2g64:distill=0.9,e2e_epochs=4 (a scheme there goes before
--schemes; samples= counts windows, seqlen= their tokens; preset= is one of the recipe's; data= and watch= name texts
as `planish quantize` takes them, a mix joined by +: data=self, data=a.txt+b.jsonl). 16-bit is the float model. One
that trains a model that is quantized already starts from a folder, which --keep FOLDER wrote of a setting before:
end-to-end settings are so compared without fitting the blocks for each:

    --keep W2 --recipes planish:w2g64:end_to_end=false
    --recipes "e2e_qp:w2g64:start=W2,distill=1 e2e_qp:w2g64:start=W2,distill=1,norm_rate=1e-3"

MODEL is the bf16 folder of examples/get_smollm2.py; WIKITEXT2 a folder with wiki.train.part.raw, wiki.valid.tokens and
wiki.test.raw. Settings are chosen on the validation text, sentences with left-out words dropped, whose perplexity is
always measured: valid, its spaced punctuation undone by simple rules, and spaced, as it is; test is measured only by
--texts test. Calibration: random windows of 2048 tokens of the training text, drawn by the seed; or a mix as `planish
quantize --data` takes it, of folders beside WIKITEXT2 that hold no WikiText, each of a weight: `mix` is c4_sample,
debian_docs, python_source and gsm8k in equal parts; `own` is what benchmarks/own.py wrote to own/. Each row is written
as soon as it is had, and rows that OUT.json holds already aren't measured again. Seconds are those of
`planish.quantize` (or `planish.finetune`), whole, loading and compiling included; until says when each stage's last
step was done.
"""

import argparse
import datetime
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import planish
from planish.data import join_rows
from planish.log import versions
from planish.recipes import split_preset

MIX = {"c4_sample": "train.jsonl", "debian_docs": "*.jsonl", "python_source": "*.jsonl", "gsm8k": "train.jsonl"}
PARTS = MIX | {"own": "*.jsonl"}
_SHARE = rf"({'|'.join(PARTS)})=[0-9.]+"
_SHARES = f"{_SHARE}(,{_SHARE})*"


def whole_sentences(text: str) -> str:
    """WikiText's tokenised variant without the sentences that hold words it leaves out, `<unk>`, which occur in no
    other text, and whose loss swings by several percent between models that are alike."""
    rows = [[part for part in re.split(r"(?<= \.) ", row) if "<unk>" not in part] for row in text.split("\n")]
    return "\n".join(" ".join(row) for row in rows if row)


def detokenised(text: str) -> str:
    """Its whole sentences as ordinary text."""
    text = whole_sentences(text)
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    text = re.sub(r" ([.,;:!?%)\]]|'s|'t|'re|'ve|'d|'m|'ll|n't)(?=\s)", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    return re.sub(r'" ([^"\n]*?) "', r'"\1"', text)


def mixture(root: Path, shares: str) -> str:
    """A mix in the words of `planish quantize --data`; a domain's weight is shared by its files.

    Args:
        shares: "mix" or name=weight,...; names are those of PARTS.
    """
    weights = dict.fromkeys(MIX, 1.0) if shares == "mix" else {
        name: float(weight) for name, weight in (pair.split("=") for pair in shares.split(","))}  # fmt: skip
    found: list[tuple[str, float]] = []
    for name, weight in weights.items():
        files = sorted((root / name).glob(PARTS[name]))
        found += [(str(file), weight / len(files)) for file in files]
    if len(found) == 1:  # one source has no weight
        return found[0][0]
    return ",".join(f"{file}:{weight:.4f}" for file, weight in found)


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    """int64 [tokens], all at once and without special ones."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def windows(texts: list[Tensor], samples: int, seqlen: int, seed: int) -> Tensor:
    """Windows at random starts, as the GPTQ loader takes them, of the texts in turn."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(samples):
        ids = texts[index % len(texts)]
        start = int(torch.randint(0, len(ids) - seqlen, (1,), generator=generator))
        found.append(ids[start : start + seqlen])
    return torch.stack(found)[torch.randperm(samples, generator=generator)]


def parse(recipes: str, schemes: str) -> list[tuple[str, str, dict[str, str]]]:
    """(recipe, scheme, keys) of each setting; a list is separated by commas, or by spaces where settings have keys."""
    found = []
    for text in recipes.split() if ":" in recipes else recipes.split(","):
        name, *rest = text.split(":")
        if name == "16-bit":
            found.append((name, "", {}))
            continue
        own = [part for part in rest if part and "=" not in part]
        keys = dict(pair.split("=") for part in rest if "=" in part for pair in part.split(","))
        found += [(name, scheme, keys) for scheme in own or schemes.split(",")]
    return found


def measure(
    args: argparse.Namespace, setting: tuple[str, str, dict[str, str]], seed: int, texts: Any
) -> dict[str, Any]:
    """One row."""
    recipe, scheme, keys = setting
    row: dict[str, Any] = {"recipe": recipe, "scheme": scheme, "keys": keys, "seed": seed,
                           "calibration": args.calibration}  # fmt: skip
    if recipe == "16-bit":
        model = planish.load(args.model)
    else:
        own = dict(keys)
        preset, folder = own.pop("preset", None), own.pop("start", None)
        data, watch = own.pop("data", None), own.pop("watch", None)
        samples = int(own.pop("samples", split_preset(recipe, preset)[1].get("samples", 128)))
        seqlen = int(own.pop("seqlen", 2048))
        samples, seqlen = (32, 64) if args.tiny else (samples, seqlen)
        about = {
            "data": data.replace("+", ",") if data else texts["calibration"](samples, seqlen, seed),
            "watch": watch,
            "samples": samples,
            "seqlen": seqlen,
            "seed": seed,
            "preset": preset,
        }
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        marks: dict[str, float] = {}
        start = time.perf_counter()
        about["progress"] = lambda event: marks.update({event.stage: round(time.perf_counter() - start, 1)})
        if folder is None:
            batch = {"batch_size": int(own.pop("batch_size"))} if "batch_size" in own else {}
            model = planish.quantize(args.model, recipe, scheme, **about, **batch, **own)
        else:
            with tempfile.TemporaryDirectory() as out:
                planish.finetune(folder, Path(out) / "tuned", recipe, teacher=args.model, keys=own, **about)
                model = planish.load(Path(out) / "tuned")
        row |= {"seconds": round(time.perf_counter() - start, 1), "until": marks, "windows": samples}
        if torch.cuda.is_available():
            row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        if args.keep and folder is None:  # never over the folder that other settings start from
            planish.save(model, args.keep, format="native", overwrite=True)
    limit, seqlen = (1, 64) if args.tiny else (args.limit, 2048)
    for name in ("valid", "spaced", "test") if args.texts == "test" else ("valid", "spaced"):
        row[name] = round(planish.perplexity(model, texts[name], seqlen=seqlen, limit=limit), 4)
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By setting the mean over seeds, and the largest minus the smallest."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[key] for key in ("recipe", "scheme", "keys", "calibration")]), []).append(row)
    found = []
    for members in groups.values():
        one = {key: members[0][key] for key in ("recipe", "scheme", "keys", "calibration")} | {"seeds": len(members)}
        for key in ("seconds", "valid", "spaced", "test"):
            values = [member[key] for member in members if key in member]
            if values:
                one |= {key: round(statistics.mean(values), 3), f"{key}_spread": round(max(values) - min(values), 3)}
        found.append(one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipes", default="planish")
    parser.add_argument("--schemes", default="w2g64,w2g128,w3g128,w4g128")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--calibration", default="wikitext", help="or mix, or folder=weight,...")
    parser.add_argument("--texts", choices=("valid", "test"), default="valid")
    parser.add_argument("--keep", type=Path, help="folder for the quantized model, of the last setting without a start")
    parser.add_argument("--shared", action="store_true", help="other work ran on the GPU: seconds aren't to be quoted")
    parser.add_argument("--limit", type=int, help="windows of each text that perplexity is measured on")
    parser.add_argument("--tiny", action="store_true", help="short windows and one step's worth: a dry run")
    args = parser.parse_args()
    if args.calibration not in ("wikitext", "mix") and not re.fullmatch(_SHARES, args.calibration):
        parser.error(f"--calibration {args.calibration}: wikitext, mix, or shares of {', '.join(PARTS)}: c4_sample=3")
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def file(name: str) -> str:
        return (args.data / name).read_text(encoding="utf-8")

    checked = join_rows(file("wiki.valid.tokens"))
    texts: dict[str, Any] = {
        "valid": tokens_of(tokenizer, detokenised(checked)),
        "spaced": tokens_of(tokenizer, whole_sentences(checked)),
    }
    if args.texts == "test":
        texts["test"] = tokens_of(tokenizer, join_rows(file("wiki.test.raw")))
    if args.calibration == "wikitext":
        train = tokens_of(tokenizer, join_rows(file("wiki.train.part.raw")))
        texts["calibration"] = lambda samples, seqlen, seed: windows([train], samples, seqlen, seed)
    else:
        texts["calibration"] = lambda *_: mixture(args.data.parent, args.calibration)
    report = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": []}
    for setting in parse(args.recipes, args.schemes):
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        for seed in [0] if setting[0] == "16-bit" else seeds:
            about = {"recipe": setting[0], "scheme": setting[1], "keys": setting[2], "seed": seed}
            wanted = about | {"calibration": args.calibration}
            if any(all(row[key] == value for key, value in wanted.items()) and args.texts in row
                   for row in report["rows"]):  # fmt: skip
                continue
            try:
                row = measure(args, setting, seed, texts)
            except torch.OutOfMemoryError as error:
                row = wanted | {"error": str(error).splitlines()[0]}
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            report |= {
                "command": f"python benchmarks/compare.py {args.out.name} MODEL WIKITEXT2 --recipes {args.recipes!r} "
                f"--schemes {args.schemes} --seeds {args.seeds} --calibration {args.calibration} --texts {args.texts}"
                + (f" --limit {args.limit}" if args.limit else ""),
                "date": datetime.date.today().isoformat(),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "alone": not args.shared,
                "versions": versions(),
                "summary": summary(report["rows"]),
            }
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
