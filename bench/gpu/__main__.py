"""Measures on a GPU what the README says of one: ``python -m bench.gpu OUT``. Needs no network and installs nothing.

Stops after ``--minutes``; the same command goes on where it stopped, whatever stopped it. Each step runs in a process
that is watched: one that crashes or hangs is noted as such, and the others go on. ``--dry-run`` does all of it on a CPU
with small problems and with events that pretend: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .results import NAME, TRIES, Results

NEEDED = ("torch", "triton", "numpy", "safetensors", "tqdm", "xxhash")
ROOT = Path(__file__).parents[2]
MARGIN = 15.0  # seconds for a worker to end by itself
WARMERS = 8


class Supervisor:
    """Has workers run steps, and ends those that hang."""

    def __init__(self, out: Path, deadline: float, options: Sequence[str]) -> None:
        self.out, self.deadline, self.options = out, deadline, list(options)
        self.results = Results(out)
        self.worker = [sys.executable, "-m", "bench.gpu.worker"]
        paths = [str(ROOT / "python"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            "TRITON_CACHE_DIR": str(out / "compiled"),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        }

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        command = [*self.worker, str(self.out), str(self.deadline - MARGIN)]
        return subprocess.Popen([*command, *self.options, *options], cwd=ROOT, env=self.environment)

    def warm(self) -> None:
        """Compile the kernels of all steps, several at once."""
        count = min(WARMERS, (os.cpu_count() or 2) // 2)
        workers = [self.start("--warm", str(i), str(count)) for i in range(count)]
        while any(worker.poll() is None for worker in workers) and time.time() < self.deadline:
            time.sleep(0.2)
        for worker in workers:
            worker.kill()
            worker.wait()

    def run(self) -> int:
        """Run workers until one says that all is done, or that no time is left. Return its exit code."""
        from .worker import DONE, LATE, POISONED, RUNNING

        note = self.out / RUNNING
        while True:
            note.unlink(missing_ok=True)
            worker = self.start()
            ended = self._watch(worker, note)
            code = worker.returncode
            if code in (DONE, LATE):
                return int(code)
            if ended is not None and time.time() >= self.deadline:
                return int(LATE)
            running = json.loads(note.read_text()) if note.exists() else None
            if running is None:
                print(f"the worker ended before its first step, exit code {code}", file=sys.stderr)
                return 1
            if code != POISONED:
                self.results.add(step=running["step"], error=ended or f"the process died, exit code {code}")

    def _watch(self, worker: subprocess.Popen[bytes], note: Path) -> str | None:
        """Wait for a worker; end one that hangs, and return why."""
        while worker.poll() is None:
            time.sleep(0.2)
            running = json.loads(note.read_text()) if note.exists() else None
            hangs = running is not None and time.time() - running["since"] > running["limit"]
            if hangs or time.time() > self.deadline:
                worker.kill()
                worker.wait()
                return f"not done after {running['limit']:.0f} s" if hangs and running else "out of time"
        return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="a folder for what is measured; the same one goes on")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, small, with times that mean nothing")
    parser.add_argument("--only", default="", help="steps whose name contains this")
    given = parser.parse_args()
    start = time.time()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"this Python lacks {', '.join(missing)}: {sys.executable}; take one that has them", file=sys.stderr)
        return 2
    import torch

    from .clock import dry_run, gpu
    from .worker import LATE, pending

    if not given.dry_run and not torch.cuda.is_available():
        print("torch sees no GPU here; --dry-run does everything on a CPU, small", file=sys.stderr)
        return 2
    out = given.out.resolve()
    machine, results = dry_run() if given.dry_run else gpu(), Results(out)
    environment = machine.describe()
    if any(other["dry"] != environment["dry"] for other in results.environments()):
        print(f"{out} holds a dry run or a real one; name another folder for the other", file=sys.stderr)
        return 2
    results.add(environment=environment)
    options = [*(["--dry-run"] if given.dry_run else []), "--only", given.only]
    supervisor = Supervisor(out, start + 60 * given.minutes, options)
    if not given.dry_run:
        supervisor.warm()
    code = supervisor.run()
    left = pending(machine, results, given.only)
    failed = {step: line["error"] for step, line in results.latest().items() if "error" in line}
    for step, error in failed.items():
        print(f"failed: {step}: {error}")
    print(f"{len(results.latest()) - len(failed)} steps measured, {len(failed)} failed, {len(left)} left: {out / NAME}")
    if left and code == LATE:
        print("the same command goes on with them")
        return int(LATE)
    if left:
        print(f"the same command tries again what failed, {TRIES} times at most")
    print(f"tables and plots: python -m bench.gpu.report {given.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
