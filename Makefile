# Every target sets up what it needs; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-triton lint bench bench-traffic clean

demo: $(READY)
	$(BIN)/dropinf demo

test: $(READY)
	$(BIN)/python -m pytest tests/reference tests/api tests/distributed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests/interpreter
	DROPINF_SANITIZE=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/sanitizer
	TRITON_CACHE_DIR=$(VENV)/triton-cache $(BIN)/python -m pytest -n 2 tests/compile

# Every kernel with the oldest and the newest Triton that is supported; torch's own is in `test`.
test-triton: $(READY)
	tests/compile/other_triton.sh 3.6.0 -n 2
	tests/compile/other_triton.sh 3.9.0 -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m pytest bench/ops --benchmark-group-by=group --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# Interprets 29 calls and writes bench/results/traffic.md and .csv: three minutes.
bench-traffic: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m bench.traffic

# torch is named on the command line so that the pinned build is chosen before anything can ask for another.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dropinf needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .triton out .pytest_cache .mypy_cache .ruff_cache
