"""Peak host memory of quantizing a model that is larger than the memory it may take.

    python benchmarks/memory.py [--work DIR] [--blocks 19] [--limit-gb 3]

Makes a folder with a Llama-2-7B-shaped model of random bf16 weights, one block a shard, so that this
script never holds more than one; quantizes it with `planish quantize --recipe rtn --scheme w4g128` in a
process of its own, and samples that process's /proc/PID/smaps_rollup every 20 ms. Private memory is what
would be free again if the process ended: pages of files that others map too don't count. Prints the peaks,
writes benchmarks/results/memory-DATE.json, and exits with 1 if the limit was passed. Linux only.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

CONFIG = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
ARGUMENTS = "-m planish quantize MODEL --recipe rtn --scheme w4g128 --out OUT"
FIELDS = ("Rss", "Private_Clean", "Private_Dirty", "Anonymous")
RESULTS = Path(__file__).parent / "results"


def make_model(folder: Path, blocks: int) -> int:
    """A model of random weights, shard by shard; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(**CONFIG, num_hidden_layers=blocks)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    parts: dict[str, list[str]] = {}
    for name in model.state_dict():
        part = ".".join(name.split(".")[:3])  # "model.layers.7", "model.embed_tokens.weight"
        parts.setdefault(part, []).append(name)
    weight_map, total = {}, 0
    generator = torch.Generator().manual_seed(0)
    for index, (part, names) in enumerate(parts.items()):
        file = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: _random(model.get_parameter(name), generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        print(f"\rmaking {part}: {total / 1e9:.1f} GB", end="", flush=True)
    print()
    whole = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    return total


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    return torch.empty(like.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; returns seconds, exit code and the peak of each field in GB."""
    peaks = dict.fromkeys((*FIELDS, "private"), 0)
    started = time.monotonic()
    process = subprocess.Popen(command)
    while process.poll() is None:
        now = _rollup(process.pid)
        now["private"] = now.get("Private_Clean", 0) + now.get("Private_Dirty", 0)
        peaks = {field: max(peak, now.get(field, 0)) for field, peak in peaks.items()}
        time.sleep(0.02)
    figures = {f"peak_{field.lower()}_gb": round(peak * 1024 / 1e9, 3) for field, peak in peaks.items()}
    return {"seconds": round(time.monotonic() - started, 1), "exit_code": process.returncode, **figures}


def _rollup(pid: int) -> dict[str, int]:
    """Fields of smaps_rollup in KiB; empty when the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder with room for model and result")
    parser.add_argument("--blocks", type=int, default=19, help="19 make 8.2 GB")
    parser.add_argument("--limit-gb", type=float, default=3.0, help="private memory that is allowed")
    options = parser.parse_args()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="planish-memory-", dir=options.work))
    try:
        size = make_model(work / "model", options.blocks)
        places = {"MODEL": str(work / "model"), "OUT": str(work / "out")}
        figures = measure([sys.executable, *(places.get(word, word) for word in ARGUMENTS.split())])
        written = sum(file.stat().st_size for file in work.glob("out/*"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    date = datetime.date.today().isoformat()
    result = {
        "command": f"python {ARGUMENTS}",
        "date": date,
        "model_gb": round(size / 1e9, 3),
        "written_gb": round(written / 1e9, 3),
        "limit_gb": options.limit_gb,
        **figures,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"memory-{date}.json").write_text(text)
    return int(figures["exit_code"] != 0 or figures["peak_private_gb"] > options.limit_gb)


if __name__ == "__main__":
    sys.exit(main())
