# Every target sets up what it needs; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/dropinf demo

test: $(READY)
	$(BIN)/python -m pytest tests/reference tests/api tests/distributed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/interpreter
	TRITON_CACHE_DIR=$(VENV)/triton-cache $(BIN)/python -m pytest -n 2 tests/compile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m pytest bench/ops --benchmark-group-by=group --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# torch is named on the command line so that the pinned build is chosen before anything can ask for another.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dropinf needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
