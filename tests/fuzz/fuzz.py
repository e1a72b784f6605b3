"""Fuzz: thousands of damaged checkpoints, each must load or be refused by one PlanishError, soon and in little memory.

    python tests/fuzz/fuzz.py --cases 10000 --seed 0
    python tests/fuzz/fuzz.py --seed 0 --only 1234 --keep DIR     one of them again, with its traceback

Cases run in processes that have loaded the whole corpus once; a case's memory is the peak of what its process has
resident, above what it had then. Exit status 1 if anything else than the two outcomes was seen, a case took longer
than --seconds, or more than --megabytes.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

import torch
from corpus import make, quiet
from mutate import mutated

import planish
from planish.api import info
from planish.errors import PlanishError
from planish.source import FolderSource, open_source

RECYCLED_AFTER = 500  # cases of one process
ADDRESS_SPACE = 8 << 30  # above what a process has mapped when idle: a net below the measurement


@dataclass
class Result:
    """What became of a case: 'loads', 'refused', or what it ought not to be."""

    case: int
    outcome: str
    base: str = ""
    done: str = ""
    message: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0


class TimedOut(BaseException):
    """Not an Exception, so that nothing on the way takes it for one of its own."""


def attempt(path: Path, everything: bool = True) -> None:
    """What reads a stranger's files; not everything is what the rest does too, but for the words that it says."""
    found = sorted(path.glob("*.gguf"))
    if found:
        source = open_source(found[0])
        source.load(source.skeleton(), "", "cpu")
        source.tokenizer()
        return
    model = planish.load(path, device="cpu")
    assert not any(parameter.is_meta for parameter in model.parameters())
    if everything:
        info(path).summary()
        FolderSource(path, quantized=True).tokenizer()


class Fuzzer:
    """Cases by number; the same seed and corpus make the same ones."""

    def __init__(self, corpus: dict[str, Path], seed: int, seconds: float) -> None:
        self.seed, self.seconds, self.corpus = seed, seconds, corpus
        self.files = {
            name: {file.name: file.read_bytes() for file in sorted(path.iterdir())} for name, path in corpus.items()
        }

    def warm_up(self) -> float:
        """Load the whole corpus; MB that this process then has resident."""
        signal.signal(signal.SIGALRM, _on_alarm)
        for path in self.corpus.values():
            attempt(path)
        return _status("VmRSS")

    def write(self, case: int, folder: Path) -> tuple[str, str]:
        """Write a case's files; (its base, what was done to it)."""
        random = Random(f"{self.seed} {case}")
        base = random.choice([*self.files, "gguf"])
        files, done = mutated(self.files[base], list(self.files.values()), random)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return base, "; ".join(done)

    def run(self, case: int, idle: float, trace: bool = False, keep: Path | None = None) -> Result:
        with tempfile.TemporaryDirectory(dir=_fast()) as scratch:
            folder = keep or Path(scratch)
            folder.mkdir(exist_ok=True)
            base, done = self.write(case, folder)
            _reset_peak()
            start = time.perf_counter()
            outcome, message = self._outcome(folder, case % 4 == 0, trace)
            seconds = time.perf_counter() - start
        megabytes = max(0.0, _peak() - idle)
        return Result(case, outcome, base, done, message, round(seconds, 3), round(megabytes, 1))

    def _outcome(self, folder: Path, everything: bool, trace: bool) -> tuple[str, str]:
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            attempt(folder, everything)
            return "loads", ""
        except PlanishError as error:
            text = str(error).replace(str(folder), "DIR")
            if trace:
                traceback.print_exc()
            return ("refused" if "\n" not in text else "more than a line"), text
        except TimedOut:
            return "too slow", traceback.format_exc()[-1500:]
        except BaseException as error:
            return type(error).__name__, traceback.format_exc()[-3000:]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _fast() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> float:
    """A line of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def _peak() -> float:
    return _status("VmHWM")


def _on_alarm(*_: Any) -> None:
    raise TimedOut


def worker(fuzzer: Fuzzer, pipe: Connection) -> None:
    """Take case numbers until None comes; send a Result for each."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars
    idle = fuzzer.warm_up()
    most = int(_status("VmSize")) * 2**20 + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    while (case := pipe.recv()) is not None:
        pipe.send(fuzzer.run(case, idle))


