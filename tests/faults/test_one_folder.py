"""Runs of one folder: by another number of ranks, of other batches, and two at once."""

from __future__ import annotations

import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

import dropinf
from dropinf.index import verify
from tests.faults.jobs import SMALL, files, make_query
from tests.faults.runs import done, listed


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.long)])
def test_another_number_of_ranks_goes_on(dtype, forks, place):
    alone = place / "alone"
    assert forks.run("index", alone, dtype=dtype).status == 0
    expected, one, query = files(alone), dropinf.Index.open(alone), make_query()
    folder = place / "two"
    # Both stop for good halfway: rank 1 in its eleventh shard, of which it has two parts.
    ranks = forks.ranks(2, "index", folder, dtype=dtype, stalls_at=65)
    while [len(list(folder.glob(f"{name}/0*"))) for name in ("shards", "parts")] != [21, 2]:
        assert not any(process.ended for process in ranks), [process.text for process in ranks]
        time.sleep(0.001)
    for process in ranks:
        process.kill()
    assert [process.wait() for process in ranks] == [-9, -9]
    for world in (1, 3):
        other = place / str(world)
        shutil.copytree(folder, other)
        ranks = (
            [forks.start("index", other, dtype=dtype)]
            if world == 1
            else forks.ranks(world, "index", other, dtype=dtype)
        )
        assert [process.wait() for process in ranks] == [0] * world
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
    first = forks.start("index", place / "idx", stalls_at=3)
    while done(place / "idx") < 3:
        assert not first.ended, first.text
        time.sleep(0.001)
    second = forks.run("index", place / "idx", batches=SMALL)  # which does not wait: the first never ends
    assert second.status == 1
    assert (
        f"ValueError: out: another process is writing to {place / 'idx'}; wait for it, or name another folder"
        in second.text
    )
    for process in forks.ranks(2, "index", place / "idx"):
        assert process.wait() == 1
        assert "ValueError: out: another process is writing" in process.text
    first.kill()
    assert first.wait() == -9
    assert forks.run("index", place / "idx").status == 0
    assert verify(place / "idx") == []
