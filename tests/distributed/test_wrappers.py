"""DDP- and FSDP2-wrapped models give the plain model's compressed gradients on every rank."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bounds import HOUR

WORKER = Path(__file__).with_name("worker.py")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks(kind):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    process = subprocess.Popen(
        [*launcher, str(WORKER), kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=HOUR)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too, where one hangs
    assert process.returncode == 0, stderr
    for rank in (0, 1):
        assert f"rank {rank} of {kind}: Gradients(7 samples" in stdout