class Workers:
    """Processes that run cases, each replaced after a while, when it dies and when it doesn't answer."""

    def __init__(self, fuzzer: Fuzzer, count: int) -> None:
        self.fuzzer, self.count = fuzzer, count
        self.context = multiprocessing.get_context("fork")

    def run(self, cases: Iterator[int]) -> Iterator[Result]:
        """Results of all cases, in any order."""
        busy: dict[Connection, tuple[Any, int, float, int]] = {}
        for case in (next(cases, None) for _ in range(self.count)):
            if case is not None:
                self._give(busy, self._start(), case, 0)
        while busy:
            ready = wait(list(busy), timeout=1.0)
            now = time.monotonic()
            late = [pipe for pipe, (_, _, since, _) in busy.items() if now - since > 3 * self.fuzzer.seconds + 30]
            for pipe in {*ready, *late}:
                process, case, _, served = busy.pop(pipe)  # type: ignore[index, arg-type]
                result = self._answer(pipe, case) if pipe in ready else Result(case, "hangs")
                yield result
                following = next(cases, None)
                fresh = result.outcome in ("dies", "hangs") or served >= RECYCLED_AFTER or following is None
                if fresh:
                    process.kill()
                    process.join()
                if following is not None:
                    self._give(busy, self._start() if fresh else (process, pipe), following, 0 if fresh else served)

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=worker, args=(self.fuzzer, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _give(self, busy: dict, started: tuple[Any, Connection], case: int, served: int) -> None:
        process, pipe = started
        with contextlib.suppress(OSError):
            pipe.send(case)
        busy[pipe] = process, case, time.monotonic(), served + 1

    def _answer(self, pipe: Any, case: int) -> Result:
        try:
            return pipe.recv()
        except (EOFError, OSError):
            return Result(case, "dies")


def summary(results: list[Result], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What is written as JSON."""
    slowest, largest = max(results, key=lambda r: r.seconds), max(results, key=lambda r: r.megabytes)
    return {
        "command": f"python tests/fuzz/fuzz.py --cases {options.cases} --seed {options.seed}",
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{os.cpu_count()}-core CPU",
        "versions": {"planish": planish.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "seed": options.seed,
        "cases": len(results),
        "outcomes": dict(Counter(r.outcome for r in results).most_common()),
        "outcomes_by_base": {
            base: dict(Counter(r.outcome for r in results if r.base == base))
            for base in sorted({r.base for r in results})
        },
        "failures": [r.case for r in results if is_failure(r, options)],
        "peak_megabytes_above_idle": largest.megabytes,
        "largest": {**asdict(largest), "message": largest.message[:200]},
        "slowest": {**asdict(slowest), "message": slowest.message[:200]},
        "seconds": round(seconds, 1),
        "cases_per_second": round(len(results) / seconds, 1),
    }


def is_failure(result: Result, options: argparse.Namespace) -> bool:
    return result.outcome not in ("loads", "refused") or result.megabytes > options.megabytes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="limit for a case")
    parser.add_argument("--megabytes", type=float, default=200.0, help="limit for a case")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, help="run this case alone and show its traceback")
    parser.add_argument("--keep", type=Path, help="with --only: leave its files there")
    parser.add_argument("--json", type=Path, help="write a summary there")
    return parser.parse_args(arguments)


def run_one(fuzzer: Fuzzer, options: argparse.Namespace) -> Result:
    """One case in this process, with its traceback."""
    return fuzzer.run(options.only, fuzzer.warm_up(), trace=True, keep=options.keep)


def main(arguments: list[str] | None = None) -> int:
    """Exit status."""
    options = parse(arguments)
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(make(Path(folder)), options.seed, options.seconds)
        if options.only is not None:
            result = run_one(fuzzer, options)
            print(json.dumps(asdict(result), indent=2))
            return int(is_failure(result, options))
        fuzzer.warm_up()  # what isn't damaged loads
        results, start = [], time.perf_counter()
        for result in Workers(fuzzer, options.processes).run(iter(range(options.first, options.first + options.cases))):
            results.append(result)
            if is_failure(result, options):
                print(f"case {result.case}: {result.outcome}, {result.megabytes} MB, {result.seconds} s")
                print(f"  {result.base}: {result.done}\n{result.message}", flush=True)
    said = summary(results, options, time.perf_counter() - start)
    if options.json:
        options.json.write_text(json.dumps(said, indent=2) + "\n")
    print(json.dumps(said, indent=2))
    return int(bool(said["failures"]))


if __name__ == "__main__":
    sys.exit(main())
