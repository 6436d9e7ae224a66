# `make` alone lists the targets. Everything is installed into .venv, at the versions of constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# One thread a worker: the tests are many and small. loadfile keeps the blocks of one page together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile
TESTED := --doctest-modules --nbmake tests secorder_func README.md docs notebooks

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help venv demo test test-full test-torch coverage-table proven lint format docs serve notebooks bench bench-quick pictures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.dev ## create .venv with everything that development needs

demo: $(VENV)/.report ## show what the library does
	@$(BIN)/python -m secorder_func

test: lint ## lint, types, import contracts, tests, doctests, README, notebooks
	@$(PYTEST) -m "not slow" $(TESTED)

test-full: lint docs ## test, the slow tests and the documentation site
	@$(PYTEST) $(TESTED)

test-torch: ## the tests on another torch: make test-torch VERSION=2.9.1
	@test -n "$(VERSION)" || { echo "Say which: make test-torch VERSION=2.9.1"; exit 2; }
	@test -d .venv-torch-$(VERSION) || $(PYTHON) -m venv .venv-torch-$(VERSION)
	@sed '/^torch==/d' constraints.txt > .venv-torch-$(VERSION)/constraints.txt
	@.venv-torch-$(VERSION)/bin/python -m pip install -qq --disable-pip-version-check \
		-c .venv-torch-$(VERSION)/constraints.txt torch==$(VERSION) -e '.[test]'
	@OMP_NUM_THREADS=1 .venv-torch-$(VERSION)/bin/python -m pytest -q -n auto --maxprocesses 8 \
		--dist loadfile --doctest-modules tests secorder_func README.md docs

lint: $(VENV)/.dev ## check format, lint, types and import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev ## format and mend what can be mended by itself
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.dev ## build the site into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

serve: $(VENV)/.dev ## show the site while it is written
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

coverage-table: $(VENV)/.dev ## write docs/coverage.md: what works by which mode
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.coverage

proven: $(VENV)/.dev ## find the functions whose forward rule in torch may be differentiated
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.coverage.propagation
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.coverage.propagation_twice

notebooks: $(VENV)/.dev ## run every notebook and store its outputs
	@$(PYTEST) --nbmake --overwrite notebooks

bench: $(VENV)/.bench ## measure against the gradient and the other packages
	@$(BIN)/python -m bench

pictures: $(VENV)/.report ## draw the picture of the README and the report that the site shows
	@$(BIN)/python docs/pictures.py
	@$(BIN)/python -m secorder_func report --output docs/assets/report

bench-quick: $(VENV)/.bench ## the same on small problems, to see that it runs
	@$(BIN)/python -m bench --quick

clean: ## remove what was built and cached; .venv stays
	@rm -rf build dist site secorder-out bench/scratch *.egg-info
	@rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .cache
	@find . -path ./$(VENV) -prune -o -type d \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# Stamps: an installation is repeated when what it installs has changed.

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
		"Python 3.10 or newer is needed; name one with make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.report: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing secorder_func and what its report needs (about a minute)"
	@$(PIP) -e '.[report]'
	@touch $@

$(VENV)/.dev: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing the development tools (up to two minutes)"
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.report $@

$(VENV)/.bench: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing the packages to measure against (about a minute)"
	@$(PIP) -e '.[bench]'
	@touch $@
