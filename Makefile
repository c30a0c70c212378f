# Two commands do everything: `make demo` (the main job) and `make test`. Both make .venv when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
OPTIONS ?=
CODE := trainer exporter runtime tools tests benchmarks docs examples

# Modules that are compiled once: a variable that forbids it costs every test process seconds.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX ?= $(abspath $(VENV))/pycache
# Test processes share the cores: threads of one would wait for those of another.
test test-all test-environments: export OMP_NUM_THREADS = 1

.PHONY: demo test test-all test-environments test-kserve lint format bench bench-gpu docs package clean
.DEFAULT_GOAL := demo

# torch goes in first and alone, by its exact pin, so that the build found for that very spelling is the one that is used.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"tensorrail needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}: try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev,docs]'
	@touch $(READY)

demo: $(READY)  ## train, compress, export, check, bench and report, on embedded data
	$(BIN)/tensorrail run recipes/digits.yaml --resume

test: $(READY)  ## the test suite, without the slow cases
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow' $(OPTIONS)

test-all: $(READY)  ## every test: the slow ones, all formats on foreign models, thousands of random cases
	TENSORRAIL_CASES=all $(BIN)/python -m pytest -n $(JOBS)

test-environments: $(READY)  ## the test suite as on other processors, with one core, another locale, no home, no network
	$(BIN)/python tests/environments.py

# KServe needs an older protobuf than the other packages here, so it gets an environment of its own.
test-kserve:  ## the manifest for KServe against the models of KServe's own package
	$(PYTHON) -m venv $(VENV)/kserve
	$(VENV)/kserve/bin/python -m pip install --quiet --disable-pip-version-check kserve pytest pyyaml
	cd tests/tools && $(abspath $(VENV))/kserve/bin/python -c 'import kserve'
	cd tests/tools && $(abspath $(VENV))/kserve/bin/python -m pytest -c /dev/null --noconftest test_kserve.py -k 'field'

lint: $(READY)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

bench: $(READY)  ## planned networks against dense, published ranks and other tools, interleaved, on this machine's CPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/compress.py -o results/compress

bench-gpu: $(READY)  ## the same on an NVIDIA GPU, with placement, parity, training and the gate; says what the machine lacks
	$(BIN)/python benchmarks/gpu.py --resume -o results

docs: $(READY)  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: $(READY)  ## sdist and wheel, into dist/: built, checked, and the wheel tried in a fresh environment
	.ci/package $(BIN)/python

clean:
	rm -rf $(VENV) runs dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
