"""Processes that start in a millisecond: one that has imported torch, with no thread yet, and forks the others.

`Forks` talks to it in JSON lines. A job is a function of `jobs`; what it prints is in a file, and it ends as any
script does: 0 in the end, 1 after an error, whose traceback it prints.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.bounds import HOUR

ROOT = Path(__file__).parents[2]


@dataclass
class Process:
    forks: Forks
    pid: int
    log: Path
    status: int | None = None  # as of subprocess

    def kill(self) -> None:
        """Kill it where it is still there; it is not reaped before `wait`, so its id is its own."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = HOUR) -> int | None:
        """Its status, or None where it did not end in so many seconds."""
        if self.status is None:
            self.status = self.forks.ask(do="wait", pid=self.pid, timeout=timeout)
        return self.status

    @property
    def ended(self) -> bool:
        return self.wait(0) is not None

    def until(self, text: str) -> None:
        """Wait until it has printed this."""
        end = time.monotonic() + HOUR
        while text not in self.text:
            assert not self.ended or text in self.text, self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.001)

    @property
    def text(self) -> str:
        return self.log.read_text()


class Forks:
    def __init__(self) -> None:
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.folder = tempfile.TemporaryDirectory(prefix="dropinf-faults-")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **one},
        )
        self.started = 0

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, job: str, *arguments, limits=None, env=None, **options) -> Process:
        """Start a job. limits: name of a resource -> bytes; "AS" are those above what the process has."""
        log = Path(self.folder.name) / f"{self.started}.log"
        self.started += 1
        log.touch()
        pid = self.ask(
            do="start",
            job=job,
            arguments=[os.fspath(x) if isinstance(x, os.PathLike) else x for x in arguments],
            options={k: os.fspath(x) if isinstance(x, os.PathLike) else x for k, x in options.items()},
            log=str(log),
            limits=limits or {},
            env=env or {},
        )
        return Process(self, pid, log)

    def run(self, job: str, *arguments, **options) -> Process:
        process = self.start(job, *arguments, **options)
        if process.wait() is None:
            process.kill()
            process.wait()
            raise AssertionError(f"{job} did not end in an hour: {process.text}")
        return process

    def ranks(self, world: int, job: str, *arguments, **options) -> list[Process]:
        """Start a job on so many ranks, which meet on this machine."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        shared["GLOO_SOCKET_IFNAME"] = "lo"
        return [self.start(job, *arguments, env={**shared, "RANK": str(rank)}, **options) for rank in range(world)]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()


def serve() -> dict | None:
    """Answer requests until there are no more: None; in a process that was forked: its request."""
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            pid = os.fork()
            if pid == 0:
                return request
            print(pid, flush=True)
        else:
            print(json.dumps(wait(request["pid"], request["timeout"])), flush=True)
    return None


def wait(pid: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def run(request: dict) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it goes with the process that it was forked from
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(request["env"])
    from tests.faults import jobs

    before = {}
    for name, size in request["limits"].items():
        kind = getattr(resource, f"RLIMIT_{name}")
        before[kind] = resource.getrlimit(kind)
        had = 4096 * int(Path("/proc/self/statm").read_text().split()[0]) if name == "AS" else 0
        resource.setrlimit(kind, (had + size, before[kind][1]))
    try:
        getattr(jobs, request["job"])(*request["arguments"], **request["options"])
    except Exception:
        for kind, limit in before.items():
            resource.setrlimit(kind, limit)
        traceback.print_exc()
        sys.exit(1)
    sys.stdout.flush()
    if "RANK" not in request["env"]:
        os._exit(0)  # half a second less than taking torch down


if __name__ == "__main__":
    import torch
    import torch.fx.experimental.symbolic_shapes  # the first backward imports it

    import tests.faults.jobs  # noqa: F401

    torch.set_num_threads(1)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: no place to fork from"
    gc.freeze()
    forked = serve()
    if forked is not None:
        with contextlib.suppress(BrokenPipeError):
            run(forked)
