"""What the adapters' tests share."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import pytest


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


@pytest.fixture
def race():
    """Time two jobs in turns: (median seconds of the first, of the second)."""

    def run(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 5) -> tuple[float, float]:
        times: tuple[list[float], list[float]] = ([], [])
        for job in (ours, theirs):
            job()
        for _ in range(rounds):
            for job, found in zip((ours, theirs), times, strict=True):
                start = time.perf_counter()
                job()
                found.append(time.perf_counter() - start)
        return statistics.median(times[0]), statistics.median(times[1])

    return run
