# Everything runs in .venv, which the project's own files build. `make demo` and `make test` need nothing set up before:
# `make demo` installs what the demo needs, and what `make test` needs beside it is added to the same .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
INSTALL := $(BIN)/python -m pip install --editable

.PHONY: setup test lint smoke bench gpu demo docs clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(STAMP): pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV) with all that tests and evaluation need: minutes, once."
	$(INSTALL) ".[mpi,eval,latent,shards,tensorflow,parquet,text,docs,dev]"
	touch $(DEMO_STAMP) $@

$(DEMO_STAMP): pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV) with what the demo needs, PyTorch above all: a minute or two, once."
	$(INSTALL) ".[plots]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

smoke: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/smoke.sh

bench: $(STAMP)
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/backbones.py
	$(BIN)/python benchmarks/task_weighting.py
	$(BIN)/python benchmarks/launches.py
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/latent_step.py
	$(BIN)/python benchmarks/samplers.py --samples 5000
	$(BIN)/python benchmarks/evaluator.py

# Eight minutes on a GPU: right, waiting for nothing, how fast, what is learned. DEVICE=cpu: the same on tiny networks.
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py $(if $(DEVICE),--device $(DEVICE)) $(if $(STAGES),--stages $(STAGES))

demo: $(DEMO_STAMP)
	@$(BIN)/python scripts/demo.py $(if $(STEPS),--steps $(STEPS))

# The pages of docs/ and a reference of the code as a site in site/, which needs no network. A broken link is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html, or for its search too: $(BIN)/python -m http.server --directory site"

clean:
	rm -rf runs build dist site *.egg-info
