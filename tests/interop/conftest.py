"""What the adapters' tests share."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.peak import peak_mb

HERE = Path(__file__).parent
Job = Callable[[], object]


@pytest.fixture
def record(request):
    """Call with what was run and what was found: a row of the table. `package` is the toolkit's name on PyPI."""
    toolkit = request.path.relative_to(HERE).parts[0].removeprefix("test_").removesuffix(".py")

    def add(package: str, what: str, **found: object) -> None:
        row = {"toolkit": toolkit, "version": version(package), "what": what}
        row |= {key: f"{x:.3g}" if isinstance(x, float) else str(x) for key, x in found.items()}
        if "DROPINF_INTEROP_OUT" in os.environ:
            with open(os.environ["DROPINF_INTEROP_OUT"], "a") as file:
                file.write(json.dumps(row) + "\n")

    return add


def race(jobs: tuple[Job, Job], rounds: int) -> list[float]:
    """Return median CPU seconds of two jobs that run in turns; on one thread, those of a machine with nothing else to do."""
    times: tuple[list[float], list[float]] = ([], [])
    for job in jobs:
        job()
    for _ in range(rounds):
        for job, found in zip(jobs, times, strict=True):
            start = time.process_time()
            job()
            found.append(time.process_time() - start)
    return [statistics.median(found) for found in times]


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
