"""What reads an index while another process writes into its folder: it reads on, or says what happened."""

from __future__ import annotations

import pytest
import torch

import dropinf
from dropinf.index import probe
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
