# make setup | demo | test | lint | bench — `make` alone says what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages
STAMP := $(VENV)/.installed
# Type checkers and editors find an editable install by a path (compat), not by setuptools' hook.
EDITABLE := --config-settings editable_mode=compat --editable '.[dev]'
# What commands import is compiled once; pip would compile every file of every package, for minutes.
COMPILED := cluster.ray_train_tune, matplotlib.pyplot, ray.serve, services.cli, torchvision
COMPILE := 'import importlib.util, $(COMPILED); importlib.util.find_spec("label_studio_sdk") and \
	importlib.import_module("label_studio_sdk")'
INSTALL_LABEL_STUDIO := 'import sys; from services.labeling.local_server import NEWEST_PYTHON, install; \
	from services.settings import read_environment; \
	sys.version_info[:2] <= NEWEST_PYTHON and install(read_environment().cache)'
# Processes of tests. On two cores four: some tests wait for servers at any time.
TESTS_AT_ONCE ?= 4
# A shell command that installs the browser of the tests where there is none, run beside the set-up.
INSTALL_BROWSER ?= true

.PHONY: help setup demo test lint bench clean

help:
	@echo "make setup   make the environment in $(VENV) and install Defuse there"
	@echo "make demo    find, show and fix the failures of a classifier of MNIST (1.5 to 4 minutes after the setup, no GPU)"
	@echo "make test    lint, types, import contracts and all tests"
	@echo "make bench   measure what is faster than what, on a quiet machine (some 15 minutes)"

setup: $(STAMP)

$(STAMP): $(PACKAGES)
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c $(COMPILE)
	touch $@

$(PACKAGES): pyproject.toml deploy/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 15) else "Defuse needs Python 3.11 to 3.14; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --quiet --no-compile --constraint deploy/constraints.txt $(EDITABLE)
	touch $@

demo: setup
	$(BIN)/defuse run deploy/runs/demo.yaml

lint: $(PACKAGES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Label Studio is installed beside the tests' own environment, which waits for downloads; lint runs beside the rest of
# the set-up and the tests. What failed there is printed last.
test:
	mkdir -p $(VENV)
	{ $(INSTALL_BROWSER); } & browser=$$!; \
	$(PYTHON) -c $(INSTALL_LABEL_STUDIO) > $(VENV)/label-studio.log 2>&1 & installed=$$!; \
	$(MAKE) --no-print-directory $(PACKAGES) || { kill $$browser $$installed; exit 1; }; \
	$(MAKE) --no-print-directory lint > $(VENV)/lint.log 2>&1 & linted=$$!; \
	$(MAKE) --no-print-directory setup && wait $$browser || { kill $$installed $$linted; exit 1; }; \
	$(BIN)/python -m pytest --numprocesses $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder; failed=$$?; \
	wait $$installed || { failed=1; cat $(VENV)/label-studio.log; }; \
	wait $$linted || { failed=1; cat $(VENV)/lint.log; }; \
	exit $$failed

bench: setup
	$(BIN)/python tests/bench/all.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
