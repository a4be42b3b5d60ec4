# `make train` and `make test` set up everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# One process is enough for the quickstart; the other flags name accelerate's defaults, about which
# it would otherwise print a page.
LAUNCH := --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: train article test test-quick test-slow test-oldest test-browser chaos fuzz audit check clean

train: .venv/installed
	$(BIN)/accelerate launch $(LAUNCH) scripts/train.py

# The NeuralHermes article in small, one command a stage, as in the README.
article: .venv/installed-dev
	rm -rf runs/article
	$(BIN)/accelerate launch $(LAUNCH) scripts/train.py --model.quantization nf4 --train.output_dir runs/article
	$(BIN)/dpo merge runs/article --dtype bfloat16
	$(BIN)/dpo generate runs/article/merged "Tell me the last of these words: bread, flower, garden."
	$(BIN)/dpo evaluate runs/article --judge exact_match --lm_eval quickstart --include_path docs/lm_eval
	$(BIN)/dpo report runs/article

# All tests but those that are slow, start several processes, or need a browser or a GPU.
test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not distributed and not browser"

# The maths, the data, the stream and the scorer: within a minute, in one process.
test-quick: .venv/installed-dev
	$(BIN)/python -m pytest -m quick

# The slow ones and those of several processes: 70B on paper, two ranks, the quickstart, benchmarks.
test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal --durations 12 -m "(slow or distributed) and not browser"

# The tests that are not slow, and the compiler's, on the lower bounds of setup.cfg; other packages are pinned.
# If no CPU build of that torch is found, pip takes one for CUDA: 3 GB.
OLDEST := .venv-oldest
TYPED := --jaxtyping-packages=dpo,beartype.beartype
test-oldest: $(OLDEST)/installed
	FUZZ=200 $(OLDEST)/bin/python -m pytest -n auto --dist worksteal $(TYPED) -m "not slow and not distributed and not browser"
	$(OLDEST)/bin/python -m pytest tests/model/test_compile.py

# Kills a run N times at random moments, and damages every file that it reads in every way.
N ?= 100
chaos: .venv/installed-dev
	CHAOS_KILLS=$(N) $(BIN)/python -m pytest tests/chaos

# Mutates so many rows, and a tenth of it configurations: each is read, dropped or refused by its place.
fuzz: .venv/installed-dev
	FUZZ=$(N) $(BIN)/python -m pytest tests/fuzz

# The report in Debian's Chromium, which is installed if it is missing; a skip is a failure here.
test-browser: .venv/installed-dev
	command -v chromium || { $(SUDO) apt-get update && $(SUDO) apt-get install --yes --no-install-recommends chromium; }
	DPO_BROWSER_REQUIRED=1 $(BIN)/python -m pytest -m browser

# Known vulnerabilities of the pinned packages, by pip-audit in an environment of its own; it needs a
# network, and fails where a package could not be looked up.
AUDIT := .venv-audit
audit:
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet pip-audit==2.10.0; }
	$(AUDIT)/bin/pip-audit -r constraints.txt --no-deps --disable-pip --progress-spinner off -f json 2>/dev/null \
		| $(PYTHON) .ci/audit.py

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) -e '.[dev,eval]'
	touch $@

$(OLDEST)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	sed -nE 's/^ +([a-z_]+)(\[[a-z]+\])?>=/\1==/p' setup.cfg > $(OLDEST)/lowest.txt
	awk -F== 'FNR == NR {print; seen[$$1]; next} !($$1 in seen)' $(OLDEST)/lowest.txt constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e '.[dev,eval]'
	touch $@

clean:
	rm -rf .venv $(OLDEST) $(AUDIT) build dist *.egg-info
