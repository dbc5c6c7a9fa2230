"""What reads an index while another process writes into its folder: it reads on, or says what happened."""

from __future__ import annotations

import os

import pytest
import torch

import dropinf
from dropinf.index import discard, kept, probe
from dropinf.index.finished import Finished
from dropinf.index.shards import ShardFile
from tests.index.small import loss_fn, make_batches, make_compressor, make_model, names

MERGED = "its shards were merged since it was opened; open it again"


def first_only(monkeypatch, owner, name, happens):
    """Have something happen right before the first call of a function."""
    real, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            happens()
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.fixture
def appended(tmp_path):
    """An index of several calls, so that there is something to merge."""
    for run in range(3):
        index = make_compressor().compress(make_batches(2, run), out=tmp_path / "idx", ids=names, append=run > 0)
    return index


# Shards that are merged meanwhile.

STEPS = [
    (probe, "plans_of"),
    (probe, "Finished"),
    (Finished, "check_bytes"),
    (ShardFile, "verify"),
    (Finished, "rows"),
    (ShardFile, "read"),
    (probe, "rows_of"),
    (Finished, "check_rows"),
]


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
def test_a_merge_does_not_make_a_model_another_one(owner, name, same, appended, monkeypatch):
    query = make_batches(1, 9)
    calls = first_only(monkeypatch, owner, name, dropinf.Index.open(appended.path).compact)

    def halved(model, batch):
        return loss_fn(model, batch) / 2

    monkeypatch.setattr(probe, "is_same_loss", lambda *_: True)  # as of one that reads what no comparison sees
    queries = dropinf.Compressor.from_index(appended.path, make_model(), loss_fn if same else halved)
    if same:
        assert torch.equal(queries.compress(query).flat, make_compressor().compress(query).flat)
    else:
        with pytest.raises(ValueError, match="which it keeps, they now give others than the gradients it holds"):
            queries.compress(query)
    assert calls
    assert dropinf.Index.open(appended.path).info()["shards"] == 1


@pytest.mark.parametrize("name", ["stamp", "verify", "layout", "texts"])
def test_ids_say_that_shards_were_merged(name, appended, monkeypatch):
    first_only(monkeypatch, ShardFile, name, dropinf.Index.open(appended.path).compact)
    with pytest.raises(ValueError, match=MERGED):
        appended.ids()


def test_the_size_of_merged_shards_is_not_told(appended):
    dropinf.Index.open(appended.path).compact()
    with pytest.raises(ValueError, match=MERGED):
        appended.info()
    now = dropinf.Index.open(appended.path)
    (shard,) = (appended.path / "shards").iterdir()
    assert now.info()["bytes"] == shard.stat().st_size
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: missing; restore it"):
        now.info()


def test_mapped_shards_say_that_they_were_merged(appended, monkeypatch):
    from dropinf.index import reader

    monkeypatch.setattr(reader, "SMALL_BYTES", -1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    first_only(monkeypatch, ShardFile, "mapped", dropinf.Index.open(appended.path).compact)
    with pytest.raises(ValueError, match=MERGED):
        list(appended.stored_blocks(reuse=True))


# Fisher matrices that are saved meanwhile.


@pytest.fixture
def unsettled(appended):
    """An index whose matrix still stands beside its place, as while it is saved; and what puts it there."""
    appended.save_fisher(dropinf.build_fisher(appended))
    place = appended.path / "fisher.safetensors"
    beside = kept.fisher_paths(appended.path, appended.manifest.files[place.name])[0]
    os.replace(place, beside)
    return appended, lambda: os.replace(beside, place)


@pytest.mark.parametrize("name", ["_stamp", "file_checksum", "load"])
def test_a_fisher_that_is_put_in_place_while_it_is_read(name, unsettled, monkeypatch):
    index, settle = unsettled

    def gone(*_):
        """Fail as the reader of the format does, where a file goes between its two looks at it."""
        settle()
        raise RuntimeError("unable to open file in read-only mode: No such file or directory")

    first_only(monkeypatch, kept.Fisher if name == "load" else kept, name, gone if name == "load" else settle)
    assert index.fisher().count == len(index)
    assert (index.path / "fisher.safetensors").exists()


def test_a_fisher_that_is_put_in_place_while_it_is_verified(unsettled, monkeypatch):
    index, settle = unsettled
    is_file = discard.Path.is_file

    def late(path):
        found = is_file(path)
        if found and path.name.startswith("fisher-"):
            settle()
        return found

    monkeypatch.setattr(discard.Path, "is_file", late)
    assert index.verify() == []
    assert (index.path / "fisher.safetensors").exists()


def test_a_fisher_that_is_saved_again_while_it_is_read(appended, monkeypatch):
    fisher = dropinf.build_fisher(appended)
    appended.save_fisher(fisher)
    first_only(monkeypatch, kept.Fisher, "load", lambda: dropinf.Index.open(appended.path).save_fisher(fisher))
    assert appended.fisher().count == len(appended)


def test_a_fisher_that_cannot_be_read_says_why(appended, monkeypatch):
    appended.save_fisher(dropinf.build_fisher(appended))

    def fails(_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(kept.Fisher, "load", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        appended.fisher()
