"""Rows whitened for other search tools: files of every kind, with their ids, and indexes that FAISS trains."""

from __future__ import annotations

import json

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dropinf
from dropinf.index.export import Export, near
from tests.index.small import make_batches, make_compressor, names

faiss.omp_set_num_threads(1)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """599 samples: as many as 16 lists and codes of 4 bits need."""
    batches = make_batches(100, 3)
    return make_compressor().compress(batches, out=tmp_path_factory.mktemp("index") / "idx", ids=names, fisher="block")


def searched(path, queries, top, probes=None):
    found = faiss.read_index(str(path))
    if probes is not None:
        faiss.ParameterSpace().set_index_parameter(found, "nprobe", probes)
    return found.search(queries.float().numpy(), top)


def test_an_export_is_exact(index, train, query, tmp_path):
    fisher, expected = index.fisher(), dropinf.score(query, train, dropinf.build_fisher(train))
    queries = fisher.whiten(query).flat
    index.whitened(tmp_path / "rows.npy")
    index.whitened(tmp_path / "rows.safetensors", fisher)
    for rows in (torch.from_numpy(np.load(tmp_path / "rows.npy")), load_file(tmp_path / "rows.safetensors")["rows"]):
        torch.testing.assert_close(queries @ rows.T, expected)
    index.whitened(tmp_path / "rows.faiss")
    values, found = searched(tmp_path / "rows.faiss", queries, 6)
    best = dropinf.score(query, index, fisher, top=6)
    assert np.array_equal(found, best.indices.numpy())
    np.testing.assert_allclose(values, best.values, rtol=1e-4)
    with pytest.raises(ValueError, match=r"out is .*rows.txt.*must end in .npy, .safetensors or .faiss"):
        index.whitened(tmp_path / "rows.txt")
    files = ["rows.faiss", "rows.npy", "rows.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files + [f"{name}.ids" for name in files])
    for name in files:
        lines = (tmp_path / f"{name}.ids").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == index.ids()


def test_a_flat_file_is_that_of_faiss(index, tmp_path, monkeypatch):
    """Written in parts, and the same where this faiss would write another header than the one that is known."""
    index.whitened(tmp_path / "parts.faiss", factory="Flat")
    expected = faiss.IndexFlatIP(index[:1].flat.shape[1])
    for _, part in index.blocks(7):
        expected.add(index.fisher().whiten(part).flat.float().numpy())
    assert (tmp_path / "parts.faiss").read_bytes() == faiss.serialize_index(expected).tobytes()
    monkeypatch.setattr(Export, "_flat_header", lambda self: None)
    index.whitened(tmp_path / "whole.faiss")
    assert (tmp_path / "whole.faiss").read_bytes() == (tmp_path / "parts.faiss").read_bytes()


@pytest.mark.parametrize(
    ("factory", "least"),
    [("IVF16,Flat", 1), ("SQ8", 0.9), ("IVF8,PQ14x4", 0.3), ("OPQ14,IVF4,PQ14x4", 0.3), ("HNSW8", 0.7)],
)
def test_what_faiss_trains_finds_the_best(large, factory, least, tmp_path):
    query = make_compressor().compress(make_batches(4, 9))
    large.whitened(tmp_path / "rows.faiss", factory=factory)
    made = faiss.read_index(str(tmp_path / "rows.faiss"))
    assert (made.ntotal, made.metric_type, made.is_trained) == (len(large), faiss.METRIC_INNER_PRODUCT, True)
    best = dropinf.score(query, large, large.fisher(), top=10).indices.tolist()
    probes = 16 if "IVF" in factory else None
    found = searched(tmp_path / "rows.faiss", large.fisher().whiten(query).flat, 10, probes)[1].tolist()
    shared = sum(len(set(a) & set(b)) for a, b in zip(found, best, strict=True)) / (10 * len(best))
    assert shared >= least
    if factory == "IVF16,Flat":
        assert found == best


def test_training_reads_a_random_part(large, tmp_path, monkeypatch):
    """As many rows as memory has room for, from everywhere; all are added."""
    seen = []
    whiten = dropinf.Fisher.whiten
    monkeypatch.setattr(dropinf.Fisher, "whiten", lambda self, rows: seen.append(len(rows)) or whiten(self, rows))
    width = large[:1].flat.shape[1]
    small = dropinf.Index.open(large.path, memory_bytes=32 * 8 * width)
    monkeypatch.setattr(Export, "_check_size", lambda self, coded: None)
    chosen = []
    monkeypatch.setattr(
        Export, "_chosen", lambda self, coded, f=Export._chosen: chosen.append(f(self, coded)) or chosen[0]
    )
    small.whitened(tmp_path / "rows.faiss", factory="IVF2,SQ8")
    (positions,) = chosen
    assert 4 <= len(positions) <= small.block_bytes * 16 // 8 // (4 * width)
    assert positions.tolist() == sorted(set(positions.tolist()))
    assert positions.max() > len(large) / 2 > positions.min()
    assert sum(seen) == len(positions) + len(large)
    assert faiss.read_index(str(tmp_path / "rows.faiss")).ntotal == len(large)


def test_positions_are_split_into_neighbours():
    positions = torch.tensor([0, 3, 4, 6, 9, 17, 18, 40])
    assert [part.tolist() for part in near(positions, 5)] == [[0, 3, 4], [6, 9], [17, 18], [40]]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nonsense", r"factory: FAISS makes no 'nonsense' of \d+ columns \(could not parse index string nonsense\)"),
        ("PQ9999", "factory: FAISS makes no 'PQ9999' of "),
        ("IVF4096,PQ14x4", r"factory: FAISS cannot train 'IVF4096,PQ14x4' on 599 of 599 rows .*name fewer lists"),
        ("", "factory: FAISS makes no ''"),
    ],
)
def test_a_factory_that_faiss_refuses(large, factory, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        large.whitened(tmp_path / "rows.faiss", factory=factory)
    assert list(tmp_path.iterdir()) == []


def test_a_factory_is_of_faiss_alone_and_fits_in_memory(large, tmp_path):
    with pytest.raises(ValueError, match=r"factory is 'IVF4,Flat'; it is of a .faiss file, and out is .*rows.npy"):
        large.whitened(tmp_path / "rows.npy", factory="IVF4,Flat")
    small = dropinf.Index.open(large.path, memory_bytes=1 << 16)
    with pytest.raises(
        ValueError, match=r"'IVF4,Flat' holds \d+ bytes a row in memory .* with memory_bytes=(\d+), or"
    ) as e:
        small.whitened(tmp_path / "rows.faiss", factory="IVF4,Flat")
    need = int(str(e.value).partition("memory_bytes=")[2].partition(",")[0])
    dropinf.Index.open(large.path, memory_bytes=need + 15).whitened(tmp_path / "rows.faiss", factory="IVF4,Flat")
    small.whitened(tmp_path / "rows.faiss")  # a flat one is never in memory


def test_ids_are_never_those_of_another_file(index, large, tmp_path, monkeypatch):
    large.whitened(tmp_path / "rows.npy")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(self, rows):
        raise MemoryError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(dropinf.Fisher, "whiten", fail)
        with pytest.raises(MemoryError):
            index.whitened(tmp_path / "rows.npy")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_ids_of_an_index_without_are_positions(tmp_path):
    made = make_compressor().compress(make_batches(2), out=tmp_path / "idx", fisher="diagonal")
    made.whitened(tmp_path / "rows.npy")
    assert (tmp_path / "rows.npy.ids").read_text().split() == [f'"{i}"' for i in range(len(made))]
