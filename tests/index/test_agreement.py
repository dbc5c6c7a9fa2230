"""What stands in an index's folder agrees, or nothing is done: stale handles, stale Fisher matrices, lost manifests."""

from __future__ import annotations

import pytest
import torch

import dropinf
from dropinf.files import write_whole
from dropinf.index.kept import settle_fisher
from tests.index.small import files, make_batches, make_compressor

MORE = make_batches(3, 5)


def test_a_stale_handle_saves_nothing(train, tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx", fisher="block")
    fisher = dropinf.build_fisher(index)
    longer = make_compressor().compress(MORE, out=tmp_path / "idx", append=True, fisher="block")
    before = files(longer.path)
    with pytest.raises(ValueError, match=r"has changed since it was opened \(from \d+ samples to \d+"):
        index.save_fisher(fisher)
    assert files(longer.path) == before
    assert len(dropinf.Index.open(longer.path)) == len(train) + sum(len(b[0]) for b in MORE)
    longer.save_fisher(dropinf.build_fisher(longer, "diagonal"))
    assert dropinf.Index.open(longer.path).fisher().kind == "diagonal"
    assert longer.verify() == []


def test_a_handle_whose_fisher_alone_was_replaced_saves_another(tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx", fisher="block")
    other = dropinf.Index.open(index.path)
    index.save_fisher(dropinf.build_fisher(index, "diagonal"))
    other.save_fisher(dropinf.build_fisher(index, "kronecker"))
    assert dropinf.Index.open(index.path).fisher().kind == "kronecker"


def test_a_run_that_is_begun_makes_handles_stale(tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx")
    fisher = dropinf.build_fisher(index)

    def fails(batch):
        raise RuntimeError("stopped")

    with pytest.raises(ValueError, match="begun without ids"):
        make_compressor().compress(MORE, out=index.path, append=True, ids=fails)
    index.save_fisher(fisher)  # nothing was begun
    more = [*MORE[:2], (MORE[2][0] * float("nan"), MORE[2][1])]
    with pytest.raises(ValueError, match="sample 0 of batch 2"):
        make_compressor().compress(more, out=index.path, append=True)
    with pytest.raises(ValueError, match="or a run was begun"):
        index.save_fisher(fisher)
    dropinf.Index.open(index.path).save_fisher(fisher)  # beside the run that is not finished
    made = make_compressor().compress([*more[:2], MORE[2]], out=index.path, append=True)
    torch.testing.assert_close(made[-8:].flat, make_compressor().compress(MORE).flat[-8:])


@pytest.mark.parametrize("again", [False, True])
def test_a_fisher_that_does_not_cover_the_index_is_stale(again, tmp_path):
    made = make_compressor().compress(make_batches(), out=tmp_path / "idx", fisher="block")
    count = len(made)
    index = make_compressor().compress(MORE, out=tmp_path / "idx", append=True)
    with pytest.raises(ValueError, match=f"stale, of {count} samples where the index has {len(index)}; build it again"):
        index.fisher()
    with pytest.raises(ValueError, match=f"fisher: it is of {count} samples, and the index has {len(index)}"):
        index.save_fisher(dropinf.build_fisher(index[:count]))
    if again:  # the same append, now with a Fisher matrix
        make_compressor().compress(MORE, out=tmp_path / "idx", append=True, fisher="block")
    else:
        index.save_fisher(dropinf.build_fisher(index))
    assert dropinf.Index.open(index.path).fisher().count == len(index)


def test_a_handle_is_told_that_its_fisher_was_replaced(tmp_path):
    held = make_compressor().compress(make_batches(), out=tmp_path / "idx", fisher="block")
    make_compressor().compress(MORE, out=tmp_path / "idx", append=True, fisher="block")
    with pytest.raises(ValueError, match="replaced since this index was opened; open it again"):
        held.fisher()
    assert dropinf.Index.open(held.path).fisher().count > len(held)


def test_a_damaged_fisher_is_said_to_be_damaged(tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx", fisher="block")
    path = index.path / "fisher.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="damaged; build it again"):
        index.fisher()
    index.save_fisher(dropinf.build_fisher(index))
    assert index.fisher().count == len(index)
    assert index.verify() == []


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("how", ["append", "save"])
def test_a_fisher_matrix_that_is_ended_while_it_is_kept(how, step, tmp_path, monkeypatch):
    """Before the matrix is written, before the manifest names it, or before it has its place: it is of what is there."""
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx", fisher="block")
    calls = []

    def stopping(real):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) > step:
                raise SystemExit
            real(*arguments)

        return call

    def change():
        if how == "save":
            index.save_fisher(dropinf.build_fisher(index, "diagonal"))
        else:
            make_compressor().compress(MORE, out=index.path, append=True, fisher="block")

    if how == "append":
        with pytest.raises(ValueError, match="sample 0 of batch 2"):
            make_compressor().compress(
                [*MORE[:2], (MORE[2][0] * float("nan"), MORE[2][1])], out=index.path, append=True
            )
    with monkeypatch.context() as patch:
        patch.setattr("dropinf.index.manifest.write_whole", stopping(write_whole))
        patch.setattr("dropinf.index.kept.write_whole", stopping(write_whole))
        patch.setattr("dropinf.index.kept.settle_fisher", stopping(settle_fisher))
        patch.setattr("dropinf.index.writer.settle_fisher", stopping(settle_fisher))
        with pytest.raises(SystemExit):
            change()
    now = dropinf.Index.open(index.path)
    assert [line for line in now.verify() if "not finished" not in line] == []
    assert (
        now.fisher().count
        == len(now)
        == (len(index) + sum(len(x) for x, _ in MORE) if how == "append" and step == 2 else len(index))
    )
    assert (now.fisher().kind == "diagonal") == (how == "save" and step == 2)
    change()
    index = dropinf.Index.open(index.path)
    assert index.fisher().count == len(index)
    assert [path.name for path in index.path.glob("fisher*")] == ["fisher.safetensors"]


@pytest.mark.parametrize("what", ["same", "model", "data"])
def test_shards_without_a_manifest_are_nobodys(what, tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx")
    (index.path / "manifest.json").unlink()
    compressor = make_compressor(1) if what == "model" else make_compressor()
    with pytest.raises(ValueError, match="no manifest, which says of what model and data they are; restore"):
        compressor.compress(MORE if what == "data" else make_batches(), out=index.path)
