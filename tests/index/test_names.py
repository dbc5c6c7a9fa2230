"""Paths and names that are unusual are taken, or refused by what is wrong with them."""

from __future__ import annotations

import os

import pytest
import torch

import dropinf
from dropinf.gradients import Gradients
from tests.index.small import make_batches, make_compressor, make_model

ODD = os.fsdecode(b"not \xff\xfe UTF-8")


def test_a_path_that_is_not_utf8(tmp_path):
    folder = tmp_path / ODD
    index = make_compressor().compress(make_batches(), out=folder, fisher="block")
    assert index.verify() == []
    rows = dropinf.Index.open(folder)[:]
    assert index.fisher().count == len(rows)
    again = dropinf.Compressor.from_index(folder, make_model(), make_compressor().loss_fn)
    assert torch.equal(again.compress(make_batches()).flat, rows.flat)
    rows.save(folder / "rows.safetensors")
    assert torch.equal(Gradients.load(folder / "rows.safetensors").flat, rows.flat)
    again.save(folder / f"{ODD}.safetensors")
    make_compressor().load(folder / f"{ODD}.safetensors")
    for suffix in (".npy", ".safetensors"):
        index.whitened(folder / f"out{suffix}")
    assert dropinf.score(index, index, kind="dot", out=folder / "scores.npy").shape == (len(rows), len(rows))


@pytest.mark.parametrize("factory", [None, "IVF2,Flat"])
def test_faiss_files_whose_path_is_not_utf8(factory, tmp_path):
    faiss = pytest.importorskip("faiss")
    (tmp_path / ODD).mkdir()
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx", fisher="block")
    index.whitened(tmp_path / ODD / "out.faiss", factory=factory)
    os.rename(tmp_path / ODD / "out.faiss", tmp_path / "out.faiss")
    assert faiss.read_index(str(tmp_path / "out.faiss")).ntotal == len(index)


def test_names_as_long_as_a_file_system_takes(tmp_path):
    folder = tmp_path / ("x" * 255)
    index = make_compressor().compress(make_batches(), out=folder, fisher="block")
    index.whitened(tmp_path / ("y" * 246 + ".npy"))
    index.fisher().save(tmp_path / ("名" * 85))
    assert dropinf.Fisher.load(tmp_path / ("名" * 85)).count == len(index)
    with pytest.raises(OSError, match="File name too long; choose a shorter name"):
        make_compressor().compress(make_batches(), out=tmp_path / ("x" * 256))
    with pytest.raises(OSError, match="File name too long"):
        index.whitened(tmp_path / ("y" * 252 + ".npy"))  # its ids have no name


def test_links_to_nothing(tmp_path):
    (tmp_path / "idx").symlink_to(tmp_path / "gone")
    for use in (dropinf.Index.open, dropinf.index.verify):
        with pytest.raises(FileNotFoundError, match=f"a link to {tmp_path / 'gone'}, which is not there"):
            use(tmp_path / "idx")
    with pytest.raises(FileExistsError, match=f"it is a link to {tmp_path / 'gone'}, which is not there; name another"):
        make_compressor().compress(make_batches(), out=tmp_path / "idx")
    index = make_compressor().compress(make_batches(), out=tmp_path / "made")
    shard = sorted((index.path / "shards").iterdir())[2]
    kept = shard.read_bytes()
    shard.unlink()
    shard.symlink_to("/nowhere")
    assert index.verify() == [f"{shard}: missing; restore it, or run the same compress again to make it"]
    assert make_compressor().compress(make_batches(), out=tmp_path / "made").verify() == []
    assert shard.read_bytes() == kept
    (index.path / "manifest.json").unlink()
    (index.path / "manifest.json").symlink_to("/nowhere")
    with pytest.raises(FileNotFoundError, match=r"manifest.json: a link to /nowhere, which is not there"):
        dropinf.Index.open(index.path)


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="it is a file, not a folder; name another folder"):
        make_compressor().compress(make_batches(), out=tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="a part of this path is a file: name another folder"):
        make_compressor().compress(make_batches(), out=tmp_path / "file" / "idx")


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx")
    fisher, opened = dropinf.build_fisher(index), os.open

    def refused(path, flags, *arguments, **options):
        if str(path).endswith(".lock"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refused)
    for write in (lambda: index.save_fisher(fisher), lambda: make_compressor().compress([], out=index.path)):
        with pytest.raises(PermissionError, match="Permission denied; out must be a folder that you may write to"):
            write()
    assert torch.equal(dropinf.Index.open(index.path)[:].flat, index[:].flat)


def test_ids_that_are_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"ids: '\\udcff' is no text: UTF-8 cannot hold it"):
        make_compressor().compress(make_batches(), out=tmp_path / "idx", ids=lambda batch: ["\udcff"] * len(batch[0]))
    index = make_compressor().compress(
        make_batches(), out=tmp_path / "id", ids=lambda batch: ["x" * 10**6] * len(batch[0])
    )
    assert len(index.ids(0)[0]) == 10**6


@pytest.mark.parametrize("damping", [None, True, [1], 1j, "0.1", float("nan"), -1, torch.ones(2)])
def test_dampings_that_are_none(damping):
    with pytest.raises(ValueError, match=r"damping is .*; it must be a finite number of at least 0"):
        dropinf.Fisher("block", damping)


def test_pipes_in_the_place_of_files(tmp_path):
    folder = tmp_path / "idx"
    index = make_compressor().compress(make_batches(), out=folder)
    shard = min((folder / "shards").glob("*.safetensors"))
    for place, says in ((shard, "0 bytes, too few"), (folder / "manifest.json", "not a file")):
        place.unlink()
        os.mkfifo(place)
        with pytest.raises(ValueError, match=f"{place.name}: .*({says})"):
            dropinf.Index.open(folder)[:]
        if place is shard:
            assert place.name in str(index.verify())
