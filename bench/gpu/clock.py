"""Where steps run and how they are timed: by a GPU's events or, for a dry run on a CPU, by events that pretend."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
from torch import Tensor


class Event(Protocol):
    """A point in a stream, as torch.cuda.Event."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...  # milliseconds


class HostEvent:
    """An event of a machine without streams: the host's clock."""

    at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at - self.at) * 1e3


@dataclass(frozen=True)
class Machine:
    """``event`` makes an event, ``cold`` is called before each timed call. ``dry``: small sizes, meaningless times."""

    device: torch.device
    event: Callable[[], Event]
    cold: Callable[[], None]
    dry: bool = False

    @property
    def rounds(self) -> int:
        return 2 if self.dry else 30

    def size(self, real: int, dry: int) -> int:
        """Return a size of a problem."""
        return dry if self.dry else real

    def describe(self) -> dict[str, Any]:
        """Return where numbers come from."""
        found: dict[str, Any] = {
            "card": platform.machine() + ", a dry run" if self.dry else torch.cuda.get_device_name(self.device),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda or torch.version.hip,
            "dry": self.dry,
        }
        if not self.dry:
            properties = torch.cuda.get_device_properties(self.device)
            found |= {"multiprocessors": properties.multi_processor_count, "memory_gb": properties.total_memory / 1e9}
        return found

    def wait(self) -> None:
        """Wait until the device is done."""
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def peak_mb(self, call: Callable[[], object]) -> float:
        """Return the MB of device memory that a call held at most, what was there before included."""
        if self.dry:
            call()
            return 0.0
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) / 1e6


class Clock:
    """The seconds that timed calls took."""

    def __init__(self, event: Callable[[], Event], prepare: Callable[[], None]) -> None:
        self.event, self.prepare = event, prepare
        self.laps: list[float] = []

    def time(self, call: Callable[[], object]) -> None:
        """Call, and note what the stream took from before the call's first kernel to after its last."""
        self.prepare()
        start, stop = self.event(), self.event()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        self.laps.append(start.elapsed_time(stop) / 1e3)


def in_turns(
    machine: Machine, contenders: Mapping[str, Callable[[], object]], rounds: int | None = None, warmups: int = 3
) -> dict[str, list[float]]:
    """Return each contender's seconds, round by round: all of them run in every round, one after the other."""
    clocks = {name: Clock(machine.event, machine.cold) for name in contenders}
    for _ in range(warmups + (rounds or machine.rounds)):
        for name, call in contenders.items():
            clocks[name].time(call)
    return {name: clock.laps[warmups:] for name, clock in clocks.items()}


@functools.cache
def _buffer(device: torch.device) -> Tensor:
    return torch.empty(512 << 20, dtype=torch.int8, device=device)  # larger than any cache


def _cold(device: torch.device) -> None:
    """Write over the caches, and keep the GPU busy for a millisecond, in which the host launches what is timed."""
    _buffer(device).zero_()
    torch.cuda._sleep(2_000_000)


def gpu() -> Machine:
    device = torch.device("cuda", torch.cuda.current_device())
    event = functools.partial(torch.cuda.Event, enable_timing=True)
    return Machine(device, event, functools.partial(_cold, device))


def dry_run() -> Machine:
    return Machine(torch.device("cpu"), HostEvent, lambda: None, dry=True)
