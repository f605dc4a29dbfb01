# Everything runs in .venv, made on first use. Nothing outside the repository is touched but the asset cache
# (~/.cache/lorafx/assets, or $LORAFX_ASSETS).
PYTHON ?= python3
# The tried version, installed before everything else so that no other requirement picks the build for it.
TORCH  ?= torch==2.13.0
# Test files go to workers whole: a capture cached by one test serves the rest of its file.
PYTEST_ARGS ?= -n auto --dist loadfile

BIN     := .venv/bin
STAMP   := .venv/.lorafx-installed
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test quick check docs format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Create .venv and install lorafx (editable) with everything demo and tests need

$(STAMP): pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@echo "installing into .venv (a few minutes the first time)" >&2
	@$(INSTALL) "$(TORCH)"
	@$(INSTALL) -e ".[test,demo]"
	@touch $@

demo: $(STAMP) ## Fine-tune, fold, export, verify and time MiniLM on real sentences (under 10 minutes on two cores)
	@$(BIN)/python examples/demo.py

test: $(STAMP) ## Run every test, the ones on real weights included
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

quick: $(STAMP) ## Run the tests that need no download
	@$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

check: $(STAMP) ## Lint (ruff) and type-check (pyright)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP) ## Build the documentation into build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

format: $(STAMP) ## Apply ruff's fixes and formatting
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove .venv, caches and builds
	@rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
