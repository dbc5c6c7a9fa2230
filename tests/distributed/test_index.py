"""An index that several ranks make and read is the one that one process makes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("index_worker.py")


def start(world: int, *arguments: object) -> list[subprocess.Popen]:
    """Start the ranks one by one: nothing ends the others where one fails but they themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **shared, "RANK": str(rank)},
        )
        for rank in range(world)
    ]


def finish(ranks: list[subprocess.Popen], timeout: float) -> list[str]:
    try:
        return [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.send_signal(signal.SIGKILL)


@pytest.mark.parametrize(("world", "kind"), [(1, "plain"), (2, "ddp"), (2, "fsdp2"), (4, "plain")])
def test_ranks_make_what_one_process_makes(world, kind, tmp_path):
    ranks = start(world, kind, tmp_path)
    for rank, text in enumerate(finish(ranks, 150)):
        assert f"rank {rank} of {world}, {kind}: 123 samples" in text, text[-3000:]


def test_a_failed_rank_fails_the_run_with_its_own_error(tmp_path):
    ranks = start(2, "fail", tmp_path / "index")
    first, second = finish(ranks, 60)
    assert "rank 1 ends: ValueError: this batch has a hole" in second
    # Long before its work is done, and by name.
    assert "rank 0 ends: RuntimeError: rank 1 failed: ValueError: this batch has a hole" in first
    assert list((tmp_path / "index" / "parts").iterdir()) + list((tmp_path / "index" / "shards").iterdir())


def test_a_killed_rank_ends_the_others(tmp_path):
    ranks = start(2, "slow", tmp_path / "index")
    deadline = time.monotonic() + 60
    while not (tmp_path / "index" / "manifest.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    text = finish(ranks, 60)[0]
    assert time.monotonic() - killed < 30
    assert "rank 0 ends: RuntimeError: rank 1 was not heard of for 15 s" in text
