# Everything runs in a virtual environment of its own, made on first use. `make PYTHON=python3.12 test` picks another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := test,lint,bench,flower

.PHONY: demo test lint bench clean

demo: $(VENV)/.base
	@$(BIN)/python -m pool.demo $(if $(KILL),--kill) $(if $(JSON),--json)

test: $(VENV)/.full
	$(BIN)/python -m pytest $(ARGS)

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

# Some systems split venv off into a package that needs root to install; virtualenv from PyPI does without.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  $(PYTHON) -m pip install -q --target .venv-tools virtualenv && PYTHONPATH=.venv-tools $(PYTHON) -m virtualenv -q $(VENV); }

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.full: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.base
