"""Extraction over the floor, batch by batch, with the first batch apart; and the memory that each holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

import dropinf

from .clock import Machine
from .models import WORKLOADS, Workload
from .steps import Step

BATCHES = 6  # in a call: the host's part of the next batch hides behind the GPU's of this one
SKETCHES = {"mask": {}, "mask in runs of 16": {"group": 16}}


def forward(work: Workload) -> None:
    with torch.no_grad():
        for batch in work.batches:
            work.loss_fn(work.model, batch)


def floor(work: Workload) -> None:
    """Forward, and backward to every activation: weights are frozen, the first activation asks for its gradient."""
    work.model.requires_grad_(False)
    ask = None
    if work.floor:
        module = work.model.get_submodule(work.floor)
        ask = module.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    for inputs, targets in work.batches:
        x = inputs if work.floor else inputs.detach().clone().requires_grad_(True)
        work.loss_fn(work.model, (x, targets)).sum().backward()
    if ask is not None:
        ask.remove()
    work.model.requires_grad_(True)


def training_step(work: Workload) -> None:
    for batch in work.batches:
        work.loss_fn(work.model, batch).mean().backward()
        work.model.zero_grad(set_to_none=True)


def sketch_of(name: str, work: Workload) -> dropinf.Dropout:
    options = SKETCHES[name]
    return dropinf.Dropout(work.dim, **{k: min(v, work.dim) for k, v in options.items()})


def compressor_of(name: str, work: Workload, audit: Any = "auto") -> dropinf.Compressor:
    return dropinf.Compressor(work.model, sketch_of(name, work), work.loss_fn, layers=work.layers, audit=audit)


def seconds(machine: Machine, call: Callable[[], object]) -> float:
    """Return wall seconds until the device is done."""
    machine.wait()
    start = time.perf_counter()
    call()
    machine.wait()
    return time.perf_counter() - start


def measure(machine: Machine, make: Callable[..., Workload]) -> dict[str, Any]:
    """Return milliseconds a batch and MB of each contender, and how much is over the floor; rounds take turns."""
    work = make(machine, machine.size(BATCHES, 2))
    count = len(work.batches)
    jobs: dict[str, Callable[[], object]] = {
        name: partial(job, work)
        for name, job in (("forward", forward), ("floor", floor), ("training step", training_step))
    }
    first = {}
    for name in SKETCHES:
        compressor = compressor_of(name, work)
        first[name] = seconds(machine, lambda compressor=compressor: compressor.compress(work.batches[:1]))
        check_on_hooks(compressor)
        compressor = compressor_of(name, work, "never")
        jobs[name] = partial(compressor.compress, work.batches)
    laps: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(2 + machine.size(7, 1)):
        for name, job in jobs.items():
            laps[name].append(seconds(machine, job) / count)
    times = {name: median(found[2:]) for name, found in laps.items()}
    over = {name: median(a / b for a, b in zip(laps[name][2:], laps["floor"][2:], strict=True)) for name in jobs}
    return {
        "samples": len(work.batches[0][0]),
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "layers": len(compressor.layers),
        "ms": {name: round(1e3 * value, 3) for name, value in times.items()},
        "over the floor": {name: round(value, 4) for name, value in over.items()},
        "first batch, ms": {name: round(1e3 * value, 1) for name, value in first.items()},
        "peak MB": {name: round(machine.peak_mb(job), 1) for name, job in jobs.items()},
    }


def check_on_hooks(compressor: dropinf.Compressor) -> None:
    """Raise where a layer is not found at the floor: its time would be another way's."""
    rungs = {name: rung for name, rung in compressor._sweep.ladder.rungs.items() if rung != "hook"}
    if rungs:
        raise RuntimeError(f"not on hooks: {rungs}: {dict(compressor._sweep.ladder.reasons)}")


def steps(machine: Machine) -> list[Step]:
    del machine
    return [
        Step(f"extraction, {name}", "extraction", partial(measure, make=make), limit=240.0)
        for name, make in WORKLOADS.items()
    ]
