# Every target sets itself up: a virtual environment in .venv, its packages pinned by constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
# Tests of what depends on Python's own library: the command line, readers, records, bundles, processes, the package.
PYTHONS := tests/cli tests/formats tests/records tests/tuning/test_bundle.py tests/tuning/test_cross_bundle.py tests/test_interrupts.py \
	tests/test_packaging.py tests/test_processes.py

.PHONY: help demo test test-all test-gpu test-python check docs bench bench-quick clean

help:
	@echo 'make demo      a tuned, validated, exported kernel for a ResNet-50 layer, in build/demo'
	@echo 'make test      the tests (minutes)'
	@echo 'make test-all  the exhaustive run'
	@echo 'make test-gpu  what needs an NVIDIA GPU'
	@echo 'make test-python  what depends on Python itself, without the peers; for a PYTHON=… and VENV=… of its own'
	@echo 'make check     ruff and mypy'
	@echo 'make docs      the site of the documentation, in build/docs'
	@echo 'make bench-quick  24 layers of all kinds beside the peers, untuned (2 minutes)'
	@echo 'make bench     tune the ResNet-50 layers and time them beside the peers (an hour; resumes)'
	@echo 'make clean     remove what the others made'
	@echo 'PYTHON=python3.12 make …   another interpreter (3.11 or later)'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'convgen needs Python 3.11 or later: PYTHON=… make …'; exit 1; }
	@echo 'setting up $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt pip setuptools
	@PYTHONWARNINGS=ignore $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,docs,cuda]'
	@touch $@

$(PEERS): $(INSTALLED)
	@echo 'installing the peers, and zig'
	@PYTHONWARNINGS=ignore $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,docs,cuda,peers,cross]'
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py

test: $(PEERS)
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow'

test-all: $(PEERS)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-gpu: $(PEERS)
	$(BIN)/python -m pytest -m gpu

test-python: $(INSTALLED)
	$(BIN)/python --version
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow' $(PYTHONS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env -c docs/site docs build/docs
	@echo 'build/docs/index.html'

bench-quick: $(PEERS)
	@$(BIN)/python bench/run.py --quick

bench: $(PEERS)
	$(BIN)/python bench/run.py bench/problems/resnet50.json

clean:
	rm -rf $(VENV) .venv-newest build dist convgen.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
