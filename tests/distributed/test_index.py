"""An index that several ranks make and read is the one that one process makes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bounds import HOUR

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def started(world: int, *arguments: object) -> Iterator[list[subprocess.Popen]]:
    """Start the ranks one by one: nothing ends the others where one fails but they themselves, and this in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.index_worker", *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **shared, "RANK": str(rank)},
        )
        for rank in range(world)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def said(rank: subprocess.Popen) -> str:
    """Wait until a rank has ended, and return what it printed."""
    return rank.communicate(timeout=HOUR)[0]


@pytest.mark.parametrize(("world", "kind"), [(1, "plain"), (2, "ddp"), (2, "fsdp2"), (4, "plain")])
def test_ranks_make_what_one_process_makes(world, kind, tmp_path):
    with started(world, kind, tmp_path) as ranks:
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.05)
        # One that failed first, as the others may wait for it.
        for number, rank in sorted(enumerate(ranks), key=lambda item: item[1].poll() in (0, None)):
            text = said(rank)
            assert f"rank {number} of {world}, {kind}: 123 samples" in text, text[-3000:]


def test_parts_of_a_sampler_stand_in_the_order_of_the_data(tmp_path):
    with started(2, "parts", tmp_path / "index") as ranks:
        for number, rank in enumerate(ranks):
            text = said(rank)
            assert f"rank {number} has 60 samples of its parts" in text, text[-3000:]


def test_a_failed_rank_fails_the_run_with_its_own_error(tmp_path):
    with started(2, "fail", tmp_path / "index") as ranks:
        first, second = map(said, ranks)
    assert "rank 1 ends: ValueError: this batch has a hole" in second
    # Long before its work is done, and by name.
    assert "rank 0 ends: RuntimeError: rank 1 failed: ValueError: this batch has a hole" in first
    assert list((tmp_path / "index" / "parts").iterdir()) + list((tmp_path / "index" / "shards").iterdir())


def test_a_killed_rank_ends_the_others(tmp_path):
    with started(2, "slow", tmp_path / "index") as ranks:
        while not (tmp_path / "index" / "manifest.json").exists() and ranks[0].poll() is None:
            time.sleep(0.1)
        ranks[1].kill()
        text = said(ranks[0])
    assert "rank 0 ends: RuntimeError: rank 1 was not heard of for 3 s" in text
    # Long before its work is done, which is twelve of the batches.
    assert len(list(tmp_path.glob("index/*/0*"))) < 10


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("hangs", "rank 0 ends: RuntimeError: rank 1 was not heard of for 3 s"),
        ("waits", "rank 0 ends: RuntimeError: rank 1 waits in torch.distributed's barrier"),
    ],
)
def test_a_rank_that_others_would_wait_for_in_vain_ends_them(kind, says, tmp_path):
    with started(2, kind, tmp_path / "index") as ranks:
        assert says in said(ranks[0])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("model", "group: rank 1 has another model than rank 0; every rank must make the same call"),
        ("sketch", "group: rank 1 has another sketch than rank 0"),
        ("fisher", "group: rank 1 has another fisher than rank 0 (None, not ('block', 0.1, False))"),
        ("loss", "group: rank 1 has other gradients of the first batch than rank 0"),
        ("source", "group: rank 1 has another loss than rank 0"),
        ("ids", "group: rank 1 has another choice of ids than rank 0"),
        ("sampler", "batches: their DistributedSampler gives each rank a part of the samples, and group= has"),
        ("padded", "batches: their sampler gives sample 0 more than once, as DistributedSampler does"),
        ("replicas", "batches: their DistributedSampler makes 3 parts, and group= has 2 ranks"),
        ("uneven", "batches: the ranks have [5, 6] of them; each must have as many"),
        ("batch", "batches: batch 9 is another one on rank 1 than on rank 0"),
        ("neighbours", "batches: batch 100 is another one on rank 1 than on rank 0"),
    ],
)
def test_ranks_that_do_not_agree_are_told_so(kind, says, tmp_path):
    with started(2, kind, tmp_path / "index") as ranks:
        assert all(f"ends: ValueError: {says}" in said(rank) for rank in ranks)
    assert not (tmp_path / "index" / "manifest.json").exists() or kind in ("batch", "neighbours")


def test_a_rank_whose_arguments_are_refused_ends_the_others(tmp_path):
    with started(2, "options", tmp_path / "index") as ranks:
        first, second = map(said, ranks)
    assert "rank 1 ends: ValueError: dtype is torch.int32" in second
    assert "rank 0 ends: RuntimeError: rank 1 failed: ValueError: dtype is torch.int32" in first


def test_a_rank_that_computes_for_long_is_waited_for(tmp_path):
    with started(2, "computes", tmp_path / "index") as ranks:
        assert [f"rank {number} ends with 102 samples" in said(rank) for number, rank in enumerate(ranks)] == [True] * 2
