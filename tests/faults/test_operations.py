"""Indexing that is killed before any operation on a file, or loses power there, goes on to the same bytes."""

from __future__ import annotations

import itertools
import random
import shutil
from collections import Counter
from pathlib import Path, PurePath

import pytest

from dropinf.files import checksum
from dropinf.index import verify
from dropinf.index.manifest import Manifest
from tests.faults.forks import Forks
from tests.faults.jobs import SMALL, files
from tests.faults.runs import LOST, listed, phase, reached


def at_every_operation(forks: Forks, place: Path, step: int, again: int = 0, **options) -> None:
    """Kill a run before each operation, and the next `again` runs at some."""
    count = len(listed(forks, place / "whole", **options))
    expected = files(place / "whole")
    chance, phases = random.Random(0), Counter()
    for k in range(0, count, step):
        folder = place / "killed"
        assert forks.run("index", folder, dies_at=k, **options).status == -9
        phases[phase(folder)] += 1
        for _ in range(again):
            forks.run("index", folder, dies_at=chance.randrange(count - k), **options)
        process = forks.run("index", folder, **options)
        assert process.status == 0, process.text
        assert files(folder) == expected, f"killed before operation {k} of {count}"
        assert verify(folder) == []
        shutil.rmtree(folder)
    print(f"killed before {len(range(0, count, step))} of {count} operations: {phases}")
    reached(phases, 5)


@pytest.mark.more
def test_killed_before_an_operation(forks, place):
    at_every_operation(forks, place, 8, batches=SMALL, append=4)


@pytest.mark.long
@pytest.mark.parametrize("again", [0, 2])
@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"fisher": "kronecker"}, {"append": 4}, {"append": 4, "fisher": None}]
)
def test_killed_before_every_operation(options, again, forks, place):
    at_every_operation(forks, place, 1, again, batches=SMALL, **options)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_before_an_operation(rank, forks, place):
    for process in forks.ranks(2, "index", place / "whole", batches=SMALL):
        assert process.wait() == 0
    expected = files(place / "whole")
    for k in itertools.count(0, 3):
        folder = place / "killed"
        ranks = forks.ranks(2, "index", folder, dies_at=k, dies_on=rank, batches=SMALL, patience=2)
        if ranks[rank].wait() == 0:
            break
        assert ranks[rank].status == -9
        other = ranks[1 - rank]
        assert other.wait() in (0, 1), other.text
        if other.status:
            assert LOST.match(other.text.strip().splitlines()[-1]), other.text
        for process in forks.ranks(2, "index", folder, batches=SMALL):
            assert process.wait() == 0, process.text
        assert files(folder) == expected, f"rank {rank} was killed before its operation {k}"
        assert verify(folder) == []
        shutil.rmtree(folder)
    assert k > 40  # 12 batches' parts and two shards


# A machine that loses its power: what was not synced may be there, or not.


class Disk:
    """A folder as its operations leave it: what a process sees of it, and what is certain to be on the disk."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder)
        self.seen: dict[str, int | None] = {}  # name -> number of its file; None is a folder
        self.kept: dict[str, int | None] = {}
        self.bytes: dict[int, bytes] = {}
        self.synced: dict[int, bytes] = {}

    def do(self, what: str, path: str, *more) -> None:
        name = str(PurePath(path).relative_to(self.root))
        if what == "mkdir" and name != ".":
            self.seen[name] = None
        elif what == "open":
            number = len(self.bytes)
            self.seen[name], self.bytes[number], self.synced[number] = number, b"", b""
        elif what == "write":
            self.bytes[self.seen[name]] += more[0]
        elif what == "rename":
            self.seen[str(PurePath(more[0]).relative_to(self.root))] = self.seen.pop(name)
        elif what == "remove":
            del self.seen[name]
        elif what == "sync" and self.seen.get(name) is not None:
            self.synced[self.seen[name]] = self.bytes[self.seen[name]]
        elif what == "sync":
            inside = {n: f for n, f in self.kept.items() if str(PurePath(n).parent) != name}
            self.kept = inside | {n: f for n, f in self.seen.items() if str(PurePath(n).parent) == name}

    def states(self) -> dict[str, dict[str, bytes | None]]:
        """What may be found of it later: name -> bytes, None for a folder."""

        def found(names: dict[str, int | None]) -> dict[str, bytes | None]:
            return {
                name: None if number is None else self.synced[number]
                for name, number in names.items()
                if (above := str(PurePath(name).parent)) == "." or above in names
            }

        return {
            "only what was synced": found(self.kept),
            "all names": found(self.seen),
            "removals, and no new names": found({n: f for n, f in self.kept.items() if n in self.seen}),
            "new names, and no removals": found(self.kept | self.seen),
        }


def batches_of(state: dict[str, bytes | None]) -> set[int]:
    """The batches that are in a folder's parts and shards, each of which must be whole."""
    found: set[int] = set()
    for name, data in state.items():
        path = PurePath(name)
        if data is None or path.name.startswith("."):
            continue
        if path.parent.name in ("parts", "shards"):
            number, expected = path.stem.split("-")
            assert checksum(data) == expected, name
            n = int(number)
            found |= {n} if path.parent.name == "parts" else set(range(3 * n, 3 * n + 3))
        elif path.name == "manifest.json":
            Manifest.from_bytes(data, Path(name))
    return found


@pytest.mark.parametrize("runs", [12, pytest.param(2000, marks=pytest.mark.long)])
def test_power_is_lost(runs, forks, place):
    options = {"batches": SMALL, "append": 3}
    whole = place / "whole"
    operations = listed(forks, whole, **options)
    expected = files(whole)
    disk, done, states = Disk(whole), set(), []
    for k, operation in enumerate(operations):
        disk.do(*operation)
        for name, state in disk.states().items():
            # Whole files alone, and never less of them than before.
            assert done <= batches_of(state), f"after operation {k}: {name}"
            states.append((k, name, state))
        done |= batches_of(disk.states()["only what was synced"])
    assert done == set(range(15))
    assert {n: d for n, d in disk.states()["all names"].items() if d is not None} == expected
    for k, name, state in random.Random(0).sample(states, min(runs, len(states))):
        folder = place / "lost"
        folder.mkdir()
        for path, data in sorted(state.items()):
            (folder / path).mkdir() if data is None else (folder / path).write_bytes(data)
        process = forks.run("index", folder, **options)
        assert process.status == 0, process.text
        assert files(folder) == expected, f"after operation {k} of {len(operations)}: {name}"
        shutil.rmtree(folder)
    print(f"{min(runs, len(states))} of {len(states)} states")
