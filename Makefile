# Everything runs in .venv, which the project's own files build. `make demo` and `make test` need nothing set up before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup test lint smoke bench demo clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[mpi,eval,latent,tensorflow,parquet,dev]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

smoke: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/smoke.sh

bench: $(STAMP)
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/latent_step.py
	$(BIN)/python benchmarks/samplers.py --samples 5000
	$(BIN)/python benchmarks/evaluator.py

demo: $(STAMP)
	$(BIN)/python scripts/demo.py $(if $(STEPS),--steps $(STEPS))

clean:
	rm -rf runs build dist *.egg-info
