"""One contender in a process of its own: makes its job, then runs it each time that a line comes in on stdin.

Prints a JSON line each time: CPU seconds, and, where asked for "memory", MB that the process grew by at most.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .contenders import CONTENDERS, Unfit
from .models import CASES


def status(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def grown_mb(job: Callable[[], object]) -> float:
    """MB that the process grew by while the job ran, beside what it held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    job()
    return status("VmHWM") - before


def main(case: str, name: str) -> None:
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what toolkits print goes to stderr

    def say(**found: Any) -> None:
        print(json.dumps(found), file=out, flush=True)

    contender = CONTENDERS[name]
    try:
        job = contender.make(CASES[case]())
        job()
    except Unfit as reason:
        say(unfit=str(reason))
        return
    say(version=version(contender.package))
    for line in sys.stdin:
        if line.strip() == "memory":
            say(mb=grown_mb(job))
        else:
            start = time.process_time()
            job()
            say(seconds=time.process_time() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
