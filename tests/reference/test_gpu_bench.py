"""What measures on a GPU, without one: its clock, what it keeps, how it goes on behind steps that fail, and a dry run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu.__main__ import Supervisor
from bench.gpu.clock import Machine, in_turns
from bench.gpu.report import markdown
from bench.gpu.results import Results
from bench.gpu.worker import DONE, LATE, pending

ROOT = Path(__file__).parents[2]
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


def test_rounds_take_turns_and_only_calls_move_the_clock():
    order.clear()
    machine = Machine(torch.device("cpu"), Event, takes("cold", 1000.0), dry=True)
    found = in_turns(machine, {"ours": takes("ours", 2.0), "theirs": takes("theirs", 6.0)}, rounds=3, warmups=1)
    assert order == ["cold", "ours", "wait", "cold", "theirs", "wait"] * 4
    assert {name: [round(x, 9) for x in laps] for name, laps in found.items()} == {
        "ours": [0.002] * 3,
        "theirs": [0.006] * 3,
    }


def test_what_was_measured_outlasts_a_cut(tmp_path):
    results = Results(tmp_path)
    results.add(step="a", value=1)
    results.add(step="b", error="no")
    with results.path.open("a") as file:
        file.write('{"step": "c", "val')  # the machine was taken away
    results.add(step="d", value=2)
    assert results.latest() == {
        "a": {"step": "a", "value": 1},
        "b": {"step": "b", "error": "no"},
        "d": {"step": "d", "value": 2},
    }
    assert results.settled() == {"a", "d"}
    results.add(step="b", error="again")
    assert results.settled() == {"a", "b", "d"}
    results.add(step="b", value=3)
    results.add(step="b", error="later")
    assert results.latest()["b"] == {"step": "b", "value": 3}


STEPS = """
import os, sys, time
from bench.gpu import worker
from bench.gpu.steps import Step

def fails(machine): raise ValueError("no such thing")
def ends(machine): os._exit(9)
def hangs(machine): time.sleep(60)
steps = [Step("fails", "t", fails), Step("ends", "t", ends), Step("hangs", "t", hangs, limit=1.5),
         Step("works", "t", lambda machine: {"value": 7})]
worker.all_steps = lambda machine: steps
sys.exit(worker.main())
"""


def test_steps_that_fail_end_or_hang_stop_no_other(tmp_path):
    supervisor = Supervisor(tmp_path, time.time() + 300, ["--dry-run"])
    supervisor.worker = [sys.executable, "-c", STEPS]
    assert supervisor.run() == DONE
    found = supervisor.results.latest()
    assert found["works"]["value"] == 7
    errors = {step: line["error"] for step, line in found.items() if "error" in line}
    assert errors == {
        "fails": "ValueError: no such thing",
        "ends": "the process died, exit code 9",
        "hangs": "not done after 2 s",
    }
    assert len(supervisor.results.read()) == 7  # each that fails is tried twice


def test_a_run_stops_in_time_and_goes_on(tmp_path):
    supervisor = Supervisor(tmp_path, time.time() + 16, ["--dry-run"])  # less than its margin and a step
    supervisor.worker = [sys.executable, "-c", STEPS]
    assert supervisor.run() == LATE
    assert not supervisor.results.read()


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which this would measure")
    assert done.returncode == 2
    assert "torch sees no GPU here; --dry-run" in done.stderr
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.more
def test_a_dry_run_measures_everything(tmp_path):
    def run(module: str, *options: str) -> str:
        command = [sys.executable, "-m", module, str(tmp_path), *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    said = run("bench.gpu", "--dry-run", "--minutes", "9")
    results = Results(tmp_path)
    machine = Machine(torch.device("cpu"), Event, lambda: None, dry=True)
    assert not pending(machine, results, "")
    assert f"{len(results.latest())} steps measured, 0 failed, 0 left" in said
    assert all(json.dumps(line).find("NaN") < 0 for line in results.read())
    before = len([line for line in results.read() if "step" in line])
    run("bench.gpu", "--dry-run")
    assert len([line for line in results.read() if "step" in line]) == before  # nothing is measured twice
    run("bench.gpu.report")
    report = (tmp_path / "gpu.md").read_text()
    assert report == markdown(results)
    assert "A dry run on a CPU" in report
    assert "not measured" not in report.lower()
    for part in ("Llama 1B: mask in runs of 16", "ResNet-50: floor", "14336 x 4096, 8 x 1024, k 256", "gram_update"):
        assert part in report
    assert {p.name for p in tmp_path.iterdir()} >= {"gpu.md", "gpu.csv", "gpu.png"}
