"""Samples of an index stand in the order that they are given, whatever the batches that they were compressed in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

import dropinf
from dropinf.files import checksum, serialize
from dropinf.gradients import Gradients
from dropinf.index import order as module
from dropinf.index import verify
from dropinf.index.order import order_path
from dropinf.workload import order_of
from tests.index.small import KINDS, files, loss_fn, make_batches, make_compressor, make_model

SAMPLES = make_batches(1, rows=53)[0]


def ids(batch):
    return [f"é{float(x):.6f}" for x in batch[0][:, 0]]


class Batches(list):
    """Samples here and there, which say where each of them stands."""

    def __init__(self, seed: int = 0, samples=SAMPLES, size: int = 4) -> None:
        self.order = torch.randperm(len(samples[0]), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = [self.order[i : i + size] for i in range(0, len(self.order), size)]
        super().__init__([(samples[0][part], samples[1][part]) for part in parts])


@pytest.fixture(scope="module")
def rows():
    return make_compressor().compress([SAMPLES])


@pytest.fixture(scope="module", params=[None, torch.int8], ids=["float64", "int8"])
def index(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("order") / "idx"
    return make_compressor().compress(Batches(), out=folder, ids=ids, fisher="block", dtype=request.param)


@pytest.fixture(scope="module")
def kept(index, rows):
    """The rows as they are stored, in order."""
    assert float((index[:].flat - rows.flat).norm() / rows.flat.norm()) < 0.01
    return Gradients(index[:].flat, rows.shapes, rows.digest)


@pytest.fixture(scope="module")
def query():
    return make_compressor().compress(make_batches(2, 9))


def test_rows_and_ids_are_in_order(index, kept):
    assert index.verify() == []
    for some in (slice(None), slice(40, 3, -5), 17, -1, [3, 50, 3], torch.arange(53) % 3 == 0):
        assert torch.equal(index[some].flat, kept[some].flat)
        assert index.ids(some) == np.array(ids(SAMPLES))[some].reshape(-1).tolist()
    for size in (1, 7, 1000):
        blocks = list(index.blocks(size))
        assert [offset for offset, _ in blocks] == list(range(0, 53, size))
        assert torch.equal(torch.cat([part.flat for _, part in blocks]), kept.flat)
    found = torch.zeros_like(kept.flat)
    for rank in range(3):
        for offset, part in index.share(rank, 3).blocks(7):
            assert not found[offset : offset + len(part)].any()
            found[offset : offset + len(part)] = part.flat
    assert torch.equal(found, kept.flat)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_in_order(index, kept, query, kind, tmp_path):
    rounding = 1e-12 if kept.dtype == torch.float64 else 1e-4  # sums are of another order
    close = lambda a, b: torch.testing.assert_close(a.double(), b.double(), rtol=rounding, atol=rounding)  # noqa: E731
    fisher, expected = dropinf.build_fisher(index, kind), dropinf.build_fisher(kept, kind)
    close(dropinf.self_influence(index, fisher), dropinf.self_influence(kept, expected))
    for score_kind in ("influence", "dot", "cosine", "relative"):
        whole = dropinf.score(query, kept, expected, kind=score_kind)
        close(dropinf.score(query, index, fisher, kind=score_kind), whole)
        close(dropinf.score(query, index, fisher, kind=score_kind, out=tmp_path / "scores.npy"), whole)
        for largest in (True, False):
            best = dropinf.score(query, index, fisher, kind=score_kind, top=5, largest=largest)
            values, order = whole.sort(dim=1, descending=largest, stable=True)
            close(best.values, values[:, :5])
            assert torch.equal(best.indices, order[:, :5])


def test_equal_scores_are_those_of_the_lowest_positions(index, query):
    best = dropinf.score(Gradients(query.flat * 0, query.shapes, query.digest), index, kind="dot", top=6)
    assert best.indices.tolist() == [list(range(6))] * len(query)


def test_an_index_is_its_own_query_in_order(index, kept):
    found, wanted = dropinf.score(index, kept, kind="dot"), dropinf.score(kept, kept, kind="dot")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".faiss"])
def test_exports_are_in_order(index, kept, suffix, tmp_path):
    out = tmp_path / f"rows{suffix}"
    if suffix == ".faiss":
        faiss = pytest.importorskip("faiss")
    index.whitened(out)
    wanted = index.fisher().whiten(kept).flat.numpy()
    if suffix == ".npy":
        np.testing.assert_allclose(np.load(out), wanted, rtol=1e-4, atol=1e-6)
    if suffix == ".faiss":
        found = faiss.read_index(str(out)).reconstruct_n(0, 53)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert [json.loads(line) for line in (tmp_path / f"rows{suffix}.ids").read_text().splitlines()] == ids(SAMPLES)


def test_order_of_an_append_follows(rows, tmp_path):
    """In any combination with batches that are in order; what was there stays where it was."""
    more = make_batches(1, 5, rows=11)[0]
    later = make_compressor().compress([more])
    for first, second in ((Batches(), [more]), ([SAMPLES], Batches(1, more)), (Batches(), Batches(1, more))):
        folder = tmp_path / "idx"
        made = make_compressor()
        made.compress(first, out=folder)
        held = dropinf.Index.open(folder)
        index = made.compress(second, out=folder, append=True)
        both = Gradients.cat([rows, later])
        torch.testing.assert_close(index[:].flat, both.flat, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(held[:].flat, rows.flat, rtol=1e-9, atol=1e-12)  # opened before
        assert len(list(folder.glob("order-*"))) == 1
        assert verify(folder) == []
        before = files(folder)
        made.compress(first, out=folder)
        made.compress(second, out=folder, append=True)
        assert files(folder) == before
        shutil.rmtree(folder)


def test_an_interrupted_run_is_in_order(tmp_path):
    class Ended(Batches):
        def __getitem__(self, i):
            if i == 6:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    make_compressor().compress(Batches(), out=tmp_path / "whole", ids=ids)
    with pytest.raises(KeyboardInterrupt):
        make_compressor().compress(Ended(), out=tmp_path / "idx", ids=ids)
    make_compressor().compress(Batches(), out=tmp_path / "idx", ids=ids)
    assert files(tmp_path / "idx") == files(tmp_path / "whole")


def test_order_may_be_given(rows, tmp_path):
    batches = Batches()
    plain, numbers = list(batches), [100 * i + 7 for i in batches.order]
    for order in (numbers, torch.tensor(numbers), np.array(numbers)):
        found = make_compressor().compress(plain, order=order)
        torch.testing.assert_close(found.flat, rows.flat, rtol=1e-9, atol=1e-12)
    made = make_compressor().compress(plain, out=tmp_path / "idx", order=numbers)
    torch.testing.assert_close(made[:].flat, rows.flat, rtol=1e-9, atol=1e-12)
    assert torch.equal(make_compressor().compress(batches).flat, make_compressor().compress(plain).flat)
    assert torch.equal(order_of(plain, range(53)), torch.arange(53))
    for few in (range(3), range(1000)):
        with pytest.raises(ValueError, match=r"order: it is of .* samples, and the batches have 53"):
            make_compressor().compress(plain, out=tmp_path / f"few-{len(few)}", order=few)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ([0, 1, 1], ValueError, "order has a number twice"),
        ([0.5, 1.5], TypeError, "order is list; it must be whole numbers, one for each sample"),
        ([2, 1, 0], ValueError, "order: it is of 3 samples, and the batches have 53"),
    ],
)
def test_an_order_that_is_none(order, error, message, tmp_path):
    for options in ({}, {"out": tmp_path / "idx"}):
        with pytest.raises(error, match=message):
            make_compressor().compress([SAMPLES], order=order, **options)


X, Y = SAMPLES
DATA = TensorDataset(X, Y)


def few(batch):
    """Leave every second sample of a batch out."""
    return default_collate(batch[::2])


@pytest.mark.parametrize("count", [5, 52, 54])
@pytest.mark.parametrize("out", [True, False], ids=["index", "memory"])
@pytest.mark.parametrize("of", ["tensors", "samples", "loader", "loader that drops"])
def test_an_order_of_another_length_is_refused_before_anything_is_computed(count, out, of, tmp_path):
    size = 4 if of.endswith("drops") else 5
    batches = {
        "tensors": [(X[:30], Y[:30]), {"x": X[30:], "y": Y[30:]}],
        "samples": [[(X[i, :k], Y[i]) for k, i in enumerate(range(30), 1)], [{"x": X[i, :i]} for i in range(30, 53)]],
    }.get(of) or DataLoader(DATA, size, drop_last=of.endswith("drops"))
    computed = []

    def counted(model, batch):
        computed.append(batch)
        return loss_fn(model, batch)

    if of.endswith("drops") and count == 52:
        count = 53  # as many as there are before some are dropped
    options = {"out": tmp_path / "idx"} if out else {}
    compressor = dropinf.Compressor(make_model(), dropinf.Dropout(6), counted)
    message = f"order: it is of {count} samples, and the batches have {52 if of.endswith('drops') else 53}; "
    with pytest.raises(ValueError, match=message):
        compressor.compress(batches, order=range(count), **options)
    assert not computed
    assert not list(tmp_path.iterdir())


def test_an_order_is_not_refused_where_the_number_of_samples_is_not_known_before():
    """Some that a loader leaves out, those of a batch sampler and of a stream, where time stands first, and packed."""
    assert len(make_compressor().compress(DataLoader(DATA, 10, collate_fn=few), order=range(27))) == 27
    assert len(make_compressor().compress(DataLoader(DATA, batch_sampler=[[1, 2], [5]]), order=range(3))) == 3
    assert len(make_compressor().compress(iter([SAMPLES]), order=range(53))) == 53
    assert len(make_compressor().compress(DataLoader(DATA, 10, drop_last=True), order=range(50))) == 50
    turned = X[:36].reshape(3, 12, 12)
    first, packed = (lambda m, b: m(b[0]).sum((0, 2))), (lambda m, b: m(b[0]).sum(1).view(-1, 3).sum(1))
    edges = torch.arange(0, 37, 3, dtype=torch.int32)
    for loss, batch, options in ((first, turned, {}), (packed, X[:36], {"cu_seqlens": lambda _: edges})):
        compressor = dropinf.Compressor(make_model(), dropinf.Dropout(6), loss, **options)
        assert len(compressor.compress([(batch,)], order=range(12))) == 12


def test_a_damaged_order_is_an_error(tmp_path):
    index = make_compressor().compress(Batches(), out=tmp_path / "idx")
    path = next(index.path.glob("order-*"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\x01")
    assert index.verify() == [f"{path}: damaged, its bytes do not match their checksum; restore it from a copy"]
    with pytest.raises(ValueError, match="damaged, its bytes do not match their checksum"):
        dropinf.Index.open(index.path)
    path.unlink()
    assert index.verify() == [f"{path}: missing"]
    with pytest.raises(ValueError, match="missing, the order of the samples"):
        dropinf.Index.open(index.path)


@pytest.mark.parametrize(
    "positions", [torch.arange(52), torch.zeros(53).long(), torch.arange(53) - 1, torch.arange(53.0), torch.arange(54)]
)
def test_an_order_that_is_not_one_of_the_samples_is_an_error(positions, tmp_path):
    index = make_compressor().compress(Batches(), out=tmp_path / "idx")
    data = serialize({"positions": positions}, {})
    order_path(index.path, checksum(data)).write_bytes(data)
    replace(index.manifest, order=checksum(data)).save(index.path)
    with pytest.raises(ValueError, match="it is not the order of the 53 samples"):
        dropinf.Index.open(index.path)


def test_an_order_that_is_replaced_while_it_is_opened(rows, tmp_path, monkeypatch):
    more = make_batches(1, 5, rows=11)[0]
    make_compressor().compress(Batches(), out=tmp_path / "idx")
    read, calls = module.read_order, []

    def late(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            monkeypatch.setattr(module, "read_order", read)
            dropinf.Compressor(make_model(), dropinf.Dropout(6), loss_fn).compress(
                Batches(1, more), out=tmp_path / "idx", append=True
            )
        return read(*arguments)

    monkeypatch.setattr(module, "read_order", late)
    assert len(dropinf.Index.open(tmp_path / "idx")) == 64
    assert len(calls) == 1
