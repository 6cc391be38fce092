# Everything runs in a virtual environment of its own, made on first use. `make PYTHON=python3.12 test` picks another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := test,lint,bench,flower
# Test processes at a time, for tests that bear company.
JOBS ?= 2
# Two real coding agents from npm, for the demo and the tests of agents. POOL_AGENTS_DIR names another place for them.
AGENTS_DIR := $(or $(POOL_AGENTS_DIR),.pool/agents)
NPM_AGENTS := @zed-industries/codex-acp@0.16.0 opencode-linux-x64@1.18.33

# More peers for the benchmarks: Python libraries, and agent-backend from npm. POOL_PEERS_DIR names another place for it.
PEERS_DIR := $(or $(POOL_PEERS_DIR),.pool/peers)
NPM_PEERS := agent-backend@0.13.2

.PHONY: demo test lint bench agents peers clean

demo: $(VENV)/.base $(if $(AGENTS),agents $(VENV)/.agents)
	@$(BIN)/python -m pool.demo $(if $(KILL),--kill) $(if $(AGENTS),--agents) $(if $(JSON),--json) $(if $(KEEP),--keep)

test: $(VENV)/.full
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -m alone
endif

lint: $(VENV)/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_import_law.py tests/unit/test_public_surface.py

bench: $(VENV)/.full
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	@if [ -x $(BIN)/python ]; then $(BIN)/python -c "from pathlib import Path; from pool import embedded; \
	  [embedded.stop(Path(folder)) for folder in ('.pool/valkey', '.pool/demo/valkey')]" || true; fi
	rm -rf $(VENV) .venv-tools .pool *.egg-info build dist .mypy_cache .ruff_cache .hypothesis celerybeat-schedule*

agents: $(AGENTS_DIR)/.installed

$(AGENTS_DIR)/.installed: Makefile
	@command -v npm >/dev/null || { echo "npm is needed for the real coding agents"; exit 1; }
	@mkdir -p $(AGENTS_DIR)
	npm install --prefix $(AGENTS_DIR) --no-save --no-package-lock --no-audit --no-fund --loglevel=error $(NPM_AGENTS)
	@touch $@

peers: $(VENV)/.full $(PEERS_DIR)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS),peers]"

$(PEERS_DIR)/.installed: Makefile
	@command -v npm >/dev/null || { echo "npm is needed for agent-backend's daemon and TypeScript client"; exit 1; }
	@mkdir -p $(PEERS_DIR)
	npm install --prefix $(PEERS_DIR) --no-save --no-package-lock --no-audit --no-fund --loglevel=error $(NPM_PEERS)
	@touch $@

# Some systems split venv off into a package that needs root to install; virtualenv from PyPI does without.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  $(PYTHON) -m pip install -q --target .venv-tools virtualenv && PYTHONPATH=.venv-tools $(PYTHON) -m virtualenv -q $(VENV); }

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.agents: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[agents]"
	@touch $@ $(VENV)/.base

$(VENV)/.full: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.base $(VENV)/.agents
