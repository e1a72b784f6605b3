"""Fuzz, in short: some of its cases, in this process. `make fuzz` runs thousands."""

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import transformers
from corpus import make, quiet
from mutate import mutated

from fuzz import Fuzzer, is_failure, parse

CASES = 100


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    verbosity, handler = transformers.utils.logging.get_verbosity(), signal.getsignal(signal.SIGALRM)
    quiet()
    yield Fuzzer(make(tmp_path_factory.mktemp("corpus")), seed=7, seconds=60.0)
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    signal.signal(signal.SIGALRM, handler)


@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoints_load_or_are_refused(fuzzer: Fuzzer) -> None:
    idle, options = fuzzer.warm_up(), parse([])
    results = [fuzzer.run(case, idle) for case in range(CASES)]
    assert [result for result in results if is_failure(result, options)] == []
    counted = Counter(result.outcome for result in results)
    assert counted["refused"] > CASES // 3 and counted["loads"] > CASES // 20


def test_a_case_is_made_by_its_seed_and_number(fuzzer: Fuzzer, tmp_path: Path) -> None:
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        written.append(
            (fuzzer.write(5, tmp_path / name), {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
        )
    assert written[0] == written[1] and written[0][0][1]


def test_most_mutations_change_something(fuzzer: Fuzzer) -> None:
    plain = fuzzer.files["plain"]
    changed = [mutated(plain, [fuzzer.files["native"]], Random(seed))[0] != plain for seed in range(200)]
    assert sum(changed) > 180
