"""A folder that is moved or removed while it is written to: what then stands at its path is another's, and left alone."""

from __future__ import annotations

import os
import shutil

import pytest

import dropinf
from dropinf import files as on_disk
from dropinf.index.folder import locked
from dropinf.ranks import Ranks
from tests.index.small import files, make_batches, make_compressor, names
from tests.index.test_runs import StopError, interrupted

BATCHES, MORE = make_batches(6), make_batches(2, 5)


def made(folder, fisher="block"):
    return make_compressor().compress(BATCHES, out=folder, ids=names, fisher=fisher)


def appended(folder):
    made(folder)
    return make_compressor().compress(MORE, out=folder, ids=names, fisher="block", append=True)


def stop(batches, at, folder, **options):
    with pytest.raises(StopError):
        make_compressor().compress(interrupted(batches, at), out=folder, ids=names, fisher="block", **options)


def begun(folder):
    stop(BATCHES, 3, folder)


def stopped(folder):
    made(folder)
    stop(MORE, 1, folder, append=True)


def new_fisher(folder):
    index = dropinf.Index.open(folder)
    index.save_fisher(dropinf.build_fisher(index, "diagonal"))


# What writes: what is there before, and the call.
WRITES = {
    "new": (lambda folder: None, made),
    "go on": (begun, made),
    "append": (made, appended),
    "compact": (appended, lambda folder: dropinf.Index.open(folder).compact()),
    "discard": (stopped, lambda folder: dropinf.Index.open(folder).discard()),
    "fisher": (made, new_fisher),
}
# Before a file is begun, while it is written, and as it gets its name; and what stands at the path then.
MOVES = [("fsync", None), ("_temporary", begun), ("fsync", begun), ("fsync", stopped), ("replace", made)]


def moving(monkeypatch, module, name, at, folder, other):
    """Move the folder right before call number `at` of a function on files, and put another in its place."""
    real, calls = getattr(module, name), []

    def call(*arguments):
        calls.append(1)
        if len(calls) == at + 1:
            os.rename(folder, folder.with_name("old"))
            if other is not None:
                shutil.copytree(other, folder)
        return real(*arguments)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize(("name", "other"), MOVES, ids=[f"{name}-{getattr(x, '__name__', x)}" for name, x in MOVES])
@pytest.mark.parametrize("what", WRITES)
def test_nothing_of_anothers_folder_is_changed(what, name, other, tmp_path, monkeypatch):
    before, write = WRITES[what]
    place, there = tmp_path / "other", None
    if other is not None:
        other(place)
        there = files(place)
    before(tmp_path / "before")
    for at in (0, 1, 2, 3, 5, 8, 13, 21, 34):
        folder = tmp_path / f"{at}" / "idx"
        folder.parent.mkdir()
        if (tmp_path / "before").exists():
            shutil.copytree(tmp_path / "before", folder)
        with monkeypatch.context() as patch:
            module = on_disk if name == "_temporary" else on_disk.os
            calls = moving(patch, module, name, at, folder, place if there else None)
            message = None
            try:
                write(folder)
            except ValueError as error:
                message = str(error)
        if len(calls) <= at:
            assert message is None
            break
        assert message is not None
        assert f"{folder}: moved or removed while it was written to" in message
        if there is None:
            assert not folder.exists()
        else:
            assert files(folder) == there
            shutil.rmtree(folder)
        os.rename(folder.with_name("old"), folder)
        if what == "new":
            assert made(folder).verify() == []
    assert at > 0


def in_a_lock(folder, change):
    with locked(folder, Ranks(None)):
        change()


def test_a_lock_that_is_removed(tmp_path):
    """Another run would make a new one, and both would write."""
    with pytest.raises(ValueError, match="idx: moved or removed while it was written to"):
        in_a_lock(tmp_path / "idx", (tmp_path / "idx" / ".lock").unlink)


def test_what_is_lost_with_the_folder_is_no_other_fault(tmp_path):
    index = made(tmp_path / "idx")

    def lost():
        shutil.rmtree(index.path)
        index[:]

    with pytest.raises(ValueError, match="idx: moved or removed"):
        in_a_lock(index.path, lost)
    with pytest.raises(FileNotFoundError, match="no index"):
        in_a_lock(index.path, lambda: dropinf.Index.open(index.path))
