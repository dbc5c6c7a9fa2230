"""No kernel leaves its arguments' memory or races in shared memory, as NVIDIA's compute-sanitizer sees it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.all_cases import OPS

ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer")
pytestmark = pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer of the CUDA toolkit is not on the path")
FOUND = 86  # any status that Python does not end with
# What a library asks of the driver in vain is no fault of a kernel.
OPTIONS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}


def sanitized(tool: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python under a tool, with an allocation of its own for each tensor, whose bounds the tool knows."""
    return subprocess.run(
        [SANITIZER, "--tool", tool, *OPTIONS[tool], "--error-exitcode", str(FOUND), sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


# Two threads of a reduction may store one sum that they rounded differently: racecheck tells of it, and it does no harm.
@pytest.mark.parametrize("tool", OPTIONS)
@pytest.mark.parametrize("op", OPS)
def test_finds_nothing(op, tool):
    done = sanitized(tool, "-m", "tests.gpu.all_cases", op)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert f"{op} torch.bfloat16" in done.stdout


def test_finds_a_planted_access_out_of_bounds():
    done = sanitized("memcheck", "-c", "from tests.gpu.all_cases import run_out_of_bounds; run_out_of_bounds()")
    assert done.returncode != 0
    assert re.search(r"Invalid __global__ (read|write)", done.stdout), done.stdout[-4000:]
