# make demo   trains, searches, fine-tunes, packs and reports on scikit-learn's digits: under 5 minutes on 2 cores
# make test   all tests and doctests: under 10 minutes on 2 cores
# make lint   ruff and mypy --strict
# make docs   the documentation as a site under site/
#
# Each target makes .venv by itself. PYTHON chooses the interpreter; DEMO_ARGS goes to `bitwright run`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
DEMO_ARGS ?=

.PHONY: demo test lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/bitwright run digits-sdq --out runs/digits-sdq $(DEMO_ARGS)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.lint
	$(BIN)/ruff check src tests
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

# One stamp per set of extras, so that a second call starts at once.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bitwright needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[demo,images,test]'
	touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(PIP) -e '.[lint]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@

clean:
	rm -rf site build .pytest_cache .mypy_cache .ruff_cache
