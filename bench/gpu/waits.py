"""What a batch like those before asks of the host: waits, copies, launches; and Python's time for a kernel's call."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import dropinf_kernels as ops
from dropinf_kernels.device import runs_triton

from .clock import Machine
from .extraction import compressor_of, floor
from .factors import dropout
from .models import WORKLOADS, Workload
from .steps import Step

FEW, MANY = 6, 10  # batches of a call, none of which but the first and the fourth is audited by its number
WAITS = ("Synchronize", "cudaMemcpy", "aten::item", "aten::_local_scalar_dense", "aten::nonzero")
LAUNCHES = ("LaunchKernel",)


def events(machine: Machine, call: Callable[[], object]) -> Counter[str]:
    """Return how often each thing was done, by the profiler's names."""
    kinds = [ProfilerActivity.CPU, *([] if machine.dry else [ProfilerActivity.CUDA])]
    with profile(activities=kinds) as found:
        call()
        machine.wait()
    return Counter({event.key: event.count for event in found.key_averages()})


def a_batch(machine: Machine, call: Callable[[int], object]) -> dict[str, float]:
    """Return what a batch adds: the difference of calls of more and of fewer batches, divided by theirs."""
    call(MANY)
    few, many = (events(machine, partial(call, count)) for count in (FEW, MANY))
    words = WAITS + LAUNCHES
    more = {name: (many[name] - few[name]) / (MANY - FEW) for name in many if any(word in name for word in words)}
    return {name: value for name, value in sorted(more.items()) if value}


def waits(machine: Machine, make: Callable[..., Workload]) -> dict[str, Any]:
    work = make(machine, MANY, machine.size(2, 2))
    compressor = compressor_of("mask", work)
    batches = work.batches

    def to_index(count: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            compressor.compress(batches[:count], out=Path(folder) / "index")

    found = {
        "floor": a_batch(machine, lambda count: floor(replace(work, batches=batches[:count]))),
        "in memory": a_batch(machine, lambda count: compressor.compress(batches[:count])),
        "to an index": a_batch(machine, to_index),
    }
    return {"layers": len(compressor.layers), "a batch": found}


def host(machine: Machine) -> dict[str, Any]:
    """Return microseconds of the host for a call, of which the device does little: as the launch returns."""
    d, k, calls = 256, 32, machine.size(500, 5)
    a, g = (torch.randn(2, 16, d, device=machine.device) for _ in range(2))
    left, right = (dropout(machine, d, k, seed=seed) for seed in (0, 1))
    jobs = {
        "sketch": lambda: ops.sketch(a, *right),
        "compress_linear": lambda: ops.compress_linear(a, g, *right, *left),
        "torch.index_select, to compare": lambda: a.index_select(2, right[0][0]),
    }
    found = {}
    for name, job in jobs.items():
        laps = []
        for _ in range(5):
            machine.wait()
            start = time.perf_counter()
            for _ in range(calls):
                job()
            laps.append((time.perf_counter() - start) / calls)
        found[name] = round(1e6 * median(laps), 2)
    return {"us": found, "kernels": runs_triton([a])}


def steps(machine: Machine) -> list[Step]:
    del machine
    found = [
        Step(f"waits, {name}", "the host", partial(waits, make=make), limit=120.0) for name, make in WORKLOADS.items()
    ]
    return [*found, Step("Python's time for a call", "the host", host)]
