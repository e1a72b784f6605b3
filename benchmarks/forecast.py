"""What `planish plan` predicts against what the run then takes: size, memory, seconds.

    python benchmarks/forecast.py MODEL OUT.json [--device cuda] [--samples 128] [--seqlen 2048] [SETTING ...]
    python benchmarks/forecast.py random-llama2-7b OUT.json --blocks 4 --device cuda

A SETTING is recipe:scheme:key=value,key=value, such as signround:w4g128:steps=50. Each is predicted in a process of
its own and then run in another. Memory of the GPU is torch's; of the host it is that which no file backs (RssAnon of
/proc/PID/status, every 10 ms), and beside it all private memory (smaps_rollup). Seconds are those of the whole
`quantize_to`, the text tokenized before; without Python's own start. Nothing is found compiled, as in a first run.
random-llama2-7b is a folder made on the fly, with a 7B model's shapes and as many blocks as asked for. Linux only.
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
from typing import Any

import torch
from memory import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from planish.log import versions

SETTINGS = [
    "rtn:w4g64",
    "rtn:w4g64:search=true",
    "signround:w4g64:steps=50",
    "signround:w2g64asym:steps=50,span=1",
    "block_ap:w2g64asym:steps=50,batch_size=2",
]
RANDOM = "random-llama2-7b"


def request(job: dict[str, Any]) -> tuple[str, str, int | None, dict[str, Any]]:
    """Recipe, scheme, batch size, and all other keys."""
    recipe, scheme, *rest = job["setting"].split(":")
    keys = dict(pair.split("=") for pair in rest[0].split(",")) if rest else {}
    batch = keys.pop("batch_size", None)
    return recipe, scheme, None if batch is None else int(batch), keys


def predict(job: dict[str, Any]) -> dict[str, Any]:
    """The forecast, in this process."""
    import planish.api  # noqa: F401  as the command line has it in memory, too
    from planish.forecast import forecast
    from planish.request import resolve, with_batch

    recipe, scheme, batch, keys = request(job)
    start = time.perf_counter()
    size = {"samples": job["samples"], "seqlen": job["seqlen"]}
    resolved = resolve(job["model"], recipe, scheme, **with_batch(recipe, batch, {**keys, **size}))
    found = forecast(resolved, device=job["device"], batch_size=batch, storage=job["storage"])
    print("\n".join(found.lines()), file=sys.stderr)
    return {
        "disk": found.disk,
        "gpu": found.needs.gpu,
        "host": found.needs.host,
        "seconds": found.seconds,
        "took": time.perf_counter() - start,
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The run itself, in this process."""
    import planish
    from planish.data import windows
    from planish.request import resolve

    recipe, scheme, batch, keys = request(job)
    resolved = resolve(job["model"], recipe, scheme, **keys)
    data: Any = "embedded"
    if resolved.recipe.needs_data:
        data = windows(resolved.source.tokenizer(), "embedded", job["samples"], job["seqlen"], 0)[0]
    if job["device"] == "cuda":
        torch.cuda.init()
    start = time.perf_counter()
    how = {key: job[key] for key in ("device", "storage", "samples", "seqlen")}
    planish.quantize_to(job["model"], job["out"], recipe, scheme, data=data, batch_size=batch, **how, **keys)
    seconds = time.perf_counter() - start
    return {
        "disk": sum(file.stat().st_size for file in Path(job["out"]).iterdir()),
        "gpu": torch.cuda.max_memory_allocated() if job["device"] == "cuda" else 0,
        "seconds": seconds,
    }


def child(what: str, job: dict[str, Any]) -> dict[str, Any]:
    """Predict or run in a process of its own, whose memory is watched."""
    peaks = {"anonymous": 0, "private": 0}
    command = [sys.executable, __file__, "--child", what, json.dumps(job)]
    with tempfile.TemporaryDirectory() as compiled:  # else a run would find what its forecast compiled
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{compiled}/inductor", "TRITON_CACHE_DIR": f"{compiled}/triton"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **caches})
        while process.poll() is None:
            for key, value in memory_of(process.pid).items():
                peaks[key] = max(peaks[key], value)
            time.sleep(0.01)
        assert process.stdout is not None
        if process.returncode:
            raise SystemExit(f"{what} of {job['setting']} failed")
        return {**json.loads(process.stdout.read()), **peaks}


def memory_of(pid: int) -> dict[str, int]:
    """Bytes now; nothing when the process has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    kib = {line.split(":")[0]: int(line.split()[1]) for line in [*status, *rollup] if line.endswith(" kB")}
    return {
        "anonymous": 1024 * kib.get("RssAnon", 0),
        "private": 1024 * (kib.get("Private_Clean", 0) + kib.get("Private_Dirty", 0)),
    }


def compare(job: dict[str, Any]) -> dict[str, Any]:
    predicted = child("predict", job)
    measured = child("run", job)
    measured["host"] = measured["anonymous"]
    shutil.rmtree(job["out"])
    kinds = [kind for kind in ("disk", "gpu", "host", "seconds") if measured[kind]]
    row = {
        "setting": job["setting"],
        "predicted": {kind: round(predicted[kind], 2) for kind in kinds},
        "measured": {kind: round(measured[kind], 2) for kind in kinds},
        "ratio": {kind: round(predicted[kind] / measured[kind], 3) for kind in kinds},
        "measured_private": measured["private"],
        "forecast_seconds": round(predicted["took"], 1),
    }
    print(json.dumps(row), flush=True)
    return row


def random_model(folder: Path, blocks: int) -> None:
    """A 7B model's shapes with random weights, and a tokenizer of bytes."""
    make_model(folder, blocks)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a folder, or {RANDOM}")
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="*", default=SETTINGS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--storage", default="auto")
    parser.add_argument("--blocks", type=int, default=4, help=f"of {RANDOM}")
    parser.add_argument("--work", type=Path, help="folder with room for model and results")
    args = parser.parse_intermixed_args()
    work = Path(tempfile.mkdtemp(prefix="planish-forecast-", dir=args.work))
    how = {key: getattr(args, key) for key in ("device", "samples", "seqlen", "storage")}
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/forecast.py MODEL OUT.json", *args.settings]),
        "model": f"{RANDOM}, {args.blocks} blocks" if args.model == RANDOM else Path(args.model).name,
        **how,
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "versions": versions(),
        "rows": [],
    }
    try:
        model = args.model
        if model == RANDOM:
            model = str(work / "model")
            random_model(Path(model), args.blocks)
        for setting in args.settings:
            report["rows"].append(compare({"model": model, "out": str(work / "out"), "setting": setting, **how}))
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps({"predict": predict, "run": run}[sys.argv[2]](json.loads(sys.argv[3]))))
    else:
        main()
