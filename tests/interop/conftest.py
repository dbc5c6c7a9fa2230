"""What the adapters' tests share."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import pytest
import torch

Job = Callable[[], object]


@pytest.fixture
def record(request):
    """Call with what was run and what was found: a row of the table. `package` is the toolkit's name on PyPI."""
    toolkit = request.module.__name__.rpartition(".")[2].removeprefix("test_")

    def add(package: str, what: str, **found: object) -> None:
        row = {"toolkit": toolkit, "version": version(package), "what": what}
        row |= {key: f"{x:.3g}" if isinstance(x, float) else str(x) for key, x in found.items()}
        if "DROPINF_INTEROP_OUT" in os.environ:
            with open(os.environ["DROPINF_INTEROP_OUT"], "a") as file:
                file.write(json.dumps(row) + "\n")

    return add


def race(jobs: tuple[Job, Job], rounds: int) -> list[float]:
    """Median seconds of two jobs that run in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for job in jobs:
        job()
    for _ in range(rounds):
        for job, found in zip(jobs, times, strict=True):
            start = time.perf_counter()
            job()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def peak_mb(job: Job) -> float:
    """The most that torch holds at a time of what a job allocates."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return float(sizes.cumsum(0).max()) / 1e6


@pytest.fixture
def compare(record):
    """Time two jobs and measure their memory, record a row, return it."""

    def run(package: str, what: str, ours: Job, theirs: Job, rounds: int = 5, **found: object) -> dict[str, object]:
        seconds, their_seconds = race((ours, theirs), rounds)
        found |= {"seconds": seconds, "theirs": their_seconds, "factor": their_seconds / seconds}
        found |= {"peak_mb": peak_mb(ours), "their_peak_mb": peak_mb(theirs)}
        record(package, what, **found)
        return found

    return run
