PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup format lint test test-peers test-slow run wheel ci

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## a virtual environment in .venv with the tested versions
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[dev]"

format:  ## rewrite the code as ruff wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lint:  ## ruff and mypy, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test:  ## the quick tests
	$(BIN)/python -m pytest

test-slow:  ## the slow ones, on real models
	$(BIN)/python -m pytest -m slow

test-peers:  ## smoke and parity tests on transformers 5.2 with kvpress, in .venv-peers
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -q -c constraints-peers.txt -e ".[dev,peers]"
	.venv-peers/bin/python -m pytest -m "(smoke or peers) and not slow and not gpu"

run:  ## the embedded default pair on the built-in document
	$(BIN)/python -m specsmallkv.run

wheel:  ## dist/*.whl
	$(BIN)/pip wheel --no-deps -w dist .

ci:  ## everything that must pass, in fresh environments
	.ci/run
