"""Small shards of many appends are merged: rows, order, ids and fingerprints stay, whenever it is ended."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import dropinf
from dropinf.index import compact as module
from dropinf.index import shards
from dropinf.index.manifest import VERSION
from tests.index.small import files, make_batches, make_compressor, names
from tests.index.test_runs import StopError, interrupted

RUNS = 7


def batches_of(run: int):
    """Some runs begin alike."""
    return [*make_batches(1, run % 3), *make_batches(run % 4, 50 + run)]


def rows():
    return make_compressor().compress([batch for run in range(RUNS) for batch in batches_of(run)]).flat


def appended(folder, **options):
    for run in range(RUNS):
        made = make_compressor().compress(batches_of(run), out=folder, append=run > 0, **options)
    return made


def prints(index):
    return [p for path in shard_files(index) for p in shards.read_shard_header(path).prints]


def shard_files(index):
    return [file.path for file in index._files]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("ids", [None, names])
def test_rows_ids_and_fingerprints_stay(dtype, ids, tmp_path):
    index = appended(tmp_path / "idx", dtype=dtype, ids=ids, fisher="block")
    before = index[:].flat, index.ids(), prints(index)
    assert len(shard_files(index)) > RUNS
    index.compact()
    for found in (index, dropinf.Index.open(index.path)):
        assert torch.equal(found[:].flat, before[0])
        assert (found.ids(), prints(found)) == before[1:]
        assert found.info()["shards"] == 1
        assert found.fisher().count == len(found)
    assert index.verify() == []
    assert sorted((index.path / "shards").iterdir()) == shard_files(index)
    whole = files(index.path)
    index.compact()
    assert files(index.path) == whole


def test_large_shards_stay_and_small_ones_become_large(tmp_path, monkeypatch):
    """A large one is one of more than half the size; none becomes larger than that."""
    appended(tmp_path / "idx")
    index = dropinf.Index.open(tmp_path / "idx")
    row = index.bytes_per_sample
    monkeypatch.setattr(module, "SHARD_BYTES", 13 * row)
    index.compact()
    sizes = [shard.rows for shard in index.manifest.shards]
    assert max(sizes) <= 13
    assert len(sizes) < 2 * len(index) / 13 + 1
    assert torch.equal(index[:].flat, rows())
    kept = files(index.path)
    make_compressor().compress(make_batches(2, 90), out=index.path, append=True)
    monkeypatch.setattr(module, "SHARD_BYTES", 12 * row)
    dropinf.Index.open(index.path).compact()  # the last two shards alone
    now = dropinf.Index.open(index.path)
    assert all(str(path.relative_to(index.path)) in kept for path in shard_files(now)[:-1])
    assert torch.equal(now[: len(index)].flat, rows())
    assert now.verify() == []


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize("append", [False, True])
def test_a_call_is_found_in_what_was_merged(kind, append, tmp_path):
    index = appended(tmp_path / "idx", ids=names)
    index.compact()
    before = files(index.path)
    for run in range(RUNS):
        if kind is iter and not append and run < RUNS - 3:
            continue  # an iterator is compared with the last that begins alike
        again = make_compressor().compress(kind(batches_of(run)), out=index.path, ids=names, append=append)
        assert files(index.path) == before
    other = batches_of(3)
    other[1][0][0, 0] += 1
    with pytest.raises(ValueError, match=r"batch 1 is another than the one whose rows|there are 4 now"):
        make_compressor().compress(kind(other), out=index.path, ids=names)
    assert files(index.path) == before
    more = make_compressor().compress(kind(other), out=index.path, ids=names, append=True, fisher="block")
    assert torch.equal(more[: len(index)].flat, again[:].flat)
    assert torch.equal(more[len(index) :].flat, make_compressor().compress(other).flat)
    assert more.fisher().count == len(more)
    assert more.verify() == []


def test_another_loss_is_refused_by_what_was_merged(tmp_path):
    index = appended(tmp_path / "idx")
    index.compact()
    compressor = make_compressor()
    other = dropinf.Compressor(compressor.model, dropinf.Dropout(6), lambda m, b: 2 * compressor.loss_fn(m, b))
    with pytest.raises(ValueError, match="batch 0, computed again, has other gradients"):
        other.compress(batches_of(5), out=index.path)


def test_a_merged_shard_that_is_lost_cannot_be_made_again(tmp_path):
    index = appended(tmp_path / "idx")
    index.compact()
    shard_files(index)[0].unlink()
    with pytest.raises(ValueError, match=r"safetensors: missing; restore it"):
        make_compressor().compress(batches_of(5), out=index.path)


def test_an_append_that_is_not_finished_goes_first(tmp_path):
    index = appended(tmp_path / "idx")
    with pytest.raises(StopError):
        make_compressor().compress(interrupted(make_batches(), 3), out=index.path, append=True)
    before = files(index.path)
    with pytest.raises(ValueError, match=r"a run is not finished; finish it .* or give it up with Index\.discard"):
        index.compact()
    assert files(index.path) == before
    index.discard()
    index.compact()
    assert index.info()["shards"] == 1


def test_an_append_merges_what_has_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GATHERED", 4)
    for run in range(RUNS):
        index = make_compressor().compress(batches_of(run), out=tmp_path / "idx", append=run > 0, ids=names)
        assert len(index.manifest.runs) <= 3
    assert torch.equal(index[:].flat, rows())
    assert index.verify() == []
    before = files(index.path)
    for run in range(RUNS):  # what was merged twice, too
        make_compressor().compress(batches_of(run), out=index.path, append=True, ids=names)
    assert files(index.path) == before


def test_an_append_is_not_hindered_by_what_it_cannot_merge(tmp_path, monkeypatch):
    index = appended(tmp_path / "idx")
    monkeypatch.setattr(module, "SHARD_BYTES", 13 * index.bytes_per_sample)
    path = shard_files(index)[-1]  # others are merged before it is found
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    before = files(index.path)
    with pytest.raises(ValueError, match=f"{path.name}: damaged"):
        index.compact()
    assert files(index.path) == before
    monkeypatch.setattr(module, "GATHERED", 4)
    more = make_compressor().compress(make_batches(2, 90), out=index.path, append=True)
    assert len(more) == len(index) + 11
    assert [path.name in line for line in more.verify()] == [True]


def test_handles_of_before_are_told(query, tmp_path):
    index = appended(tmp_path / "idx", ids=names)
    opened = dropinf.Index.open(index.path)
    opened[:]
    index.compact()
    for use in (lambda: opened[:], lambda: opened.ids(), lambda: dropinf.score(query, opened, kind="dot")):
        with pytest.raises(ValueError, match="its shards were merged since it was opened; open it again"):
            use()
    shard_files(index)[0].unlink()
    with pytest.raises(ValueError, match="missing; restore it"):
        index[:]


def opened(folder):
    assert torch.equal(dropinf.Index.open(folder)[:].flat, rows())


def verified(folder):
    assert dropinf.index.verify(folder) == []


@pytest.mark.parametrize("use", [opened, verified])
def test_an_index_that_is_opened_while_shards_are_merged(use, tmp_path, monkeypatch):
    """Between the look at its manifest and that at its files."""
    index = appended(tmp_path / "idx")
    load = module.Manifest.load
    calls = []

    def late(folder):
        found = load(folder)
        calls.append(1)
        if len(calls) == 1:
            index.compact()
        return found

    monkeypatch.setattr(module.Manifest, "load", late)
    use(index.path)


@pytest.mark.parametrize("then", ["compact", "append", "rerun"])
@pytest.mark.parametrize("step", range(5))
def test_killed_while_shards_are_merged(step, then, tmp_path, monkeypatch):
    """What is left over goes with the next write, and no row with it."""
    index = appended(tmp_path / "idx", ids=names)
    row = index.bytes_per_sample
    monkeypatch.setattr(module, "SHARD_BYTES", 40 * row)
    calls = []

    def killed(real):
        def call(*arguments):
            calls.append(1)
            if len(calls) > step:
                raise SystemExit  # nothing else is done then
            return real(*arguments)

        return call

    whole = shutil.copytree(index.path, tmp_path / "whole")
    dropinf.Index.open(whole).compact()
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", killed(module.write_whole))
        patch.setattr(module.Manifest, "save", killed(module.Manifest.save))
        patch.setattr(module, "names", killed(module.names))
        patch.setattr(module.Path, "unlink", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            index.compact()
    now = dropinf.Index.open(index.path)
    assert torch.equal(now[:].flat, rows())
    assert now.verify() == []
    if then == "append":
        now = make_compressor().compress(make_batches(2, 90), out=index.path, append=True, ids=names)
    elif then == "rerun":
        now = make_compressor().compress(batches_of(5), out=index.path, ids=names)
    else:
        now.compact()
        assert files(index.path) == files(whole)
    assert torch.equal(now[: len(index)].flat, rows())
    assert now.verify() == []
    assert sorted((now.path / "shards").iterdir()) == sorted(shard_files(now))


def test_a_format_that_knows_no_merging_is_brought_forward(tmp_path):
    """Of an older version, whose batches have no fingerprints."""
    from tests.index.fixtures import make_fixtures as made
    from tests.index.test_old_files import FIXTURES

    folder = shutil.copytree(FIXTURES / "int8", tmp_path / "idx")
    index, data = dropinf.Index.open(folder), made.Data(FIXTURES)
    before = index[:].flat, index.ids()
    index.compact()
    assert (index[:].flat.equal(before[0]), index.ids(), index.verify()) == (True, before[1], [])
    assert json.loads((folder / "manifest.json").read_text())["version"] == VERSION
    whole, merged = files(folder), index.manifest
    for batches in (data.first, data.more):
        data.compressor().compress(batches, out=folder, append=True, ids=made.names)
        assert files(folder) == whole | {"manifest.json": (folder / "manifest.json").read_bytes()}
        now = module.Manifest.load(folder)
        assert replace(now, origin=None) == merged  # the model, which is compared, is known then
        assert now.origin == (data.compressor().origin().model, "")
    assert len(data.compressor().compress(data.queries, out=folder, append=True, ids=made.names)) == len(index) + 3
