# Every target sets up what it needs; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# All tests but those of kernels, which need processes of their own, of GPUs and of other toolkits.
PLAIN := $(filter-out $(addprefix tests/,cases compile gpu gpu_like interop interpreter sanitizer __%),$(patsubst %/,%,$(wildcard tests/*/ tests/test_*.py)))
# On two cores; three processes where some tests wait for others. Machine code is kept from one run to the next.
PYTEST := $(BIN)/python -m pytest -n 2
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) --dist loadgroup tests/interpreter
GPU_LIKE := TRITON_INTERPRET=1 $(PYTEST) tests/gpu_like
COMPILED := TRITON_CACHE_DIR=$(VENV)/triton-cache $(PYTEST) tests/compile
COLUMNS := --benchmark-group-by=group --benchmark-columns=median,iqr,rounds --benchmark-sort=name
HAS_CUDA := $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'

.PHONY: demo test test-kernels test-gpu-like test-long test-interop test-triton test-gpu lint bench bench-endtoend bench-traffic bench-gpu clean

demo: $(READY)
	$(BIN)/dropinf demo

test: $(READY)
	$(PYTEST) -n 3 --dist worksteal -m "not long and not more" $(PLAIN)
	$(INTERPRETED) -m "not kernels"
	DROPINF_SANITIZE=1 TRITON_INTERPRET=1 $(PYTEST) tests/sanitizer
	$(COMPILED) -m "not kernels"
	@echo "Left to make test-kernels, fifteen minutes: kernels compiled for every architecture and dtype (here bf16 on sm_90 alone), on"
	@echo "the interpreter half precision, random shapes and offsets past two billion elements; capture in other orders of batches, and on"
	@echo "tensors that say they are on a GPU;"
	@echo "other interleavings of processes, and more damage."

# What `test` leaves out: run it where you changed dropinf_kernels, how gradients are captured, or an index.
test-kernels: $(READY)
	$(PYTEST) --dist worksteal -m "more and not long" tests/capture tests/faults tests/reference tests/recording
	$(INTERPRETED) -m kernels
	$(COMPILED) -m kernels
	$(MAKE) test-gpu-like

# What differs on a GPU, without one.
test-gpu-like: $(READY)
	$(GPU_LIKE) -m "not kernels"
	$(GPU_LIKE) -m kernels

# Indexing killed at a hundred instants, every byte flipped, thousands of damaged indexes, two thousand interleavings; and
# capture in yet other orders of batches, with other sketches.
test-long: $(READY)
	$(BIN)/python -m pytest -m long tests/faults
	$(PYTEST) --dist worksteal -m long tests/capture

# Each adapter against its installed toolkit, in an environment of its own: ten minutes the first time.
test-interop: $(READY)
	$(BIN)/python -m tests.interop.run

# Every kernel with the oldest and the newest Triton that is supported; torch's own is in `test`.
test-triton: $(READY)
	tests/compile/other_triton.sh 3.6.0 -n 2
	tests/compile/other_triton.sh 3.9.0 -n 2

# On a GPU: tests/gpu, and the interpreter's tests without the interpreter. Elsewhere it says why not.
test-gpu: $(READY)
	env -u TRITON_INTERPRET $(BIN)/python -m pytest -rs tests/gpu
	@if $(HAS_CUDA); then env -u TRITON_INTERPRET DROPINF_GPU=1 $(BIN)/python -m pytest -n 4 tests/interpreter; \
	else echo "tests/interpreter on a GPU: skipped, there is no CUDA device"; fi

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The ops: ten minutes, then what got slower than the committed run (bench/results/ops.csv). What is freed stays with the
# process, as in bench/endtoend: which call's pages are given back and taken again is chance.
bench: $(READY)
	mkdir -p out
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776 $(BIN)/python -m pytest bench/ops $(COLUMNS) --benchmark-timer=time.process_time --benchmark-json=out/bench.json
	$(BIN)/python -m bench.compare out/bench.json

# Extraction beside every peer, the whole job, and how cost grows: forty minutes. Environments as test-interop makes them.
bench-endtoend: $(READY)
	$(BIN)/python -m bench.endtoend
	$(BIN)/python -m bench.endtoend.whole
	$(BIN)/python -m bench.endtoend.scaling

# Interprets 32 calls and writes bench/results/traffic.md and .csv: three minutes.
bench-traffic: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m bench.traffic

# On a GPU, nine minutes a call: the same call goes on. Elsewhere a dry run, whose times mean nothing.
bench-gpu: $(READY)
	@if $(HAS_CUDA); then $(BIN)/python -m bench.gpu out/gpu && $(BIN)/python -m bench.gpu.report out/gpu --into bench/results; \
	else $(BIN)/python -m bench.gpu out/gpu-dry-run --dry-run && $(BIN)/python -m bench.gpu.report out/gpu-dry-run; fi

# torch is named on the command line so that the pinned build is chosen before anything can ask for another.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dropinf needs Python 3.10 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-interop .triton out .pytest_cache .mypy_cache .ruff_cache
