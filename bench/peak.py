"""How much memory a job needs, free of what the allocator keeps and of when it gives back."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def peak_mb(job: Callable[[], object]) -> float:
    """MB that torch allocates while a job runs and holds at a time, at most."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return float(sizes.cumsum(0).max()) / 1e6
