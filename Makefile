# make demo      sets up .venv and shows a whole run on a tiny model, in a few minutes
# make test      sets up what the tests need, checks the code, runs the tests
# make test-all  the same with the slow tests
# make clean     removes .venv and everything built

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: of most of what comes along, that is never.
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt
# Two workers, since most tests use one core; each file stays on one of them, with its fixtures.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Waiting OpenMP threads sleep instead of spinning, which would slow down every other process by a lot.
export OMP_WAIT_POLICY := passive

.PHONY: demo test test-all check clean

demo: $(VENV)/installed
	$(BIN)/luthier demo

test: check
	OMP_NUM_THREADS=1 $(PYTEST)

test-all: $(VENV)/installed-for-all-tests check
	OMP_NUM_THREADS=1 $(PYTEST) -m ""

check: $(VENV)/installed-for-tests
	$(BIN)/ruff check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The files below mark what is installed, so that it is done again only when a requirement has changed.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/pip
	@echo "Installing Luthier into $(VENV); the first time this takes a few minutes."
	@# torch first: with it there, nothing else pulls in another build of it.
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/installed-for-all-tests: $(VENV)/installed-for-tests
	$(PIP) -e ".[test-all]"
	@touch $@

$(VENV)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	echo "error: there is no $(PYTHON) here; name a Python from 3.11 on: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	"error: Luthier needs Python 3.11 or later, and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@
