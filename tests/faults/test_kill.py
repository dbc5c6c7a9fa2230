"""Indexing that is killed at any instant goes on from there, and ends with the bytes of a run that never was."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from dropinf.index import verify
from tests.faults.forks import Forks, Process
from tests.faults.jobs import BATCHES, files
from tests.faults.runs import LOST, done, phase, reached

DTYPES = ("float32", "int8")


class Trials:
    """Runs that are killed and go on, and one that is not."""

    def __init__(
        self, forks: Forks, place: Path, world: int, seed: int, patience: float | None = None, **options
    ) -> None:
        """Run twice to the end. patience: how long a rank that was killed is waited for."""
        self.forks, self.place, self.world, self.seed, self.options = forks, place, world, seed, options
        self.patience = patience
        self.phases: Counter[str] = Counter()
        for name in ("whole", "again"):
            ranks = self.start(place / name)
            started = time.monotonic()
            for process in ranks:
                process.until("ends")
            self.seconds = time.monotonic() - started
            assert [process.wait() for process in ranks] == [0] * world
        self.expected = files(place / "whole")
        assert files(place / "again") == self.expected

    def start(self, folder: Path, **options) -> list[Process]:
        if self.world == 1:
            ranks = [self.forks.start("index", folder, **self.options)]
        else:
            ranks = self.forks.ranks(self.world, "index", folder, **self.options, **options)
        for process in ranks:
            process.until("begins")
        return ranks

    def kill(self, folder: Path, chance: random.Random) -> bool:
        """Kill ranks of a run at some instant; return whether it was still under way."""
        ranks = self.start(folder, patience=self.patience)
        goal = chance.uniform(-0.1, 1) * BATCHES  # rather than a time, which others' work would stretch
        while done(folder) < goal and not ranks[0].ended:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 3 * self.seconds / BATCHES))
        killed = chance.choice([[0], [1], [0, 1]]) if self.world == 2 else [0]
        for rank in killed:
            ranks[rank].kill()
        dead = [ranks[rank].wait() == -9 for rank in killed]
        for rank, process in enumerate(ranks):
            if rank not in killed:
                assert process.wait() in (0, 1), process.text
                if process.status == 0:
                    assert verify(folder) == []
                elif all(dead):
                    assert LOST.match(process.text.strip().splitlines()[-1]), process.text
        if any(dead):
            self.phases[phase(folder)] += 1
        return any(dead)

    def run(self, trials: int) -> Counter[str]:
        for trial in range(trials):
            chance = random.Random(f"{self.seed} {trial}")
            folder = self.place / "killed"
            while not self.kill(folder, chance):
                shutil.rmtree(folder)
            for _ in range(chance.randrange(3)):
                self.kill(folder, chance)
            for process in self.start(folder):
                assert process.wait() == 0, process.text
            assert files(folder) == self.expected
            assert verify(folder) == []
            shutil.rmtree(folder)
        print(f"{self.world} ranks, {self.seconds:.2f} s a run, killed {self.phases.total()} times: {self.phases}")
        return self.phases


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_killed_process_goes_on(dtype, forks, place):
    Trials(forks, place, 1, 1, dtype=dtype).run(2)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_process_killed_many_times_goes_on(dtype, forks, place):
    reached(Trials(forks, place, 1, 2, dtype=dtype).run(50), 10)


def test_killed_ranks_go_on(forks, place):
    Trials(forks, place, 2, 3, dtype="int8", slow=0.01, patience=2).run(2)


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "patience"), [("float32", 15), ("int8", 2)])
def test_ranks_killed_many_times_go_on(dtype, patience, forks, place):
    reached(Trials(forks, place, 2, 4, dtype=dtype, slow=0.01, patience=patience).run(25), 5)


def test_a_rank_that_is_killed_at_once_is_missed(forks, place):
    """Before its first beat: it has only said that it begins."""
    ranks = forks.ranks(2, "index", place / "idx", slow=1, patience=2, dies_at=0, dies_on=1)
    assert ranks[1].wait() == -9
    assert ranks[0].wait() == 1
    assert "RuntimeError: rank 1 was not heard of for 2 s; this rank (0) stops too" in ranks[0].text
    assert len(list((place / "idx" / "shards").iterdir())) < 16  # of the 22 that are its own


@pytest.mark.parametrize("rank", [0, 1])
def test_others_hear_of_the_error_of_a_rank_that_is_gone(rank, forks):
    """Though the store goes with rank 0."""
    ranks = forks.ranks(3, "fails", rank)
    assert [process.wait() for process in ranks] == [1, 1, 1]
    for other in {0, 1, 2} - {rank}:
        assert f"RuntimeError: rank {rank} failed: OSError: no room; this rank ({other}) stops too" in ranks[other].text
