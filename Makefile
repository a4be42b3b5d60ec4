# `make train` and `make test` set up everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# One process is enough for the quickstart; the rest only says what the defaults are, or accelerate
# prints a page about them.
LAUNCH := --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: train test check clean

train: .venv/installed
	$(BIN)/accelerate launch $(LAUNCH) scripts/train.py

# All tests but those that need a GPU (they are skipped without one).
test: .venv/installed-dev
	$(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
