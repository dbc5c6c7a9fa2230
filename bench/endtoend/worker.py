"""One contender in a process of its own: makes its job, then runs it each time that a line comes in on stdin.

Prints a JSON line each time: CPU seconds, and, where asked for "memory", MB that torch held at most.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import torch

from bench.peak import peak_mb

from .contenders import Job, Unfit

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# What is freed stays with the process: pages given back and taken again are up to a fifth of the time, more in one run
# than in the next.
SETTINGS = {**ONE_THREAD, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
SLOW = 40.0  # seconds of a job that is timed once, without a run before it


def main(module: str, case: str, name: str) -> None:
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what toolkits print goes to stderr

    def say(**found: Any) -> None:
        print(json.dumps(found), file=out, flush=True)

    found = importlib.import_module(module)
    contender = found.CONTENDERS[name]
    try:
        job = contender.make(found.CASES[case]())
        seconds = timed(job)
    except Unfit as reason:
        say(unfit=str(reason))
        return
    say(version=version(contender.package))
    for line in sys.stdin:
        if line.strip() == "memory":
            say(mb=peak_mb(job))
        else:
            if seconds < SLOW:
                job()  # the others ran meanwhile: its pages and caches are cold
            seconds = timed(job)
            say(seconds=seconds)


def timed(job: Job) -> float:
    start = time.process_time()
    job()
    seconds = time.process_time() - start
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # fourteen processes wait in one memory
    return seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
