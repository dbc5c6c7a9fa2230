"""An order of samples, where an index that has one goes on: appends, merges, what is given up, older versions."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

import dropinf
from dropinf.files import write_whole
from dropinf.gradients import Gradients
from dropinf.index import verify
from dropinf.index.order import order_path
from tests.index.fixtures import make_fixtures as made
from tests.index.small import files, loss_fn, make_batches, make_compressor
from tests.index.test_old_files import FIXTURES
from tests.index.test_order import SAMPLES, Batches, ids
from tests.index.test_runs import StopError

PARTS = [make_batches(1, 20 + k, rows=9 + k)[0] for k in range(4)]
DTYPES = [None, torch.int8]


def ordered(k: int) -> Batches:
    return Batches(k, PARTS[k], size=2)


class Late(Batches):
    """Batches, of which the third never comes."""

    def __getitem__(self, i):
        if i == 2:
            raise StopError
        return super().__getitem__(i)


def expected(parts, dtype=None) -> Gradients:
    """The rows of samples in order, as they are read."""
    flat = make_compressor().compress(parts)
    if dtype is None:
        return flat
    kept = dropinf.index.codec.Codec("int8", tuple(flat.shapes), tuple(x[0].numel() for x in flat.layers.values()))
    stored = kept.encode(flat.flat)
    return Gradients(kept.decode(stored["gradients"], stored.get("scale")), flat.shapes, flat.digest)


def holds(index, parts, dtype=None) -> None:
    """What an index has is what its samples' batches give, in order, and it is sound."""
    torch.testing.assert_close(index[:].flat, expected(parts, dtype).flat, rtol=1e-4, atol=1e-9)
    assert index.ids() == [name for part in parts for name in ids(part)]
    assert verify(index.path) == []
    assert index.fisher().count == len(index)
    assert len(list(index.path.glob("order-*"))) == 1


def appended(folder, dtype=None, count=3):
    for k in range(count):
        batches = [PARTS[k]] if k == 1 else ordered(k)  # one whose samples are in order
        index = make_compressor().compress(batches, out=folder, ids=ids, dtype=dtype, append=k > 0, fisher="block")
    return index


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_keeps_the_order(dtype, tmp_path):
    index = appended(tmp_path / "idx", dtype)
    before = index[:].flat
    assert index.info()["shards"] > 3
    index.compact()
    assert index.info()["shards"] == 1
    for found in (index, dropinf.Index.open(index.path)):
        holds(found, PARTS[:3], dtype)
        assert torch.equal(found[:].flat, before)
    kept = files(index.path)
    for k, batches in ((0, ordered(0)), (1, [PARTS[1]]), (2, ordered(2))):
        for kind in (list, iter):
            make_compressor().compress(
                kind(batches), out=index.path, ids=ids, append=True, order=getattr(batches, "order", None)
            )
            assert files(index.path) == kept, k
    index = make_compressor().compress(ordered(3), out=index.path, ids=ids, append=True, fisher="block")
    holds(index, PARTS, dtype)
    index.compact()
    holds(dropinf.Index.open(index.path), PARTS, dtype)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", [list, iter])
