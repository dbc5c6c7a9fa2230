"""Runs steps one after the other in a process that may die: ``python -m bench.gpu.worker OUT DEADLINE [options]``."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from pathlib import Path

import torch

from bench.files import replacing

from .clock import Machine, dry_run, gpu
from .results import Results
from .steps import Step, all_steps

RUNNING = "running.json"
DONE, LATE, POISONED = 0, 3, 4  # exit codes: all steps are settled, some are left, the GPU takes no more calls


def pending(machine: Machine, results: Results, only: str) -> list[Step]:
    """Return the steps that are left."""
    settled = results.settled()
    return [step for step in all_steps(machine) if step.name not in settled and only in step.name]


def run(machine: Machine, folder: Path, deadline: float, only: str) -> int:
    """Run steps until all are settled, or until the next would not be done in time."""
    results = Results(folder)
    for step in pending(machine, results, only):
        if time.time() + step.limit / 3 > deadline:
            return LATE
        with replacing(folder / RUNNING) as note:
            note.write_text(json.dumps({"step": step.name, "since": time.time(), "limit": step.limit}))
        start = time.perf_counter()
        try:
            torch.manual_seed(0)
            found = step.run(machine)
        except Exception as error:  # the others are to be measured all the same
            results.add(step=step.name, table=step.table, error=f"{type(error).__name__}: {error}"[:2000])
            traceback.print_exc()
            if isinstance(error, getattr(torch, "AcceleratorError", ())):
                return POISONED
        else:
            results.add(step=step.name, table=step.table, seconds=round(time.perf_counter() - start, 3), **found)
        print(f"{step.name}: {time.perf_counter() - start:.1f} s", flush=True)
        gc.collect()
        if not machine.dry:
            torch.cuda.empty_cache()
    return DONE


def warm(machine: Machine, share: int, of: int, only: str, results: Results, deadline: float) -> int:
    """Compile the kernels of every ``of``-th step; what a compilation says is said again when the step runs."""
    steps = [step for step in pending(machine, results, only) if step.warm is not None]
    for step in steps[share::of]:
        if time.time() > deadline:
            return LATE
        assert step.warm is not None
        try:
            step.warm(machine)
        except Exception as error:
            print(f"{step.name}: {type(error).__name__}: {error}", flush=True)
    return DONE


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("deadline", type=float)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--warm", type=int, nargs=2)
    given = parser.parse_args()
    machine = dry_run() if given.dry_run else gpu()
    if given.warm:
        return warm(machine, *given.warm, given.only, Results(given.out), given.deadline)
    return run(machine, given.out, given.deadline, given.only)


if __name__ == "__main__":
    sys.exit(main())
