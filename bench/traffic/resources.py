"""Registers, shared memory and occupancy of each case's main kernel, compiled for an H100.

A process of its own, as kernels defined under TRITON_INTERPRET=1 do not compile: `python -m bench.traffic.resources`
prints one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# Of one multiprocessor of sm_90: CUDA C++ Programming Guide, compute capabilities.
REGISTERS, SHARED, THREADS, PROGRAMS = 65536, 228 << 10, 2048, 32
# The hardware takes 1 KiB of each program's shared memory, and gives out registers by 8 a thread.
RESERVED, GRANULE = 1 << 10, 8


def occupancy(registers: int, shared: int, warps: int) -> int:
    """Return how many programs fit on one multiprocessor."""
    per_warp = 32 * GRANULE * -(-registers // GRANULE)
    limits = (REGISTERS // per_warp // warps, SHARED // (shared + RESERVED), THREADS // (32 * warps), PROGRAMS)
    return min(limits)


def start(words: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start compiling the cases whose names have all `words`, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", "bench.traffic.resources", *words], env=environment, stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> dict[str, dict[str, Any]]:
    """Return {case: {"kernel", "registers", "shared", "warps", "programs"}}."""
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"bench.traffic.resources failed with exit status {process.returncode}")
    found: dict[str, dict[str, Any]] = json.loads(out)
    return found


def main(words: Sequence[str]) -> None:
    from tests.compile.fake_gpu import gpu

    from .cases import CASES, multiprocessors

    found = {}
    for case in CASES:
        if not all(word in case.name for word in words):
            continue
        problem = case.build()
        with multiprocessors(case.multiprocessors), gpu("sm_90") as kernels:
            problem.call()
        main_kernel = kernels[0]
        registers, warps = main_kernel.resources()["registers"], main_kernel.kernel.metadata.num_warps
        found[case.name] = {
            "kernel": main_kernel.name,
            "registers": registers,
            "shared": main_kernel.shared,
            "warps": warps,
            "programs": occupancy(registers, main_kernel.shared, warps),
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