def test_the_same_batches_in_another_order_are_refused(merged, kind, tmp_path):
    index = appended(tmp_path / "idx")
    if merged:
        index.compact()
    before = files(index.path)
    orders = {0: [None, [*reversed(ordered(0).order)]], 1: [[*reversed(range(10))]], 2: [None]}
    for k, others in orders.items():
        for order in others:
            batches = [PARTS[1]] if k == 1 else list(ordered(k))
            with pytest.raises(ValueError, match="order: the samples of these batches stand in another order in"):
                make_compressor().compress(kind(batches), out=index.path, ids=ids, append=True, order=order)
            if kind is iter and files(index.path) != before:
                dropinf.Index.open(index.path).discard()
            assert files(index.path) == before
    with pytest.raises(ValueError, match="order: it is of 2 samples, and the batches have 9"):
        make_compressor().compress(list(ordered(0)), out=index.path, ids=ids, order=[1, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_append_with_an_order_is_given_up(dtype, tmp_path):
    index = appended(tmp_path / "idx", dtype, 2)
    before = files(index.path)
    with pytest.raises(StopError):
        make_compressor().compress(Late(2, PARTS[2], size=2), out=index.path, ids=ids, append=True)
    index = dropinf.Index.open(index.path)
    index.discard()
    assert files(index.path) == before
    holds(index, PARTS[:2], dtype)
    holds(
        make_compressor().compress(ordered(2), out=index.path, ids=ids, append=True, fisher="block"), PARTS[:3], dtype
    )


@pytest.mark.parametrize("then", ["discard", "finish", "compact"])
@pytest.mark.parametrize("step", range(3))
def test_ended_while_an_order_is_replaced(then, step, tmp_path, monkeypatch):
    """Before the file of the order, that of the Fisher matrix, or the manifest: the index is that of before."""
    index = appended(tmp_path / "idx", count=2)
    before = files(index.path)
    with pytest.raises(StopError):
        make_compressor().compress(Late(2, PARTS[2], size=2), out=index.path, ids=ids, append=True)
    calls = []

    def stopping(path, data):
        calls.append(path)
        if len(calls) > step:
            raise SystemExit
        write_whole(path, data)

    with monkeypatch.context() as patch:
        for name in ("order", "kept", "manifest"):
            patch.setattr(f"dropinf.index.{name}.write_whole", stopping)
        with pytest.raises(SystemExit):
            make_compressor().compress(ordered(2), out=index.path, ids=ids, append=True, fisher="block")
    now = dropinf.Index.open(index.path)
    assert torch.equal(now[:].flat, index[:].flat)
    assert [line for line in now.verify() if "not finished" not in line] == []
    if then == "finish":
        now = make_compressor().compress(ordered(2), out=index.path, ids=ids, append=True, fisher="block")
        holds(now, PARTS[:3])
        return
    if then == "compact":
        with pytest.raises(ValueError, match="a run is not finished"):
            now.compact()
    now.discard()
    assert files(index.path).keys() == before.keys()
    assert now.verify() == []
    assert now.ids() == [name for part in PARTS[:2] for name in ids(part)]


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_an_append_with_an_order_to_an_index_of_the_first_version(kind, tmp_path):
    folder, data = shutil.copytree(FIXTURES / kind, tmp_path / "idx"), made.Data(FIXTURES)
    before = dropinf.Index.open(folder)
    rows, names, count = before[:].flat, before.ids(), len(before)
    order = [*reversed(range(sum(len(made.names(batch)) for batch in data.queries)))]
    for merge in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of what loss its rows are is not known
            warnings.filterwarnings("ignore", "[^:]*: it keeps no first batch")
            index = data.compressor().compress(data.queries, out=folder, ids=made.names, append=True, order=order)
        if merge:
            index.compact()
        assert torch.equal(index[:count].flat, rows)
        assert index.ids() == [*names, *reversed([name for batch in data.queries for name in made.names(batch)])]
        plain = data.compressor().compress(data.queries)[[*order]].flat
        near = 1e-5 if kind == "float32" else 2e-2
        assert float((index[count:].flat - plain).norm() / plain.norm()) < near
        assert index.verify() == []
        assert index.origin.model == data.compressor().origin().model
    data.compressor().compress(data.first, out=folder, ids=made.names)


def test_an_index_of_the_first_version_gets_an_origin(tmp_path):
    folder, data = shutil.copytree(FIXTURES / "float32", tmp_path / "idx"), made.Data(FIXTURES)
    index = data.compressor().compress(data.first, out=folder, ids=made.names)
    assert index.origin == data.compressor().origin()
    dropinf.score(data.query(), index, kind="dot")


def twice(model, batch):
    return 2 * loss_fn(model, batch)


def same(model, batch):
    return loss_fn(model, batch) + 0


def test_losses_of_an_append_and_of_a_rerun(tmp_path):
    """An append of another loss is refused; a rerun is compared by its rows, whatever the loss is called."""
    model = make_compressor().model
    index = appended(tmp_path / "idx", count=1)
    for loss in (loss_fn, same, twice):
        made = dropinf.Compressor(model, dropinf.Dropout(6), loss)
        if loss is twice:
            with pytest.raises(ValueError, match="computed again, has other gradients"):
                made.compress(ordered(0), out=index.path, ids=ids)
        else:
            made.compress(ordered(0), out=index.path, ids=ids)
    with pytest.raises(ValueError, match=r"loss_fn: it is .*\.twice .*, and .* was made with .*\.loss_fn "):
        made.compress(ordered(1), out=index.path, ids=ids, append=True)


@pytest.mark.parametrize("merged", [False, True])
def test_another_model_is_refused(merged, tmp_path):
    index = appended(tmp_path / "idx")
    if merged:
        index.compact()
    compressor = make_compressor()
    with torch.no_grad():
        compressor.model[2].bias[1] += 1e-3
    for batches in (ordered(0), ordered(3), [SAMPLES]):
        with pytest.raises(ValueError, match="was made with other weights of the model"):
            compressor.compress(batches, out=index.path, ids=ids, append=True)
    assert index.origin == make_compressor().origin()


def test_a_merge_says_what_is_wrong_with_an_order(tmp_path):
    """It changes no order, so that a damaged one can be restored afterwards."""
    index = appended(tmp_path / "idx")
    path = order_path(index.path, index.manifest.order)
    data = path.read_bytes()
    path.unlink()
    index.compact()
    assert index.verify() == [f"{path}: missing"]
    with pytest.raises(ValueError, match="missing, the order of the samples"):
        dropinf.Index.open(index.path)
    path.write_bytes(data)
    holds(dropinf.Index.open(index.path), PARTS[:3])
