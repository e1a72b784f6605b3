"""How fast `planish export` is: a checkpoint of Llama-2-7B's shapes with random codes, from one format to others.

    python benchmarks/export.py out.json [--layers 32] [--scheme w4g128] [--folder DIR]

Prints and writes MB of checkpoint a second (the larger of what was read and written), and the process's peak of
private resident memory, for each format; a fresh process each. The codes are random, so that only speed means anything.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import planish
from planish.bitstream import Stream, words_for
from planish.checkpoint import CheckpointWriter
from planish.folder import config_of
from planish.formats import FORMATS
from planish.qtensor import midpoint
from planish.scheme import Scheme

FORMATS_TRIED = ("native", "gptq_v2", "auto_round", "compressed_tensors")


def make(folder: Path, scheme: Scheme, layers: int) -> None:
    """A native checkpoint of random codes."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        dtype=torch.bfloat16, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    schemes = {}
    with CheckpointWriter(folder, overwrite=True) as writer:
        for name, parameter in model.named_parameters():
            layer = name.removesuffix(".weight")
            if not isinstance(model.get_submodule(layer), torch.nn.Linear) or layer == "lm_head":
                writer.add(name, torch.randn(parameter.shape).bfloat16() * 0.02)
                continue
            schemes[layer] = scheme
            out_features, in_features = parameter.shape
            grid = out_features, scheme.groups_in(in_features)
            words = (out_features, words_for(in_features, scheme.bits))
            stream = Stream(
                codes=torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32),
                scale=torch.rand(grid).half() * 0.01 + 1e-3,
                zero=None if scheme.symmetric else torch.full(grid, midpoint(scheme.bits), dtype=torch.uint8),
                bits=scheme.bits,
                group_size=scheme.group_in(in_features),
                in_features=in_features,
            )
            for key, tensor in FORMATS["native"].write(layer, stream).items():
                writer.add(key, tensor)
        words_config = FORMATS["native"].config({**schemes, "lm_head": None})
        writer.finish(config_of(config, model, torch.bfloat16, words_config))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def private_peak() -> int:
    """Most anonymous memory so far can't be read afterwards, so it is sampled: see `watch`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def one(source: str, out: str, format: str) -> None:
    """Runs in a process of its own: one export, its figures as JSON on stdout."""
    import threading

    peak, done = [private_peak()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], private_peak())

    watcher = threading.Thread(target=watch, daemon=True)  # it doesn't outlive an error
    watcher.start()
    os.sync()  # what was written before is not this export's to wait for
    start = time.perf_counter()
    planish.export(source, out, format=format, overwrite=True)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    largest = max(size(Path(source)), size(Path(out)))
    print(json.dumps({"seconds": round(seconds, 2), "MB/s": round(largest / seconds / 1e6, 1),
                      "peak_private_GB": round(peak[0] / 1e9, 3)}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scheme", default="w4g128")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written; temporary otherwise")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        make(source, Scheme.parse(asked.scheme), asked.layers)
        found = {"native GB": round(size(source) / 1e9, 3)}
        for format in FORMATS_TRIED:
            command = [sys.executable, __file__, "--one", str(source), str(out), format]
            found[f"native to {format}"] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
            print(format, found[f"native to {format}"], flush=True)
        command = [sys.executable, __file__, "--one", str(out), str(Path(scratch) / "back"), "gptq_v2"]
        found[f"{FORMATS_TRIED[-1]} to gptq_v2"] = json.loads(
            subprocess.check_output(command, text=True).splitlines()[-1]
        )
    heading = {
        "command": f"python benchmarks/export.py OUT --layers {asked.layers} --scheme {asked.scheme}",
        "device": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "date": str(date.today()),
        "torch": torch.__version__,
    }
    asked.results.write_text(json.dumps({**heading, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:5])
    else:
        main()
