.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: .venv/installed  ## make .venv with the pinned versions

demo: install  ## five hospitals train one model on this machine, encrypted, over a real bus
	$(BIN)/fednats demo --output output

test: install check  ## everything CI runs
	$(BIN)/pytest tests/integration -m 'not long' -n 2
	$(BIN)/pytest tests/e2e -m 'not long' -n 2 --dist worksteal

check: install  ## format, lint, types, import rules, doctests, unit and property tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/unit tests/property -m 'not long' -n 2
	$(BIN)/pytest --doctest-modules fednats

test-long: install  ## the long forms as well
	$(BIN)/pytest -m ''

SEED ?= 1
soak: install  ## five minutes of faults at random; SEED=3 draws others
	SOAK_SEED=$(SEED) $(BIN)/pytest -m long tests/e2e/test_soak.py

COUNT ?= 100000
fuzz: install  ## hostile bytes for every decoder; SEED=3 draws others, COUNT=1000000 more
	FUZZ_SEED=$(SEED) FUZZ_COUNT=$(COUNT) $(BIN)/pytest -s -m long tests/property/test_hostile_bytes.py

format: install  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: help install demo test check test-long soak fuzz format
