"""Contenders in processes of their own, which take turns."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.interop.run import environment

from .worker import SETTINGS

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A contender's process; the first line that it says is its version, or why it does not fit.

    ``module`` has CONTENDERS and CASES.
    """

    def __init__(self, case: str, name: str, module: str) -> None:
        where = importlib.import_module(module).CONTENDERS[name].environment
        python = str(environment(where)) if where else sys.executable
        self.process = subprocess.Popen(
            [python, "-m", "bench.endtoend.worker", module, case, name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **SETTINGS},
        )
        self.name, self.seconds = name, list[float]()
        self.about = self.read()

    def read(self) -> dict[str, float | str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: its process ended with {self.process.wait()}")
        found: dict[str, float | str] = json.loads(line)
        return found

    def ask(self, what: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(next(iter(self.read().values())))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
