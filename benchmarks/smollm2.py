"""SmolLM2-135M-Instruct under the baselines' protocol: perplexity, seconds and memory of each setting.

    python benchmarks/smollm2.py MODEL WIKITEXT2 OUT.json [SETTING ...]

MODEL is the bf16 folder of examples/get_smollm2.py; WIKITEXT2 a folder with wiki.test.raw,
wiki.train.part.raw and wiki.valid.tokens. A SETTING is recipe:scheme[:key=value,...], such as
signround:w2g64 or signround:w2g64:preset=best; without any, the table of the README is measured.

Protocol: calibration on random windows of 2048 tokens (seed 0) of the training text, 128 unless the preset
says otherwise; WikiText-2 raw test, non-overlapping windows of 2048, bf16, float32 logits. Seconds are those
of the quantization alone, everything that is compiled or captured included, loading and evaluation left
out; peak memory is torch's. Settings were chosen on the validation text.
"""

import datetime
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

import planish
from planish.data import join_rows
from planish.log import versions
from planish.recipes import split_preset

SCHEMES = ("w4g128", "w3g128", "w2g128", "w2g64")
TABLE = [
    f"{recipe}:{scheme}{kind}{keys}"
    for scheme in SCHEMES
    for kind in ("", "asym")
    for recipe, keys in (("rtn", ""), ("rtn", ":search=true"), ("signround", ""))
]
TABLE += ["signround:w2g64:preset=best", "signround:w2g64asym:preset=best"]


def random_windows(ids: Tensor, samples: int, seqlen: int = 2048, seed: int = 0) -> Tensor:
    """Windows at random starts, as the GPTQ loader takes them: they may overlap, as the peers' did."""
    starts = torch.randint(0, len(ids) - seqlen, (samples,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start : start + seqlen] for start in starts.tolist()])


def read(folder: Path, tokenizer, name: str) -> Tensor:
    text = join_rows((folder / name).read_text(encoding="utf-8"))
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def measure(model: str, setting: str, train: Tensor, texts: dict[str, Tensor]) -> dict:
    recipe, scheme, *rest = setting.split(":")
    keys = dict(pair.split("=") for pair in rest[0].split(",")) if rest else {}
    seed = int(keys.pop("seed", 0))
    samples = split_preset(recipe, keys.get("preset"))[1].get("samples", 128)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    quantized = planish.quantize(
        model,
        recipe,
        scheme,
        data=random_windows(train, samples),
        seed=seed,
        samples=samples,
        seqlen=2048,
        progress=lambda event: times.append(event),
        **keys,
    )
    row = {
        "setting": setting,
        "calibration_tokens": samples * 2048 if times and times[-1].before else 0,
        "seconds": round(times[-1].seconds, 1),
        "seconds_with_loading": round(time.perf_counter() - start, 1),
        "peak_mib": round(times[-1].peak_bytes / 2**20),
    }
    times.clear()
    return {**row, **{name: round(planish.perplexity(quantized, ids), 3) for name, ids in texts.items()}}


times: list = []


def main(model: str, data: str, out: str, *settings: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    folder = Path(data)
    train = read(folder, tokenizer, "wiki.train.part.raw")
    texts = {"test": read(folder, tokenizer, "wiki.test.raw")}
    rows = [
        {"setting": "16-bit", **{n: round(planish.perplexity(planish.load(model), i), 3) for n, i in texts.items()}}
    ]
    for setting in settings or TABLE:
        rows.append(measure(model, setting, train, texts))
        print(json.dumps(rows[-1]), flush=True)
        report = {
            "command": "python benchmarks/smollm2.py MODEL WIKITEXT2 " + " ".join([out.split("/")[-1], *settings]),
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
            "rows": rows,
        }
        Path(out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
