"""SmolLM2-135M-Instruct under the baselines' protocol: perplexity, seconds and memory of each setting.

    python benchmarks/smollm2.py MODEL WIKITEXT2 OUT.json [SETTING ...]

MODEL is the bf16 folder of examples/get_smollm2.py; WIKITEXT2 a folder with wiki.test.raw and
wiki.train.part.raw. A SETTING is recipe:scheme[:key=value,...], such as signround:w2g64,
signround:w2g64asym:preset=best or efficientqat:w2g64asym:samples=256, or it is 16-bit; without any, the whole
table is measured.

Protocol: calibration on random windows of 2048 tokens (seed 0) of the training text, 128 unless samples= or the
preset says otherwise; WikiText-2 raw test, non-overlapping windows of 2048, bf16, float32 logits. Seconds are
those of the quantization alone, everything that is compiled or captured included, evaluation left out, loading
too (but for a recipe that trains the whole model); peak memory is torch's. Settings were chosen on the
validation text.
"""

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import planish
from planish.data import join_rows
from planish.log import Event, versions
from planish.recipes import build, split_preset

SEQLEN = 2048
SCHEMES = ("w4g128", "w3g128", "w2g128", "w2g64")
KINDS = ("rtn:{}", "rtn:{}:search=true", "signround:{}")
TABLE = ["16-bit"]
TABLE += [kind.format(scheme + asym) for scheme in SCHEMES for asym in ("", "asym") for kind in KINDS]
TABLE += ["signround:w2g64:preset=best"]


def random_windows(ids: Tensor, samples: int) -> Tensor:
    """Windows at random starts, as the GPTQ loader takes them: they may overlap, as the peers' did."""
    starts = torch.randint(0, len(ids) - SEQLEN, (samples,), generator=torch.Generator().manual_seed(0))
    return torch.stack([ids[start : start + SEQLEN] for start in starts.tolist()])


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    text = join_rows(path.read_text(encoding="utf-8"))
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def measure(model: str, setting: str, train: Tensor) -> tuple[dict[str, Any], Any]:
    """Quantize once: (figures, model)."""
    if setting == "16-bit":
        return {}, planish.load(model)
    recipe, scheme, *rest = setting.split(":")
    keys: dict[str, Any] = dict(pair.split("=") for pair in rest[0].split(",")) if rest else {}
    seed = int(keys.pop("seed", 0))
    samples = int(keys.pop("samples", split_preset(recipe, keys.get("preset"))[1].get("samples", 128)))
    events: list[Event] = []
    start = time.perf_counter()
    quantized = planish.quantize(
        model, recipe, scheme, data=random_windows(train, samples), samples=samples, seqlen=SEQLEN, seed=seed,
        progress=events.append, **keys,
    )  # fmt: skip
    last = events[-1]
    seconds = last.seconds if build(recipe).whole is None else time.perf_counter() - start
    return {"seconds": round(seconds, 1), "peak_mib": round(last.peak_bytes / 2**20),
            "calibration_windows": samples, "seed": seed}, quantized  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="*", default=TABLE)
    parser.add_argument("--shared", action="store_true", help="other work ran on the GPU: seconds aren't to be quoted")
    parser.add_argument("--limit", type=int, help="evaluate only so many windows (dry runs)")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, test = (read(args.data / name, tokenizer) for name in ("wiki.train.part.raw", "wiki.test.raw"))
    rows: list[dict[str, Any]] = []
    for setting in args.settings:
        figures, quantized = measure(args.model, setting, train)
        rows.append(
            {"setting": setting, "test_perplexity": planish.perplexity(quantized, test, limit=args.limit), **figures}
        )
        print(json.dumps(rows[-1]), flush=True)
        del quantized
        report = {
            "command": " ".join(["python benchmarks/smollm2.py MODEL WIKITEXT2", args.out.name, *args.settings]),
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "alone": not args.shared,
            "versions": versions(),
            "rows": rows,
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
