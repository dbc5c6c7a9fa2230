"""Indexing that is killed at any instant goes on from there, and ends with the bytes of a run that never was."""

from __future__ import annotations

import ast
import itertools
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path, PurePath

import pytest
import torch
from fault_forks import Forks, Process
from fault_jobs import SMALL, files, make_query
from safetensors.torch import load_file

import dropinf
from dropinf.index import verify
from dropinf.manifest import Manifest
from dropinf.storage import checksum

DTYPES = ("float32", "int8")
# What ends a rank whose neighbour was killed.
LOST = re.compile(
    r"RuntimeError: (rank \d was not heard of for \d+ s|rank \d failed: .*|another rank is gone \(.*\)|"
    r"the store of torch.distributed is gone \(.*\)); this rank \(\d\) stops too. Run it again"
)


def phase(folder: Path) -> str:
    """How far a run has come."""
    try:
        manifest = Manifest.load(folder)
    except FileNotFoundError:
        return "beginning"
    if not manifest.unfinished:
        return "ended"
    shards, parts = (len(list(folder.glob(f"{name}/0*"))) for name in ("shards", "parts"))
    if shards == sum(-(-run.batches // run.shard_batches) for run in manifest.runs):
        return "finishing"
    return f"{'some' if shards else 'no'} shards, {'some' if parts else 'no'} parts"


class Trials:
    """Runs that are killed and go on, and one that is not."""

    def __init__(self, forks: Forks, place: Path, world: int, seed: int, **options) -> None:
        self.forks, self.place, self.world, self.seed, self.options = forks, place, world, seed, options
        self.phases: Counter[str] = Counter()
        self.waits: list[float] = []  # until a rank that was not killed had ended
        for name in ("whole", "again"):
            ranks = self.start(place / name)
            started = time.monotonic()
            for process in ranks:
                process.until("ends")
            self.seconds = time.monotonic() - started
            assert [process.wait(30) for process in ranks] == [0] * world
        self.expected = files(place / "whole")
        assert files(place / "again") == self.expected

    def start(self, folder: Path) -> list[Process]:
        if self.world == 1:
            ranks = [self.forks.start("index", folder, **self.options)]
        else:
            ranks = self.forks.ranks(self.world, "index", folder, **self.options)
        for process in ranks:
            process.until("begins")
        return ranks

    def kill(self, folder: Path, chance: random.Random) -> bool:
        """Kill ranks of a run at some instant; return whether it was still under way."""
        ranks = self.start(folder)
        time.sleep(chance.uniform(0, self.seconds))
        killed = chance.choice([[0], [1], [0, 1]]) if self.world == 2 else [0]
        for rank in killed:
            ranks[rank].kill()
        at = time.monotonic()
        dead = [ranks[rank].wait(30) == -9 for rank in killed]
        for rank, process in enumerate(ranks):
            if rank not in killed:
                assert process.wait(30) is not None, f"there after 30 s: {process.text}"
                self.waits.append(time.monotonic() - at)
                assert process.status in (0, 1), process.text
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
                assert process.wait(60) == 0, process.text
            assert files(folder) == self.expected
            assert verify(folder) == []
            shutil.rmtree(folder)
        print(f"{self.world} ranks, {self.seconds:.2f} s a run, killed {self.phases.total()} times: {self.phases}")
        if self.waits:
            print(f"ranks that were not killed ended after {min(self.waits):.1f} to {max(self.waits):.1f} s")
        return self.phases


def reached(phases: Counter[str], least: int) -> None:
    """Kills hit runs in the midst of it: with parts, and with shards."""
    assert sum(n for name, n in phases.items() if "some parts" in name) >= least, phases
    assert sum(n for name, n in phases.items() if "some shards" in name) >= least, phases


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_killed_process_goes_on(dtype, forks, place):
    Trials(forks, place, 1, 1, dtype=dtype).run(2)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_process_killed_many_times_goes_on(dtype, forks, place):
    reached(Trials(forks, place, 1, 2, dtype=dtype).run(50), 10)


def test_killed_ranks_go_on(forks, place):
    Trials(forks, place, 2, 3, dtype="int8", slow=0.01, patience=2).run(2)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("dtype", "patience"), [("float32", None), ("int8", 2)])
def test_ranks_killed_many_times_go_on(dtype, patience, forks, place):
    reached(Trials(forks, place, 2, 4, dtype=dtype, slow=0.01, patience=patience).run(25), 5)


def test_a_rank_that_is_killed_at_once_is_missed(forks, place):
    """Before its first beat: it has only said that it begins."""
    ranks = forks.ranks(2, "index", place / "idx", slow=0.1, patience=2, dies_at=0, dies_on=1)
    assert ranks[1].wait(30) == -9
    assert ranks[0].wait(30) == 1
    assert "RuntimeError: rank 1 was not heard of for 2 s; this rank (0) stops too" in ranks[0].text
    assert len(list((place / "idx" / "shards").iterdir())) < 16  # of the 22 that are its own


# At every operation on a file.


def listed(forks: Forks, folder: Path, **options) -> list[tuple]:
    """Run to the end, and return its operations on files."""
    trace = folder.with_name("trace")
    assert forks.run("index", folder, trace=trace, **options).status == 0
    return [ast.literal_eval(line) for line in trace.read_text().splitlines()]


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


def test_killed_before_an_operation(forks, place):
    at_every_operation(forks, place, 8, batches=SMALL, append=4)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("again", [0, 2])
@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"fisher": "kronecker"}, {"append": 4}, {"append": 4, "fisher": None}]
)
def test_killed_before_every_operation(options, again, forks, place):
    at_every_operation(forks, place, 1, again, batches=SMALL, **options)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_before_an_operation(rank, forks, place):
    for process in forks.ranks(2, "index", place / "whole", batches=SMALL):
        assert process.wait(60) == 0
    expected = files(place / "whole")
    for k in itertools.count(0, 3):
        folder = place / "killed"
        options = {"batches": SMALL, "patience": 2}
        ranks = forks.ranks(2, "index", folder, dies_at=k, dies_on=rank, **options)
        if ranks[rank].wait(60) == 0:
            break
        assert ranks[rank].status == -9
        other = ranks[1 - rank]
        assert other.wait(30) in (0, 1), other.text
        if other.status:
            assert LOST.match(other.text.strip().splitlines()[-1]), other.text
        for process in forks.ranks(2, "index", folder, **options):
            assert process.wait(60) == 0, process.text
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


