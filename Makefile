# Two commands for a fresh machine: `make demo` and `make test`. Everything lands in .venv; nothing else is touched.
SHELL := /bin/bash
BIN := .venv/bin
INSTALLED := .venv/.installed
LM_EVAL := .venv/.lm-eval
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
# The first Python that fits; `make PYTHON=/path/to/python3.12 …` names another.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
	$$p -c '$(FITS)' 2>/dev/null && { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-sweep test test-all test-lm-eval lint types clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## a virtual environment with ftray and its dependencies, once

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "ftray needs Python 3.11 or 3.12; name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setup: installing ftray and its dependencies into .venv; torch and Ray are large, so this takes minutes"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@
	@echo "setup: done"

demo: setup ## fine-tune the built-in model on generated orders, then serve base and versions and swap them under load
	@$(BIN)/python jobs/demo.py

demo-sweep: setup ## search learning rate, rank and epochs of the demo's run, and register the best
	@$(BIN)/python jobs/demo_sweep.py

test: setup ## the tests, those that start Ray last; without the slow ones
	@$(BIN)/python -m pytest -m 'not slow'

test-all: setup ## the slow tests too
	@$(BIN)/python -m pytest

test-lm-eval: $(LM_EVAL) ## the tests of benchmarks, for which the extra lm-eval is added to .venv
	@$(BIN)/python -m pytest tests/evaluate/test_tasks.py tests/objectives/test_lm_eval.py

$(LM_EVAL): $(INSTALLED)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev,lm-eval]'
	@touch $@

lint: setup ## ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup ## mypy
	@$(BIN)/mypy

clean: ## delete .venv and caches; ftray-store, where results are, stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
