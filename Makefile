# The commands of the README. Each makes .venv by itself when it is missing.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
VENV := .venv
READY := $(VENV)/ready
# Two processes that each use every core slow each other badly: one thread a process unless told otherwise.
THREADS ?= 1
WORKERS ?= 2

.PHONY: help setup demo test lint wheel

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-7s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make .venv and install everything into it, with the versions of constraints.txt

demo: $(READY) ## pretrain, extend twice, tune, reinforce; then a report and a sample, in runs/demo (10 minutes on 2 cores)
	$(VENV)/bin/litseek pipeline preset=demo run_dir=runs/demo

test: $(READY) ## the tests that need neither GPU nor browser
	OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(READY) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

wheel: $(READY) ## a wheel in dist/
	$(VENV)/bin/python -m build --wheel

# torch first and alone: the other packages then find it installed and never choose another build.
$(READY): pyproject.toml constraints.txt
	@python=; for p in $(PYTHON) python3.11 python3.12 python3 python; do \
	  if "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then echo "litseek needs Python 3.11 or 3.12; say which with: make setup PYTHON=/path/to/python" >&2; exit 1; fi; \
	if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then "$$python" -m venv --clear $(VENV); fi
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,rl,cluster]'
	@touch $@
