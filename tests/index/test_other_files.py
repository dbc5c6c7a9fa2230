"""Files of others in an index's folder, and an index's files in the way of others: nothing is mixed, nothing lost."""

from __future__ import annotations

import contextlib
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

import dropinf
from tests.index.small import files, loss_fn, make_batches, make_compressor, make_model, names


def smoothed(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.3)


def compressor_of(loss):
    return dropinf.Compressor(make_model(), dropinf.Dropout(6), loss)


class Stops(list):
    """Batches, the first of which is looked at once before; Ctrl-C comes behind some of them."""

    def __init__(self, batches, after):
        super().__init__(batches)
        self.left = after + 1

    def __getitem__(self, b):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().__getitem__(b)

    def __iter__(self):
        return (self[b] for b in range(len(self)))


def stopped(compressor, batches, after, **options):
    with pytest.raises(KeyboardInterrupt):
        compressor.compress(Stops(batches, after), **options)


def test_shards_of_another_loss_beside_a_finished_index(tmp_path):
    batches = make_batches(40)
    for name, loss in (("wrong", smoothed), ("right", loss_fn)):
        compressor_of(loss).compress(batches, out=tmp_path / name, ids=names)
    for path in sorted((tmp_path / "wrong" / "shards").iterdir()):  # as where a folder is copied over another
        shutil.copy(path, tmp_path / "right" / "shards")
    before = (tmp_path / "right" / "manifest.json").read_bytes()
    again = compressor_of(loss_fn).compress(batches, out=tmp_path / "right", ids=names)
    assert (tmp_path / "right" / "manifest.json").read_bytes() == before
    assert torch.equal(again[:].flat, compressor_of(loss_fn).compress(batches).flat)


@pytest.mark.parametrize("further", ["wrong", "right"])
def test_two_unfinished_folders_that_were_united(further, tmp_path):
    batches = make_batches(40)
    for name, loss in (("wrong", smoothed), ("right", loss_fn)):
        stopped(compressor_of(loss), batches, 31 if name == further else 21, out=tmp_path / name, ids=names)
    shutil.copytree(tmp_path / "right", tmp_path / "wrong", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="its rows are of another run, model or sketch"):
        compressor_of(loss_fn).compress(batches, out=tmp_path / "wrong", ids=names)


def test_a_call_of_which_nothing_was_stored_leaves_nothing_behind(tmp_path):
    batches, folder = make_batches(), tmp_path / "idx"
    stopped(dropinf.Compressor(make_model(1), dropinf.Dropout(5), smoothed), batches, 0, out=folder)
    assert not list((folder / "parts").iterdir())
    made = compressor_of(loss_fn).compress(batches, out=folder)
    fresh = compressor_of(loss_fn).compress(batches, out=tmp_path / "fresh")
    assert files(folder) == files(tmp_path / "fresh")
    assert made.origin == fresh.origin


def test_an_append_of_which_nothing_was_stored_is_as_if_it_had_not_been(tmp_path):
    folder, more = tmp_path / "idx", make_batches(4, 5)
    make_compressor().compress(make_batches(), out=folder)
    stopped(make_compressor(), make_batches(6, 9), 0, out=folder, append=True)
    made = make_compressor().compress(more, out=folder, append=True)
    want = torch.cat([make_compressor().compress(x).flat for x in (make_batches(), more)])
    torch.testing.assert_close(made[:].flat, want)
    assert made.verify() == []


def test_what_others_put_into_a_folder_stays(tmp_path):
    (tmp_path / "a" / "parts").mkdir(parents=True)
    (tmp_path / "a" / "parts" / "drawing.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no index and not empty \(it has 'parts/drawing.txt'\)"):
        make_compressor().compress(make_batches(), out=tmp_path / "a")
    make_compressor().compress(make_batches(), out=tmp_path / "b" / "parts")
    with pytest.raises(ValueError, match=r"is no index and not empty|files of an index"):
        make_compressor().compress(make_batches(), out=tmp_path / "b")
    assert dropinf.Index.open(tmp_path / "b" / "parts").verify() == []
    index = make_compressor().compress(make_batches(), out=tmp_path / "c")
    (index.path / "parts").mkdir(exist_ok=True)
    (index.path / "parts" / "notes.txt").write_text("mine")
    make_compressor().compress(make_batches(3, 5), out=index.path, append=True)
    assert (index.path / "parts" / "notes.txt").read_text() == "mine"


def test_masks_that_were_saved_where_an_index_is_to_be(tmp_path):
    make_compressor(seed=0).save(tmp_path / "sketch.safetensors")
    kept = (tmp_path / "sketch.safetensors").read_bytes()
    other = dropinf.Compressor(make_model(), dropinf.Dropout(6, seed=7), loss_fn)
    with pytest.raises(ValueError, match="holds other masks than those of this compressor"):
        other.compress(make_batches(), out=tmp_path)
    assert (tmp_path / "sketch.safetensors").read_bytes() == kept
    assert make_compressor().compress(make_batches(), out=tmp_path).verify() == []


