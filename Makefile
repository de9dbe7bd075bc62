# Needs Python 3.10-3.12, make and git; everything else is installed into .venv by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What Debian must bring: a real browser for the tests that look at Dagster's pages, and a real PostgreSQL.
SYSTEM_PACKAGES := chromium postgresql

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-ui check lint types layers test test-services test-pipelines test-parts test-fast test-programs system-packages constraints tables clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## miniatures of all six datasets from loopback servers to latents that a trainer mixes
	@$(BIN)/md-assets demo

demo-ui: $(STAMP) ## the demo's data in Dagster's UI, with the Hub still answering
	@$(BIN)/md-assets demo --ui

# `check` is all that can be told without running the code, `test` all that must be run: CI calls both and does
# nothing twice.
check: lint types layers ## lint, types and import layers: seconds

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	$(BIN)/mypy

layers: $(STAMP) ## import-linter: who may import whom
	$(BIN)/lint-imports

test: $(STAMP) test-programs ## the whole suite in three processes; ARGS='-k word' for a part of it in one
ifdef ARGS
	$(BIN)/pytest $(ARGS)
else
	@$(MAKE) --no-print-directory --keep-going --jobs=3 --output-sync=target test-services test-pipelines test-parts
endif

# What waits for Dagster's daemon takes long and works little. Whatever trains on latents is in one process: its tests look
# at all shared memory of the machine.
SERVICES := $(patsubst %,md_assets_tests/end_to_end/test_%.py,automation backfill faulty_backfill postgres)
PIPELINES := $(addprefix md_assets_tests/,end_to_end loader)

test-services: $(STAMP) ## backfills with Dagster's daemon
	$(BIN)/pytest $(SERVICES)

test-pipelines: $(STAMP) ## other whole pipelines, and the loader
	$(BIN)/pytest $(PIPELINES) $(addprefix --ignore=,$(SERVICES))

test-parts: $(STAMP) ## all other tests
	$(BIN)/pytest $(addprefix --ignore=,$(PIPELINES))

test-fast: $(STAMP) ## without process kills, browsers, environments and whole pipelines
	$(BIN)/pytest -m "not slow" $(ARGS)

# Without them their tests are skipped with a reason, except in CI, where they fail. Debian keeps initdb off the PATH.
test-programs:
	@command -v chromium >/dev/null && ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && $(MAKE) --no-print-directory system-packages; then :; \
	else echo "Tests without their programs will be skipped (make system-packages, as root: $(SYSTEM_PACKAGES))"; fi

system-packages: ## what the tests need from Debian, by apt-get; as root
	apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(SYSTEM_PACKAGES)

venv: $(STAMP) ## the environment; made anew only when pyproject.toml or constraints.txt change

# uv installs the 6 GB in half a minute, pip in several; so where there is none, pip installs uv first. Where uv cannot
# (it does not read pip.conf, which may name the only registry that this machine reaches), pip does it all. Bytecode is
# compiled at once, as pip does it, so that the first run is not the slow one.
export UV_SYSTEM_CERTS := 1# trust what pip and git trust; UV_NATIVE_TLS is its name in older versions
export UV_NATIVE_TLS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PACKAGES := -e '.[dev]' -c constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || { echo \
	  "md_assets needs Python 3.10, 3.11 or 3.12; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	  "Name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@set -e; uv=$$(command -v uv || true); \
	if ! $(BIN)/python -c "" 2>/dev/null; then \
	  rm -rf $(VENV); \
	  if [ -n "$$uv" ]; then uv venv -q --seed --python "$$(command -v $(PYTHON))" $(VENV); \
	  elif $(PYTHON) -c "import ensurepip" 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	  else echo "This Python cannot make environments: install uv, or Debian's python3-venv." >&2; exit 1; fi; \
	fi; \
	if [ -z "$$uv" ]; then uv=$(BIN)/uv; [ -x $$uv ] || $(BIN)/python -m pip install -q uv || true; fi; \
	echo "Installing into $(VENV) (about 6 GB with PyTorch and CUDA; half a minute to some minutes)"; \
	$$uv pip install -q --compile-bytecode --python $(BIN)/python $(PACKAGES) || { \
	  echo "uv could not; pip tries, which takes minutes" >&2; $(BIN)/python -m pip install -q $(PACKAGES); }
	@touch $@

# Versions that are in the file already stay unless pyproject.toml excludes them; `make constraints ARGS=--upgrade`.
constraints: $(STAMP) ## constraints.txt anew from pyproject.toml
	@uv=$$(command -v uv || echo $(BIN)/uv); $$uv pip compile -q --universal --python-version 3.10 --extra dev \
	  --no-annotate --custom-compile-command "make constraints" pyproject.toml -o constraints.txt $(ARGS)

tables: $(STAMP) ## the generated tables of README.md
	$(BIN)/python docs/tables.py

clean: ## environment, caches, build output and the demo's data; never datadir
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache demo_data
	find md_assets md_assets_tests -name __pycache__ -prune -exec rm -rf {} +
