"""GPU time for pytest-benchmark: a clock that the GPU's work alone moves, and rounds that alternate with a baseline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a stream, as torch.cuda.Event."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...  # milliseconds


class Clock:
    """The seconds that timed calls have taken so far: a timer for pytest-benchmark."""

    def __init__(self, event: Callable[[], Event], prepare: Callable[[], None]) -> None:
        self.event = event
        self.prepare = prepare
        self.laps: list[float] = []

    def __call__(self) -> float:
        return sum(self.laps)

    def time(self, call: Callable[[], object]) -> None:
        """Call, and advance by what the stream took from before the call's first kernel to after its last."""
        self.prepare()
        start, stop = self.event(), self.event()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        self.laps.append(start.elapsed_time(stop) / 1e3)


@functools.cache
def _buffer() -> Tensor:
    return torch.empty(512 << 20, dtype=torch.int8, device="cuda")  # larger than any cache


def cold() -> None:
    """Write over the caches, and keep the GPU busy for a millisecond, in which the host launches what is timed."""
    _buffer().zero_()
    torch.cuda._sleep(2_000_000)


CLOCK = Clock(functools.partial(torch.cuda.Event, enable_timing=True), cold)


def compare(
    benchmark: Any,
    contender: Callable[[], object],
    against: str,
    baseline: Callable[[], object],
    clock: Clock = CLOCK,
    rounds: int = 30,
) -> None:
    """Time rounds of `contender`, each behind one of `baseline`, and note the baseline's median and the ratio.

    `ratio` is the baseline's median over the contender's: above 1 the contender is faster.
    """
    other = Clock(clock.event, clock.prepare)

    def setup() -> None:
        other.time(baseline)

    benchmark.pedantic(clock.time, (contender,), setup=setup, rounds=rounds, warmup_rounds=5)
    slow, fast = median(other.laps[-rounds:]), median(clock.laps[-rounds:])
    benchmark.extra_info.update(baseline=against, baseline_ms=1e3 * slow, ratio=slow / fast)
