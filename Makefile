# Every target makes the virtual environment it needs: a fresh machine needs Python 3.11-3.13 and make, nothing else.
#
#   make train                          the demo: a real model trained in about half of its plain memory
#   make train ARGS="--resume auto"     continue it (ARGS is added to the command line)
#   make test    TESTS=tests/cli        all tests, or those under TESTS, in an order of chance whose seed is printed
#   make test-fast                      in seconds: what needs no PyTorch, with PyTorch out of reach
#   make test-exhaustive                further cases of what `make test` checks by a few
#   make fuzz    COUNT=2000 SEED=1      random modules, plain against planned: bits and peaks (PROCESSES= to use fewer)
#   make bench   QUICK=1                tightfit and its peers side by side (about 45 minutes; with QUICK=1 under 8)
#   make zoo     EACH=5 SEED=1 PART=1/4 models of many libraries, plain, checkpointed and planned: EACH of every family, drawn
#                                       by SEED (hours; what is there is not run again; results in runs/zoo)
#   make docs                           the documentation site, in build/docs; a dead link or a docstring that cannot be read fails
#   make lint                           ruff, strict mypy, and the floors that imports go down
#   make package-check                  wheel and sdist, installed and used by each Python 3.11-3.13 that is found
#   make test    TORCH=2.11.0           any target with another PyTorch, in a virtual environment of its own
#   make test-cuda                      the CUDA tests, on emulated devices: no GPU needed (docs/emulated-cuda.md); and models of
#                                       real libraries
#   make gpu-check PYTHON=... WHEELS=.. what only a GPU can show, in 500 s: by an interpreter that has CUDA PyTorch, without
#                                       network; ONLY="facts bits" repeats some (ARGS=--list shows all)

SHELL := /bin/bash
# Tests start processes: each would compile the package anew where this is set.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help

# The first of these that starts and is new enough; override with PYTHON=/path/to/python.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python; do \
	"$$name" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo "$$name"; break; }; done)
WHEELS ?=
ARGS ?=
ONLY ?=
TESTS ?= tests
# Test processes, and how the tests are shared among them.
TEST_PROCESSES ?= auto
# The tests that need no PyTorch.
FAST := tests/records tests/simulation tests/solver tests/report/test_svg_chart.py tests/test_layout.py

# Another PyTorch than the one that constraints-dev.txt pins; each version has a virtual environment of its own.
TORCH ?=

# PyTorch's CUDA build for `make test-cuda`, where TORCH names none.
CUDA_TORCH := 2.14.1

VENV := .venv$(if $(TORCH),-torch-$(TORCH))
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints-dev.txt)
RUNS := runs

# About half of what the plain step needs (541.6 MiB), beside what a GPU's context takes: see README.md, "Try it".
DEMO := --model gpt --dataset python-source --memory 270MiB+context --batch-size 16 --steps 80 --log-every 10 --save-every 40 \
	--eval-samples 160 --reference-memory 75% --root-path $(RUNS) --mark demo

# `make test` runs about a hundred random modules; a rare fault shows only among thousands.
COUNT ?= 2000
SEED ?= 1
PROCESSES ?= $(shell nproc)

# Where the report goes.
BENCH_OUTPUT ?= $(RUNS)/bench
QUICK ?=

# Names of each family of the zoo (0: all), and which part of them.
EACH ?= 5
PART ?= 1/1

.PHONY: help train test test-fast test-exhaustive test-cuda fuzz bench zoo docs lint package-check gpu-check clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

train: $(VENV)/.installed-train
	$(BIN)/tightfit train $(DEMO) $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal $(TESTS) $(ARGS)

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -p tests.support.without_torch -m "not slow and not thorough" $(FAST) $(ARGS)

test-exhaustive: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --exhaustive -m exhaustive --numprocesses $(TEST_PROCESSES) --dist worksteal $(TESTS) $(ARGS)

ifeq ($(TORCH),)
test-cuda:
	@$(MAKE) --no-print-directory test-cuda TORCH=$(CUDA_TORCH)
else
test-cuda: $(VENV)/.installed-libraries
	EMULATED_CUDA_DEVICES=2 $(BIN)/python -m tests.emulated_cuda.run python -m pytest -p tests.emulated_cuda.plugin \
		-m "not needs_results" --numprocesses $(TEST_PROCESSES) --dist worksteal \
		$(if $(filter tests,$(TESTS)),tests/gpu tests/emulated_cuda tests/real_libraries,$(TESTS)) $(ARGS)
endif

fuzz: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.replay.fuzz --count $(COUNT) --seed $(SEED) --processes $(PROCESSES) $(ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.side_by_side $(if $(QUICK),--quick) --output $(BENCH_OUTPUT) $(ARGS)

# With the PyTorch that the libraries are for.
ifeq ($(TORCH),)
zoo:
	@$(MAKE) --no-print-directory zoo TORCH=$(CUDA_TORCH)
else
zoo: $(VENV)/.installed-zoo
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo --seed $(SEED) --each $(EACH) --part $(PART) $(ARGS)
endif

docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --builder html --conf-dir docs/site docs build/docs
	@echo "The site begins with build/docs/index.html"

package-check: $(VENV)/.installed-dev
	BUILD_PYTHON=$(BIN)/python .ci/package-check

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu-check:
	@PYTHON="$(PYTHON)" WHEELS="$(WHEELS)" ONLY="$(ONLY)" .ci/gpu-check $(ARGS)

clean:
	rm -rf .venv .venv-torch-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "No Python 3.11-3.13 was found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; fi
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/constraints.txt: constraints-dev.txt | $(BIN)/python
	sed 's/^torch==.*/torch==$(TORCH)/' constraints-dev.txt > $@

# The stamps say what is installed; they are renewed when the requirements change.
$(VENV)/.installed-train: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[dev]"
	@touch $@ $(VENV)/.installed-train

$(VENV)/.installed-libraries: tests/real_libraries/requirements.txt $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) -r $<
	@touch $@

$(VENV)/.installed-zoo: benchmarks/zoo/requirements.txt $(VENV)/.installed-libraries
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) -r $<
	@touch $@

# Without build isolation: deepspeed's build imports torch.
$(VENV)/.installed-bench: benchmarks/requirements-peers.txt benchmarks/requirements-peers-alone.txt $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check setuptools wheel -r benchmarks/requirements-peers.txt
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation -r benchmarks/requirements-peers-alone.txt
	@touch $@