@pytest.mark.timeout(900)
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


# Another number of ranks.


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.long)])
def test_another_number_of_ranks_goes_on(dtype, forks, place):
    options = {"dtype": dtype, "slow": 0.01}
    alone = place / "alone"
    assert forks.run("index", alone, dtype=dtype).status == 0
    expected, one, query = files(alone), dropinf.Index.open(alone), make_query()
    folder = place / "two"
    ranks = forks.ranks(2, "index", folder, **options)
    while len(list(folder.glob("shards/0*"))) < 10 or not any(folder.glob("parts/0*")):
        time.sleep(0.001)
    for process in ranks:
        process.kill()
    assert [process.wait(30) for process in ranks] == [-9, -9]
    done = len(list(folder.glob("shards/0*")))
    assert 10 <= done < 44
    for world in (1, 3):
        other = place / str(world)
        shutil.copytree(folder, other)
        ranks = (
            [forks.start("index", other, dtype=dtype)]
            if world == 1
            else forks.ranks(world, "index", other, dtype=dtype)
        )
        assert [process.wait(60) for process in ranks] == [0] * world
        assert verify(other) == []
        found = files(other)
        assert found.keys() == expected.keys()
        differing = {name for name in found if found[name] != expected[name]}
        assert differing <= ({"fisher.safetensors", "manifest.json"} if world > 1 else set())
        index = dropinf.Index.open(other)
        assert torch.equal(index[:].flat, one[:].flat)
        assert index.ids() == one.ids()
        for name, sums in load_file(other / "fisher.safetensors").items():
            torch.testing.assert_close(sums, load_file(alone / "fisher.safetensors")[name])
        torch.testing.assert_close(
            index.fisher().solve(query).flat, one.fisher().solve(query).flat, rtol=1e-4, atol=1e-5
        )


# Runs of one folder.


def test_an_interrupted_append_is_not_taken_for_the_first_run(forks, place):
    """Its parts and shards stay its own where the first run is made again meanwhile."""
    folder, whole = place / "idx", place / "whole"
    options = {"batches": SMALL, "fisher": None}
    operations = listed(forks, whole, append=9, **options)
    expected = files(whole)
    second = next(k for k, x in enumerate(operations) if "shards" in x[1] and ".000005-" in x[1])
    assert forks.run("index", folder, append=9, dies_at=second + 1, **options).status == -9
    before = {path.name for path in folder.glob("parts/0*")}
    assert before
    first = next(folder.glob("shards/000000-*"))
    first.unlink()
    process = forks.run("index", folder, **options)
    assert process.status == 0, process.text
    assert first.read_bytes() == expected[f"shards/{first.name}"]
    assert {path.name for path in folder.glob("parts/0*")} == before
    assert forks.run("index", folder, append=9, **options).status == 0
    assert files(folder) == expected


def test_nothing_is_removed_that_is_not_its_own(forks, place):
    """Of a folder that is no index, nothing; of one that is, what a killed run was writing."""
    home = place / "home"
    (home / "deep").mkdir(parents=True)
    ours = f".manifest.json.{32 * 'a'}.tmp"
    for name in ("letter.txt", ".draft.tmp", "deep/.draft.tmp", ours, f"deep/{ours}"):
        (home / name).write_text("mine")
    before = files(home)
    process = forks.run("index", home, batches=SMALL)
    assert process.status == 1
    assert "is no index and not empty (it has '.draft.tmp'); name a new folder" in process.text
    assert files(home) == before
    index = place / "idx"
    assert forks.run("index", index, batches=SMALL).status == 0
    expected = files(index)
    (index / "deep").mkdir()
    for name in (ours, f"shards/{ours}", ".draft.tmp", f"deep/{ours}"):
        (index / name).write_text("mine")
    assert forks.run("index", index, batches=SMALL).status == 0
    assert files(index) == expected | {".draft.tmp": b"mine", f"deep/{ours}": b"mine"}


# Two at once.


def test_one_process_at_a_time(forks, place):
    first = forks.start("index", place / "idx", slow=0.05)
    while not (place / "idx" / "manifest.json").exists():
        time.sleep(0.001)
    before = time.monotonic()
    second = forks.run("index", place / "idx", batches=SMALL)
    assert second.status == 1
    assert time.monotonic() - before < 5
    assert (
        f"ValueError: out: another process is writing to {place / 'idx'}; wait for it, or name another folder"
        in second.text
    )
    for process in forks.ranks(2, "index", place / "idx"):
        assert process.wait(30) == 1
        assert "ValueError: out: another process is writing" in process.text
    first.kill()
    assert first.wait(10) == -9
    assert forks.run("index", place / "idx").status == 0
    assert verify(place / "idx") == []
