# make demo           quantize SmolLM2-135M-Instruct to 4, 3 and 2 bits and compare (10 minutes on 2 cores)
# make test           every test that takes seconds (10 minutes in all on 2 cores)
# make test-all       ... and those that take minutes
# make test-interop   do other toolkits read what we write? (makes environments of their own)
# make fuzz           thousands of damaged checkpoints: each loads or is refused by one line (10 minutes)
# make lint           ruff and mypy
# make clean          what make made, but for the downloaded model
#
# PYTHON=python3.12 chooses the interpreter, PIP_ARGS="..." goes to pip.

PYTHON ?= python3
VENV ?= .venv
MODEL ?= models/smollm2
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

export PLANISH_SMOLLM2 := $(abspath $(MODEL))

.PHONY: demo demo-tiny test test-all test-interop fuzz lint clean

demo: $(VENV)/ready $(MODEL)/conversion.json
	$(BIN)/python examples/demo.py $(MODEL) --out out/demo

demo-tiny: $(VENV)/ready $(MODEL)/conversion.json
	$(BIN)/python examples/demo.py $(MODEL) --out out/demo-tiny --tiny

# a process a core, of one thread each: few tests can use more
test: $(VENV)/ready $(MODEL)/conversion.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

test-all: $(VENV)/ready $(MODEL)/conversion.json
	$(BIN)/python -m pytest -m "not interop"

test-interop: $(VENV)/ready $(MODEL)/conversion.json
	$(BIN)/python tests/interop/run.py $(MODEL)
	$(BIN)/python tests/interop/llama_cpp.py $(MODEL)

fuzz: $(VENV)/ready
	$(BIN)/python tests/fuzz/fuzz.py --cases 10000

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/mypy

# torch first: it is the large one, and what it brings must not be resolved twice
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "no venv: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(INSTALL) torch
	$(INSTALL) -e ".[dev]"
	touch $@

$(MODEL)/conversion.json: | $(VENV)/ready
	$(BIN)/python examples/get_smollm2.py $(MODEL)

clean:
	rm -rf $(VENV) out build .pytest_cache .ruff_cache .mypy_cache
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