def test_a_manifest_of_before_a_merge_beside_the_merged_shards(tmp_path):
    live, copy = tmp_path / "live", tmp_path / "copy"
    for n in range(4):
        make_compressor().compress(make_batches(3, n), out=live, append=n > 0)
    copy.mkdir()
    for name in ("manifest.json", "sketch.safetensors"):
        shutil.copy(live / name, copy)
    index = dropinf.Index.open(live)
    rows = index[:].flat
    index.compact()
    shutil.copytree(live / "shards", copy / "shards")
    shards = sorted(path.name for path in (copy / "shards").iterdir())
    with contextlib.suppress(ValueError):
        make_compressor().compress(make_batches(3, 0), out=copy)
    assert {path.name for path in (copy / "shards").iterdir()} >= set(shards)
    shutil.copy(live / "manifest.json", copy)
    assert torch.equal(dropinf.Index.open(copy)[:].flat, rows)


def test_a_handle_stays_with_its_folder(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    mine = make_compressor().compress(make_batches(), out="idx")
    monkeypatch.chdir(tmp_path / "b")
    make_compressor().compress(make_batches(3, 5), out="idx")
    stopped(make_compressor(), make_batches(4, 6), 2, out="idx", append=True)
    before = files(tmp_path / "b")
    mine.discard()
    assert files(tmp_path / "b") == before
    shutil.rmtree(tmp_path / "a" / "idx" / "shards")
    assert mine.verify() != []


def test_a_handle_changes_no_index_that_took_its_place(tmp_path):
    mine = make_compressor().compress(make_batches(), out=tmp_path / "idx")
    shutil.rmtree(tmp_path / "idx")
    make_compressor().compress(make_batches(3, 5), out=tmp_path / "idx")
    stopped(make_compressor(), make_batches(4, 6), 2, out=tmp_path / "idx", append=True)
    before = files(tmp_path / "idx")
    for change in (mine.discard, mine.compact):
        with pytest.raises(ValueError, match="another index than the one that was opened"):
            change()
    assert files(tmp_path / "idx") == before


def test_exports_over_an_index_by_another_name(tmp_path):
    order = list(range(sum(len(b[0]) for b in make_batches())))[::-1]
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx", fisher="block", order=order)
    (tmp_path / "link").symlink_to(index.path)
    before, kept = files(index.path), [path.name for path in index.path.glob("*.safetensors")]
    assert len(kept) == 4
    for name in kept:
        for place in (tmp_path / "link", index.path / ".." / "idx", index.path / "shards" / ".."):
            with pytest.raises(ValueError, match="a file of the index itself"):
                index.whitened(place / name)
    assert files(index.path) == before


class Augmented:
    """Batches that are drawn anew each time that they are asked for."""

    def __len__(self):
        return 3

    def __getitem__(self, b):
        if b >= 3:
            raise IndexError
        return torch.randn(4, 12).double(), torch.zeros(4, dtype=torch.int64)


def test_batches_that_are_drawn_anew_are_refused(tmp_path):
    for batches in (Augmented(), torch.utils.data.DataLoader(Augmented(), batch_size=None)):
        with pytest.raises(ValueError, match="their first batch is another one when it is read again"):
            make_compressor().compress(batches, out=tmp_path / type(batches).__name__)


def test_ids_without_an_order_are_refused(tmp_path):
    for ids in (lambda b: set(names(b)), lambda b: dict.fromkeys(names(b), 1)):
        with pytest.raises(ValueError, match="ids: it gave"):
            make_compressor().compress(make_batches(), out=tmp_path / "idx", ids=ids)


@pytest.mark.parametrize("rows", [None, b"a", object()])
def test_what_selects_no_samples(rows, tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx")
    for source in (index, index[:]):
        with pytest.raises(TypeError, match="samples are selected by"):
            source[rows]


def test_the_folder_is_named_as_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_compressor().compress(make_batches(), out="idx").path == tmp_path / "idx"
    assert os.listdir(tmp_path) == ["idx"]


def test_lost_shards_are_not_made_again_by_another_loss(tmp_path):
    index = compressor_of(loss_fn).compress(make_batches(), out=tmp_path / "idx")
    for path in (tmp_path / "idx" / "shards").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no row of this run is left in"):
        compressor_of(smoothed).compress(make_batches(), out=tmp_path / "idx")
    again = compressor_of(loss_fn).compress(make_batches(), out=tmp_path / "idx")
    assert again.manifest == index.manifest


def test_exports_over_what_an_index_links_to(tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx", fisher="block")
    shutil.move(index.path / "sketch.safetensors", tmp_path / "masks.safetensors")
    (index.path / "sketch.safetensors").symlink_to(tmp_path / "masks.safetensors")
    shutil.move(index.path / "shards", tmp_path / "elsewhere")
    (index.path / "shards").symlink_to(tmp_path / "elsewhere")
    shard = next((tmp_path / "elsewhere").iterdir()).name
    own = [
        "sketch.safetensors",
        f"shards/{shard}",
        "../masks.safetensors",
        f"../elsewhere/{shard}",
        f"fisher-{'0' * 32}.safetensors",
    ]
    for place in own:
        with pytest.raises(ValueError, match="a file of the index itself"):
            index.whitened(index.path / place)
    assert index.verify() == []
