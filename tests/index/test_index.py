"""Gradients on disk: everything that takes Gradients gives the same of an Index, and what is wrong is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dropinf
from dropinf.index.ahead import read_ahead
from dropinf.index.codec import Codec
from tests.index.small import KINDS, make_batches, make_compressor, names


def test_an_index_holds_what_compress_returns(index, train):
    assert torch.equal(index[:].flat, train.flat)
    assert (index.shapes, dict(index.digest), len(index), index.dtype) == (
        train.shapes,
        dict(train.digest),
        len(train),
        train.dtype,
    )
    assert index.bytes_per_sample == train.bytes_per_sample
    assert index.verify() == []


@pytest.mark.parametrize(
    "rows",
    [
        3,
        -1,
        slice(2, 40, 7),
        slice(5, 2),
        slice(None, None, -1),
        [4, 0, 4, -2],
        [],
        torch.tensor([31, 7]),
        np.array([8, 1]),
    ],
)
def test_samples_are_selected_as_from_gradients(index, train, rows):
    expected = train.flat[[rows]] if isinstance(rows, int) else torch.from_numpy(train.flat.numpy()[rows].copy())
    assert torch.equal(index[rows].flat, expected)


def test_a_mask_selects_samples(index, train):
    mask = torch.arange(len(train)) % 3 == 1
    assert torch.equal(index[mask].flat, train.flat[mask])
    assert index.ids(mask) == [index.ids()[i] for i in mask.nonzero().flatten().tolist()]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (99, IndexError, "sample 99 is out of range for 54 samples"),
        ([0, -55], IndexError, "sample -55 is out of range"),
        (torch.ones(3, dtype=torch.bool), IndexError, r"a mask of shape \(3,\) selects from 54 samples"),
        ([0.5], IndexError, "whole numbers"),
        ("0.weight", TypeError, "by samples, not by layer '0.weight'"),
    ],
)
def test_samples_that_are_not_there(index, rows, error, message):
    with pytest.raises(error, match=message):
        index[rows]


@pytest.mark.parametrize("rows", [1, 4, 5, 11, 1000])
def test_blocks_cover_every_sample_in_order(index, train, rows):
    parts = list(index.blocks(rows))
    assert [offset for offset, _ in parts] == np.cumsum([0, *(len(p) for _, p in parts)])[:-1].tolist()
    assert max(len(p) for _, p in parts) <= rows
    assert torch.equal(torch.cat([p.flat for _, p in parts]), train.flat)
    stored = list(index.stored_blocks(rows))
    assert torch.equal(torch.cat([x.values for _, x in stored]), train.flat)
    with pytest.raises(ValueError, match="rows is 0"):
        next(index.blocks(0))


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_ranks_are_the_whole(index, train, world):
    found = torch.zeros_like(train.flat)
    for rank in range(world):
        for offset, part in index.share(rank, world).blocks(4):
            assert not found[offset : offset + len(part)].any()
            found[offset : offset + len(part)] = part.flat
    assert torch.equal(found, train.flat)


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_and_scores_are_those_of_memory(index, train, query, kind, tmp_path):
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)  # noqa: E731
    fisher, expected = dropinf.build_fisher(index, kind), dropinf.build_fisher(train, kind)
    close(fisher.solve(query).flat, expected.solve(query).flat)
    close(dropinf.self_influence(index, fisher), dropinf.self_influence(train, expected))
    for score_kind in ("influence", "dot", "cosine", "relative"):
        whole = dropinf.score(query, train, expected, kind=score_kind)
        close(dropinf.score(query, index, fisher, kind=score_kind), whole)
        for largest in (True, False):
            best = dropinf.score(query, index, fisher, kind=score_kind, top=5, largest=largest)
            values, order = whole.sort(dim=1, descending=largest, stable=True)
            close(best.values, values[:, :5])
            assert torch.equal(best.indices, order[:, :5])
        mapped = dropinf.score(query, index, fisher, kind=score_kind, out=tmp_path / "scores.npy")
        close(mapped, whole)
        close(torch.from_numpy(np.load(tmp_path / "scores.npy")), whole)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.npy"]
    close(dropinf.score(index, train, expected), dropinf.score(train, train, expected))  # as queries too


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-7), (torch.bfloat16, 2e-3), (torch.float16, 3e-4), (torch.int8, 0.015)]
)
def test_stored_dtypes(train, query, dtype, error, tmp_path):
    index = make_compressor().compress(make_batches(), out=tmp_path / "idx", dtype=dtype)
    decoded = index[:].flat.double()
    assert 0 < (decoded - train.flat).norm() / train.flat.norm() < error
    # Scores from stored rows are those of the decoded ones.
    kept = dropinf.Gradients(decoded, train.shapes, train.digest)
    fisher = dropinf.build_fisher(kept)
    small = query.to(torch.float32)
    for kind in ("influence", "dot", "cosine", "relative"):
        expected = dropinf.score(query, kept, fisher, kind=kind)
        tolerance = 2e-5 * expected.abs().max().item()
        for queries in (query, small):
            found = dropinf.score(queries, index, fisher, kind=kind).double()
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
            best = dropinf.score(queries, index, fisher, kind=kind, top=4)
            torch.testing.assert_close(best.values.double(), expected.topk(4).values, rtol=0, atol=tolerance)


def test_scales_hold_rows_and_layers_of_any_size():
    torch.manual_seed(0)
    flat = torch.randn(6, 7, dtype=torch.float64) * torch.tensor([1e-12, 1e-6, 1, 1e3, 1e9, 0]).double().unsqueeze(1)
    half = Codec("float16", ("a",), (7,))
    kept = half.encode(flat)
    assert torch.allclose(half.decode(kept["gradients"], kept["scale"]).double(), flat, rtol=1e-3, atol=0)
    # One layer a million times smaller than its neighbour keeps its own seven bits.
    flat[:, 3:] *= 1e-6
    int8 = Codec("int8", ("a", "b"), (3, 4))
    kept = int8.encode(flat)
    back = int8.decode(kept["gradients"], kept["scale"]).double()
    for columns in (slice(0, 3), slice(3, 7)):
        error = (back - flat)[:5, columns].norm(dim=1) / flat[:5, columns].norm(dim=1)
        assert error.max() < 0.05
    assert not back[5].any()


def test_ids(index, tmp_path):
    assert index.ids() == [name for batch in make_batches() for name in names(batch)]
    assert index.ids([7, 0]) == [index.ids()[7], index.ids()[0]]
    plain = make_compressor().compress(make_batches(2), out=tmp_path / "idx")
    assert plain.ids([3, 10]) == ["3", "10"]


def test_bad_arguments(index, train, tmp_path):
    compressor = make_compressor()
    with pytest.raises(ValueError, match="batches: it is empty"):
        compressor.compress([], out=tmp_path / "idx")
    with pytest.raises(ValueError, match="batches: it is empty"):
        compressor.compress(iter([]), out=tmp_path / "idx")
    with pytest.raises(
        TypeError, match="ids is a list; it must be a function of a batch that returns a string for each"
    ):
        compressor.compress(make_batches(), out=tmp_path / "list", ids=["a", "b"])
    assert not (tmp_path / "list").exists()
    with pytest.raises(ValueError, match="out is None; dtype, fisher, ids, append and group are of an index"):
        compressor.compress(make_batches(), ids=names)
    with pytest.raises(ValueError, match="fisher has 54 samples; pass an empty one"):
        compressor.compress(make_batches(), out=tmp_path / "idx", fisher=dropinf.build_fisher(train))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"no index and not empty \(it has 'thesis.tex'\)"):
        compressor.compress(make_batches(), out=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no index"):
        dropinf.Index.open(tmp_path / "other")
    with pytest.raises(ValueError, match="memory_bytes is 100; 32 rows of this index alone take"):
        dropinf.Index.open(index.path, memory_bytes=100)
    with pytest.raises(ValueError, match=r"holds others' gradients \(the first batch is another\); pass append=True"):
        compressor.compress(make_batches(2, 8), out=index.path, ids=names)
    with pytest.raises(ValueError, match="out is for the whole matrix"):
        dropinf.score(train, index, kind="dot", top=3, out=tmp_path / "scores.npy")
    with pytest.raises(FileNotFoundError, match="no Fisher matrix in it"):
        make_compressor().compress(make_batches(2), out=tmp_path / "idx").fisher()


def test_reading_ahead_keeps_order_and_errors():
    def read(job):
        if job == 3:
            raise OSError("gone")
        return 10 * job

    assert list(read_ahead(read, iter([1, 2]))) == [10, 20]
    with pytest.raises(OSError, match="gone"):
        list(read_ahead(read, iter([1, 3, 2])))
