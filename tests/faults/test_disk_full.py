"""A disk that is full: an error that names the file and the way out, nothing half written, and a run that goes on."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from dropinf.index import verify
from tests.faults.forks import Process
from tests.faults.jobs import SMALL, files

WAY_OUT = "free space and run it again: it goes on from here"


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def failed(process: Process, reason: str, folder: Path) -> None:
    """It ended by itself, with an error that names the reason, a file of this folder, and the way out."""
    assert process.status == 1, process.text
    last = process.text.strip().splitlines()[-1]
    assert re.match(r"OSError: \[Errno \d+\] " + f"{reason}; {WAY_OUT}: '{folder}/", last), process.text
    assert temporaries(folder) == []


@contextmanager
def small_disk(folder: Path, options: str):
    """A file system of a few pages, in memory."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def whole(forks, place):
    """The files of a run that had room."""
    assert forks.run("index", place / "whole", batches=SMALL).status == 0
    return files(place / "whole")


@pytest.mark.parametrize("step", [20, pytest.param(1, marks=pytest.mark.long)])
def test_a_limit_on_file_sizes(step, whole, forks, place):
    largest = max(map(len, whole.values()))
    stopped = set()
    for limit in range(16, largest, 16 * step):  # what it prints is in a file too
        folder = place / "idx"
        process = forks.run("index", folder, batches=SMALL, limits={"FSIZE": limit})
        failed(process, "File too large", folder)
        stopped.add(re.split(r"\W+", process.text.strip().splitlines()[-1].split(f"{folder}/")[1])[0])
        assert forks.run("index", folder, batches=SMALL).status == 0
        assert files(folder) == whole
        assert verify(folder) == []
        shutil.rmtree(folder)
    assert stopped >= {"sketch", "shards"}, stopped
    print(f"limits from 0 to {limit} bytes, stopped at {sorted(stopped)}")


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.long)])
def test_a_full_file_system(step, whole, forks, place):
    """Of more and more pages, until the index fits: what was written before goes on when there is more room."""
    stopped = set()
    for kind, size in (("size", 4096), ("nr_inodes", 1)):
        for count in range(2, 60, step):
            with small_disk(place / "disk", f"{kind}={count * size}") as remount:
                folder = place / "disk" / "idx"
                process = forks.run("index", folder, batches=SMALL)
                if process.status == 0:
                    break
                if (folder / ".lock").exists():
                    failed(process, "No space left on device", folder)
                    stopped.add(re.split(r"\W+", process.text.strip().splitlines()[-1].split(f"{folder}/")[1])[0])
                else:
                    assert "No space left on device" in process.text
                    assert str(folder) in process.text.strip().splitlines()[-1]
                remount(f"{kind}={4096 * size}")
                process = forks.run("index", folder, batches=SMALL)
                assert process.status == 0, process.text
                assert files(folder) == whole
                assert verify(folder) == []
        else:
            raise AssertionError("it never fitted")
    print(f"stopped at {sorted(stopped)}")


def test_ranks_on_a_full_file_system(forks, place):
    """One has no room: both end, with its error."""
    assert [p.wait() for p in forks.ranks(2, "index", place / "whole", batches=SMALL)] == [0, 0]
    with small_disk(place / "disk", "size=24576") as remount:
        folder = place / "disk" / "idx"
        ranks = forks.ranks(2, "index", folder, batches=SMALL)
        assert [process.wait() for process in ranks] == [1, 1]
        for process in ranks:
            assert "No space left on device; free space and run it again" in process.text.strip().splitlines()[-1]
        assert temporaries(folder) == []
        remount("size=16m")
        assert [p.wait() for p in forks.ranks(2, "index", folder, batches=SMALL)] == [0, 0]
        assert files(folder) == files(place / "whole")
        assert verify(folder) == []


@pytest.mark.parametrize("what", ["scores", "whitened", "fisher"])
def test_no_room_for_what_is_made_of_an_index(what, forks, place):
    index = place / "idx"
    assert forks.run("index", index).status == 0
    before = files(index)
    name = {"scores": "scores.npy", "whitened": "rows.safetensors", "fisher": "fisher.safetensors"}[what]
    out = index / name
    process = forks.run("export", index, what, out, limits={"FSIZE": 1000})
    assert process.status == 1
    last = process.text.strip().splitlines()[-1]
    written = str(out).replace("fisher.", r"fisher-\w{32}.")  # beside the one before
    assert re.match(rf"OSError: \[Errno 27\] File too large.*: '{written}(\.ids)?'", last), process.text
    assert files(index) == before
    if what == "fisher":  # always in the index, as above
        return
    with small_disk(place / "disk", "size=4096"):
        out = place / "disk" / name
        process = forks.run("export", index, what, out)
        assert process.status == 1
        last = process.text.strip().splitlines()[-1]
        assert re.match(rf"OSError: \[Errno 28\] No space left on device.*: '{out}(\.ids)?'", last), process.text
        assert files(place / "disk") == {}
