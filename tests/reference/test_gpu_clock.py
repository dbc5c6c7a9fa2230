"""The clock of the GPU benchmarks, on events that a test moves by hand."""

from __future__ import annotations

from bench.gpu.clock import Clock, compare

now = 0.0  # milliseconds
order: list[str] = []


class Event:
    def record(self) -> None:
        self.at = now

    def synchronize(self) -> None:
        order.append("wait")

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def takes(name: str, milliseconds: float):
    def call() -> None:
        global now
        now += milliseconds
        order.append(name)

    return call


class Benchmark:
    """What pytest-benchmark's fixture does in a pedantic run."""

    def __init__(self, timer):
        self.timer, self.times, self.extra_info = timer, [], {}

    def pedantic(self, target, args, setup, rounds, warmup_rounds):
        for _ in range(warmup_rounds + rounds):
            setup()
            start = self.timer()
            target(*args)
            self.times.append(self.timer() - start)


def test_rounds_alternate_and_only_calls_move_the_clock():
    order.clear()
    clock = Clock(Event, takes("prepare", 1000.0))
    benchmark = Benchmark(clock)
    compare(benchmark, takes("contender", 2.0), "the other", takes("baseline", 6.0), clock, rounds=3)
    assert order == ["prepare", "baseline", "wait", "prepare", "contender", "wait"] * 8
    assert [round(t, 9) for t in benchmark.times] == [0.002] * 8
    assert benchmark.extra_info == {"baseline": "the other", "baseline_ms": 6.0, "ratio": 3.0}
