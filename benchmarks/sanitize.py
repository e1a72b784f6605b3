"""GPU tests of the kernels under compute-sanitizer: no access outside a tensor, and by its other tools no race.

    python benchmarks/sanitize.py OUT.json [--tools memcheck,racecheck] [--files test_int8] [--seconds 500] [--jobs 6]

Wants a GPU, compute-sanitizer (of the CUDA toolkit) on the PATH, and pytest. Each tensor gets an allocation of its own,
so that what lies beside it is out of bounds; tests that capture CUDA graphs need torch's pools and are left out. Of
tests with many cases, those of one bit width are run. The GPU must have room: no memory is an error here too. A row
says what a tool found in one file's tests.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from planish.log import versions

ROOT = Path(__file__).resolve().parent.parent
CAPTURES = "not graph and not captured and not compile and not speed"
TESTS = {  # file: which of its tests; long ones come first
    "test_cuda_gemm": "kernel_on_a_gpu or dequantize_on_a_gpu",
    "test_cuda_gemv": "on_a_gpu or thread",
    "test_train": "asym-2 or asym-3-torch.bfloat16 or offset or no_tokens",
    "test_int8": CAPTURES,
    "test_cuda_attend": "on_a_gpu",
    "test_merged": CAPTURES,
    "test_token_loss": CAPTURES,
    "test_records": "on_a_gpu",
    "test_tokens": f"{CAPTURES} and 4",
    "test_fakequant": f"{CAPTURES} and 3",
}
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
COUNT = re.compile(r"(\d+ (?:passed|failed|skipped|error).*) in ")


def watched(tool: str, name: str, seconds: float) -> dict[str, Any]:
    """One file's tests under one tool."""
    file, began = ROOT / "tests/kernels" / f"{name}.py", time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--log-file", str(log)]
        tests = ["-m", "pytest", "-m", "gpu", "-k", TESTS[name], "-p", "no:cacheprovider", str(file)]
        row: dict[str, Any] = {"tool": tool, "file": file.name, "tests": TESTS[name]}
        try:
            done = subprocess.run(
                [*checker, sys.executable, *tests], capture_output=True, text=True, timeout=max(seconds, 1), cwd=ROOT,
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return row | {"missing": f"not done after {seconds:.0f} s"}
        said = log.read_text(errors="replace") if log.is_file() else ""
    passed, summary = COUNT.findall(done.stdout), SUMMARY.findall(said)
    row |= {"rc": done.returncode, "pytest": passed[-1] if passed else done.stdout[-300:] + done.stderr[-300:]}
    row |= {"found": summary[-1] if summary else "no summary", "seconds": round(time.perf_counter() - began)}
    return row if done.returncode == 0 else row | {"log": said[:3000]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tools", default="memcheck", help="of compute-sanitizer; racecheck takes far longer")
    parser.add_argument("--files", default=",".join(TESTS), help="whose tests")
    parser.add_argument("--seconds", type=float, default=500, help="start nothing after so long, and stop what runs")
    parser.add_argument("--jobs", type=int, default=6, help="files at a time")
    args = parser.parse_args()
    if shutil.which("compute-sanitizer") is None or not torch.cuda.is_available():
        raise SystemExit("wants a GPU, and compute-sanitizer on the PATH; it comes with the CUDA toolkit")
    end = time.perf_counter() + args.seconds
    report: dict[str, Any] = {
        "command": f"python benchmarks/sanitize.py OUT.json --tools {args.tools} --files '{args.files}'",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "rows": [],
    }

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(lambda tool, name: watched(tool, name, end - time.perf_counter()), tool, name)
            for tool in args.tools.split(",")
            for name in args.files.split(",")
        ]
        for job in as_completed(jobs):
            report["rows"].append(job.result())
            print(json.dumps(report["rows"][-1]), flush=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
