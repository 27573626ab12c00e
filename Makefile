# make demo    a chat and an API on this machine, with the model that ships with the package
# make test    every test, or some: make test ARGS='-k name'
# make lint    style, formatting and types
# make bench   the load test: the whole product against the engine alone, ARGS=--help for its options
# make clean   removes the environment; var/ (database, keys, logs) stays

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000

BIN := $(VENV)/bin
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench clean

help:
	@sed -n 's/^# //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "Python lacks the venv module (Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }

$(BASE): $(INPUTS) | $(BIN)/python
	@echo "Installing into $(VENV), which takes a minute or two the first time ..."
	@$(PIP) --editable .
	@touch $@

$(DEV): $(INPUTS) | $(BIN)/python
	@echo "Installing into $(VENV), with the development tools ..."
	@$(PIP) --editable '.[dev]'
	@touch $(BASE) $@

demo: $(BASE)
	@exec $(BIN)/python -m project.demo --host $(HOST) --port $(PORT)

test: $(DEV)
	$(BIN)/python -m pytest $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV)
	$(BIN)/python -m benchmarks.load $(ARGS)

clean:
	rm -rf $(VENV)
