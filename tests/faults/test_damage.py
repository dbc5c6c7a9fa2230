"""Bytes that changed, in files of an index: said by name, and never used."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

import dropinf
from dropinf.index import plan, verify
from tests.faults.jobs import files, make_batches, make_compressor, make_query, names

DTYPES = ("float32", "int8")
SOME = pytest.mark.parametrize("some", [60, pytest.param(None, marks=pytest.mark.long)])  # bytes; None: all of them


@pytest.fixture(scope="module", params=DTYPES)
def index(request, tmp_path_factory):
    """An index of four shards, with everything that an index has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_LEAST_SHARDS", 4)
        return make_compressor().compress(
            make_batches(12),
            out=tmp_path_factory.mktemp("damage") / "idx",
            dtype=getattr(torch, request.param),
            fisher="block",
            ids=names,
        )


@pytest.fixture(scope="module")
def query():
    return make_query()


@pytest.fixture(scope="module")
def fisher(index):
    return dropinf.build_fisher(index)


@pytest.fixture(autouse=True)
def _whole(index):
    """Every test leaves the index as it was."""
    before = files(index.path)
    yield
    assert files(index.path) == before


def uses(query, fisher):
    """What reads shards, by name."""
    return {
        "scores": lambda index: dropinf.score(query, index, fisher),
        "best": lambda index: dropinf.score(query, index, fisher, top=3),
        "cosines": lambda index: dropinf.score(query, index, kind="cosine"),
        "fisher": dropinf.build_fisher,
        "self": lambda index: dropinf.self_influence(index, fisher),
        "rows": lambda index: index[:],
        "row": lambda index: index[len(index) // 3],
        "ids": lambda index: index.ids(),
        "blocks": lambda index: list(index.blocks(4)),
    }


def refused(index, query, fisher, shard) -> None:
    """`verify` names the shard and nothing else; whatever reads it raises, and names it."""
    problems = verify(index.path)
    assert len(problems) == 1, problems
    assert str(shard) in problems[0]
    for use in uses(query, fisher).values():
        with pytest.raises(ValueError, match=shard.name):
            use(dropinf.Index.open(index.path))


def second(index):
    """A shard that is neither the first nor the last, and holds the row that is read."""
    return sorted((index.path / "shards").iterdir())[1]


def changes(data: bytes, some: int | None, header: int = 0):
    """(position, changed bytes): each byte of the header, and each or `some` of the others; all bits of it and one of
    them, by turns where some are taken."""
    chance = random.Random(0)
    rest = range(header, len(data))
    for i in [*range(header), *(rest if some is None else sorted(chance.sample(rest, some)))]:
        masks = (0xFF, 1 << chance.randrange(8))
        for mask in masks if some is None else masks[i % 2 :][:1]:
            yield i, data[:i] + bytes([data[i] ^ mask]) + data[i + 1 :]


def header_of(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_every_byte_of_the_manifest(index):
    path = index.path / "manifest.json"
    data = path.read_bytes()
    try:
        for i, changed in changes(data, None):
            path.write_bytes(changed)
            problems = verify(index.path)
            assert len(problems) == 1, f"byte {i}"
            assert str(path) in problems[0]
            with pytest.raises(ValueError, match=r"manifest\.json: "):
                dropinf.Index.open(index.path)
    finally:
        path.write_bytes(data)


@SOME
def test_every_byte_of_a_shard(some, index, query, fisher):
    shard = second(index)
    data = shard.read_bytes()
    try:
        for i, changed in changes(data, some, header_of(data)):
            shard.write_bytes(changed)
            if some is None or i % 16 == 0:
                refused(index, query, fisher, shard)
            else:
                with pytest.raises(ValueError, match=shard.name):
                    dropinf.score(query, dropinf.Index.open(index.path), fisher)
    finally:
        shard.write_bytes(data)


@SOME
@pytest.mark.parametrize("name", ["fisher.safetensors", "sketch.safetensors"])
def test_every_byte_of_the_other_files(name, some, index):
    path = index.path / name
    data = path.read_bytes()
    try:
        for i, changed in changes(data, some):
            path.write_bytes(changed)
            assert verify(index.path) == [f"{path}: damaged, its bytes do not match their checksum"], f"byte {i}"
            if name.startswith("fisher"):
                with pytest.raises(ValueError, match=rf"{name}: damaged"):
                    dropinf.Index.open(index.path).fisher()
    finally:
        path.write_bytes(data)


CUTS = {
    "nothing": lambda data: b"",
    "one byte": lambda data: data[:1],
    "its length": lambda data: data[:8],
    "much of its header": lambda data: data[:200],
    "all but a byte": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "a byte more": lambda data: data + b"\0",
    "twice": lambda data: data + data,
    "a page more": lambda data: data + bytes(4096),
}


@pytest.mark.parametrize("cut", CUTS)
def test_files_that_are_shorter_or_longer(cut, index, query, fisher):
    shard = second(index)
    data = shard.read_bytes()
    shard.write_bytes(CUTS[cut](data))
    try:
        refused(index, query, fisher, shard)
    finally:
        shard.write_bytes(data)
    for name in ("manifest.json", "fisher.safetensors", "sketch.safetensors"):
        path = index.path / name
        data = path.read_bytes()
        path.write_bytes(CUTS[cut](data))
        try:
            assert len(problems := verify(index.path)) == 1
            assert str(path) in problems[0]
            if name != "sketch.safetensors":
                with pytest.raises(ValueError, match=name):
                    dropinf.Index.open(index.path).fisher()
        finally:
            path.write_bytes(data)


def test_files_that_are_missing(index, query, fisher):
    shard, aside = second(index), index.path / "aside"
    shard.rename(aside)
    try:
        refused(index, query, fisher, shard)
        assert verify(index.path) == [f"{shard}: missing; restore it, or run the same compress again to make it"]
    finally:
        aside.rename(shard)
    for name in ("fisher.safetensors", "sketch.safetensors"):
        (index.path / name).rename(aside)
        try:
            assert verify(index.path) == [f"{index.path / name}: missing"]
            if name.startswith("fisher"):
                with pytest.raises(FileNotFoundError, match=name):
                    dropinf.Index.open(index.path).fisher()
        finally:
            aside.rename(index.path / name)
    (index.path / "manifest.json").rename(aside)
    try:
        for use in (verify, dropinf.Index.open):
            with pytest.raises(FileNotFoundError, match=r"no index \(it has no manifest\.json\); make one with"):
                use(index.path)
    finally:
        aside.rename(index.path / "manifest.json")


def test_shards_that_changed_places(index, query, fisher):
    one, two = sorted((index.path / "shards").iterdir())[1:3]
    first, other = one.read_bytes(), two.read_bytes()
    assert first != other
    one.write_bytes(other)
    try:
        refused(index, query, fisher, one)
        two.write_bytes(first)
        problems = verify(index.path)
        assert [str(path) in line for path, line in zip((one, two), problems, strict=True)] == [True, True]
        for use in uses(query, fisher).values():
            with pytest.raises(ValueError, match=one.name):
                use(dropinf.Index.open(index.path))
    finally:
        one.write_bytes(first)
        two.write_bytes(other)


def test_what_was_damaged_is_made_again(index, tmp_path):
    """The way out that the errors name: delete it, and run the same compress again."""
    folder = tmp_path / "idx"
    shutil.copytree(index.path, folder)
    before = files(folder)
    shard = second(index)
    path = folder / "shards" / shard.name
    path.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    for name in ("fisher.safetensors",):
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{shard.name}: damaged, .* delete it and run the same compress again"):
        make_compressor().compress(make_batches(12), out=folder, fisher="block", ids=names)
    path.unlink()
    made = make_compressor().compress(make_batches(12), out=folder, fisher="block", ids=names)
    assert made.verify() == []
    assert files(folder) == before


def test_a_damaged_part_is_made_again(forks, place):
    """A batch that was done before its run was killed, and then changed."""
    options = {"batches": 12, "dtype": "int8"}
    assert forks.run("index", place / "whole", **options).status == 0
    folder = place / "idx"
    assert forks.run("index", folder, dies_at=29, **options).status == -9
    part = sorted(folder.glob("parts/0*"))[0]
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    process = forks.run("index", folder, **options)
    assert process.status == 1
    assert f"ValueError: {part}: damaged, and deleted; run it again to make it again" in process.text
    assert forks.run("index", folder, **options).status == 0
    assert files(folder) == files(place / "whole")
