"""Reading an index ten times as large as its memory budget stays under the budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("index_memory.py")
BUDGET = 16 << 20
ROWS = 45_056


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_memory_stays_under_the_budget(dtype, tmp_path):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of a process is reset through /proc/self/clear_refs, which this system does not have")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), str(BUDGET), str(ROWS), dtype],
        # glibc gives back what a job freed before the next, and FAISS does not wait for threads beside other tests.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {name: int(value) for name, value in (line.rsplit(" ", 1) for line in done.stdout.splitlines())}
    rows_in_memory = 4 * ROWS * 1024
    assert rows_in_memory > 10 * BUDGET
    assert found.pop("bytes") > ROWS * 1024 * (4 if dtype == "float32" else 1)
    assert found.pop("compress") < 3 * (64 << 20)  # a shard, as it is written
    assert found.keys() == {"score", "cosine", "relative", "self-influence", "fisher", "whitened", "flat", "coded"}
    for name, peak in found.items():
        assert BUDGET // 16 < peak < BUDGET, f"{name} took {peak >> 20} MiB"  # more than 2: it is measured at all
