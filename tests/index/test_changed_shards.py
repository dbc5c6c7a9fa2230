"""Shards that change under an open index are errors, and many shards need few open files."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import dropinf
from dropinf.index import reader, shards
from dropinf.index.shards import Room
from tests.index.small import make_batches, make_compressor, names

USES = {
    "score": lambda index, query: dropinf.score(query, index, kind="dot"),
    "top": lambda index, query: dropinf.score(query, index, kind="dot", top=3),
    "cosine": lambda index, query: dropinf.score(query, index, kind="cosine"),
    "fisher": lambda index, query: dropinf.build_fisher(index),
    "rows": lambda index, query: index[:],
    "ids": lambda index, query: index.ids(),
}
MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import dropinf
index = dropinf.Index.open(sys.argv[1])
query = index[:2]
for kind in ("dot", "cosine"):
    assert dropinf.score(query, index, kind=kind, top=3).indices.shape == (2, 3)
fisher = dropinf.build_fisher(index)
assert len(dropinf.self_influence(index, fisher)) == len(index) == len(index.ids())
assert len(list(index.blocks(1))) == len(index)
index.whitened(sys.argv[1] + ".npy", fisher)
assert index.verify() == []
print(len(index.manifest.shards))
"""


def flip(path):
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 0x7F]))


def cut(path):
    os.truncate(path, path.stat().st_size - 40)


def empty(path):
    os.truncate(path, 0)


def swap(path):
    """Another file takes its name, of the same size and time."""
    found, data = path.stat(), bytearray(path.read_bytes())
    data[-5] ^= 0x7F
    other = path.with_name("other")
    other.write_bytes(bytes(data))
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(other, path)


@pytest.fixture(params=["together", "alone"])
def opened(request, tmp_path, monkeypatch):
    """An index whose small shards are read as one block, or each as its own."""
    made = make_compressor().compress(make_batches(), out=tmp_path / "idx", ids=names)
    if request.param == "alone":
        monkeypatch.setattr(reader, "SMALL_BYTES", -1)
    return made


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("change", [flip, cut, empty, swap, os.unlink])
def test_a_shard_that_changes_after_its_first_use_is_noticed(opened, query, use, change):
    use(opened, query)
    change(sorted((opened.path / "shards").iterdir())[3])
    with pytest.raises(ValueError, match=r"000003-\w+\.safetensors: (damaged|missing)"):
        use(opened, query)


@pytest.mark.parametrize("read", ["blocks", "stored_blocks"])
@pytest.mark.parametrize("rows", [2, 1000])
def test_a_shard_that_changes_while_it_is_used_is_noticed(opened, read, rows):
    """In the only block too, which nothing follows."""
    blocks = getattr(opened, read)(rows)
    next(blocks)
    flip(sorted((opened.path / "shards").iterdir())[0])
    with pytest.raises(ValueError, match=r"000000-\w+\.safetensors: damaged"):
        list(blocks)


def test_a_shard_that_is_written_anew_with_the_same_bytes_is_as_good(opened, train):
    assert torch.equal(opened[:].flat, train.flat)
    for path in (opened.path / "shards").iterdir():
        path.write_bytes(path.read_bytes())
    assert torch.equal(opened[:].flat, train.flat)


def test_a_shard_that_changes_before_it_is_opened(opened, monkeypatch):
    """Between the look at the file and its use."""
    opened[:]
    path = opened._files[3].path
    stamp = opened._files[3].stamp()
    flip(path)
    layout = opened._layouts[3][1]
    with pytest.raises(ValueError, match="it changed while it was read"):
        opened._files[3].read(layout, [(0, 1)], stamp, Room(opened._codec).take(1))


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    with open(path, "rb", buffering=0) as file, pytest.raises(ValueError, match="file: it was cut while it was read"):
        shards._read(file, 4, 2, torch.float32)


def test_many_shards_need_few_open_files(tmp_path):
    """Runs of one batch each: as many shards as batches."""
    make = make_compressor()
    count = 64 * 6
    for run in range(6):
        batches = [tuple(x[:1] for x in batch) for batch in make_batches(64, 100 + run)]
        made = make.compress(batches, out=tmp_path / "idx", ids=names, append=run > 0)
    assert len(made.manifest.shards) == count
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path / "idx")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{count}\n"), done.stderr
