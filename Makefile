# Bare `make` lists the targets. The first target that needs it builds .venv; nothing else on the machine is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

##@ Try it
.PHONY: demo
demo: $(DEMO)  ## Train, crash, recover and compare, on this machine
	$(BIN)/llmtailor demo

##@ Develop
.PHONY: check fix test test-all
check: $(DEV)  ## Format, lint, types, spelling, architecture: what can be said without running the code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(PYTEST) -q tests/test_architecture.py tests/test_unsafe_calls.py

fix: $(DEV)  ## Reformat, and repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(DEV)  ## All tests but the slow ones and those for a GPU
	$(PYTEST) -q -n 2 --dist worksteal -m "not slow and not gpu"

test-all: $(DEV)  ## Every test; those for a GPU skip themselves where there is none
	$(PYTEST) -q -n 2 --dist worksteal

##@ Measure and document
.PHONY: bench bench-gpu docs
bench: $(DEV)  ## Run every benchmark in turn; results in benchmarks/results/
	@mkdir -p benchmarks/results
	@set -e; for bench in $(sort $(wildcard benchmarks/bench_*.py)); do \
	  echo "== $$bench"; $(BIN)/python $$bench; \
	done
	$(BIN)/python benchmarks/readme_table.py

bench-gpu: $(DEV)  ## Run the benchmarks that need a CUDA device; without one they say so and end
	@mkdir -p benchmarks/results
	@set -e; for bench in $(sort $(wildcard benchmarks/gpu_*.py)); do \
	  echo "== $$bench"; $(BIN)/python $$bench; \
	done

docs: $(DEV)  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

##@ Housekeeping
.PHONY: clean help
clean:  ## Remove everything that was built, .venv included
	rm -rf $(VENV) site dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

help:  ## This list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=$(PYTHON) makes the environment; set it to use another interpreter (3.11 or newer)."

# A stamp is written only after pip succeeded, so an interrupted install starts again.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch $(DEMO) $@  # dev contains demo
