"""Pickles, deep copies and torch.save of results: what comes back is equal, and can be used as before."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from dropinf.readonly import ReadOnly

KINDS = ("block", "joint", "diagonal", "kronecker")


def through_torch(x, weights_only):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


WAYS = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "old pickle": lambda x: pickle.loads(pickle.dumps(x, 2)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch": lambda x: through_torch(x, False),
    "torch, weights alone": lambda x: through_torch(x, True),
}
SKETCHES = {
    "dropout": dropinf.Dropout(3),
    "rotated": dropinf.Dropout(2, rank=4),
    "flat": dropinf.Dropout(7, mode="flat"),
    "sjlt": dropinf.SJLT(3),
    "gaussian": dropinf.Gaussian(3),
    "pca": dropinf.PCA(2),
    "identity": dropinf.Identity(),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make(sketch=SKETCHES["dropout"]):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    batches = [(torch.randn(9, 5), torch.randint(0, 3, (9,))) for _ in range(4)]
    compressor = dropinf.Compressor(model, sketch, loss_fn)
    if sketch in (SKETCHES["pca"], SKETCHES["rotated"]):
        compressor.calibrate(batches)
    return compressor, compressor.compress(batches)


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients(way, dtype):
    rows = make()[1].to(dtype)
    found = way(rows)
    assert torch.equal(found.flat, rows.flat)
    assert (found.flat.dtype, list(found.shapes), found.shapes) == (dtype, list(rows.shapes), rows.shapes)
    assert (found.digest, found["0"].shape) == (rows.digest, rows["0"].shape)
    found.check_same_sketch(rows)
    with pytest.raises(TypeError):
        found.shapes["0"] = (1,)
    assert {name: x.tolist() for name, x in way(rows.layers).items()} == {n: x.tolist() for n, x in rows.layers.items()}


def test_a_part_of_gradients_takes_no_more_than_its_rows():
    wide = torch.randn(1000, 200)
    rows = dropinf.Gradients(wide, {"a": (10, 20)}, {"a": "aa"})[300:303]
    assert len(pickle.dumps(rows)) < 2 * rows.flat.nbytes
    assert torch.equal(pickle.loads(pickle.dumps(rows)).flat, wide[300:303])
    assert rows.flat.data_ptr() == wide[300:].data_ptr()


def test_a_deep_copy_shares_nothing():
    rows = make()[1]
    found = copy.deepcopy(rows)
    rows.flat.zero_()
    assert found.flat.any()


@ways
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [5, 36], ids=["rows", "sums"])
@pytest.mark.parametrize("solved", [False, True])
def test_fisher(way, kind, count, solved):
    rows = make()[1]
    fisher = dropinf.build_fisher(rows[:count], kind, "auto")
    if solved:
        fisher.solve(rows)
    found = way(fisher)
    assert (found.kind, found.damping, found.absolute, found.count) == (kind, "auto", False, count)
    assert torch.equal(found.solve(rows).flat, fisher.solve(rows).flat)
    if way is not copy.copy:  # which shares the sums
        assert torch.equal(found.update(rows[3:9]).solve(rows).flat, fisher.update(rows[3:9]).solve(rows).flat)


@ways
def test_a_fisher_without_samples(way):
    rows = make()[1]
    found = way(dropinf.Fisher("kronecker", 0.3, absolute=True))
    assert (found.count, found.absolute) == (0, True)
    expected = dropinf.Fisher("kronecker", 0.3, absolute=True).update(rows)
    assert torch.equal(found.update(rows).solve(rows).flat, expected.solve(rows).flat)


@ways
def test_top(way):
    rows = make()[1]
    best = dropinf.score(rows[:3], rows, kind="dot", top=4)
    found = way(best)
    assert isinstance(found, dropinf.TopK)
    assert torch.equal(found.values, best.values)
    assert torch.equal(found.indices, best.indices)


@ways
def test_parts_of_scores(way):
    rows = make()[1]
    parts = dropinf.score(rows[:3], rows, kind="dot", by="layer")
    for _ in range(2):  # before and after a part was looked up
        found = way(parts)
        assert isinstance(found, dropinf.ScoreParts)
        assert found.names == parts.names
        assert torch.equal(found["0"], parts["0"])


@ways
@pytest.mark.parametrize("name", SKETCHES)
def test_layers_and_axes(way, name):
    compressor, _ = make(SKETCHES[name])
    found = way(compressor.layers)
    assert list(found) == list(compressor.layers)
    assert way(compressor.skipped) == compressor.skipped
    for layer, expected in compressor.layers.items():
        for plan in (found[layer], way(expected)):
            assert (plan.kind, plan.shape, plan.route) == (expected.kind, expected.shape, expected.route)
            gradient = torch.randn(2, *expected.shape)
            assert torch.equal(plan.compress_exact(gradient), expected.compress_exact(gradient))
        axis = way(expected.out_axis)
        assert (axis.digest(), axis.group) == (expected.out_axis.digest(), expected.out_axis.group)


def test_a_pickle_of_gradients_that_do_not_fit_is_refused():
    """As where they are made: a file may come from elsewhere."""
    kind, (flat, shapes, digest, _) = make()[1].__reduce__()
    with pytest.raises(ValueError, match="the shapes' total size"):
        kind(flat[:, 1:].contiguous(), shapes, digest)


def test_a_read_only_mapping():
    items = {"b": 1, "a": 2}
    view = ReadOnly(items)
    assert (list(view), len(view), view["a"], "c" in view, repr(view)) == (["b", "a"], 2, 2, False, repr(items))
    assert view == items == copy.deepcopy(view)
    assert (view | {"c": 3}, {"c": 3, "a": 0} | view) == ({"b": 1, "a": 2, "c": 3}, {"c": 3, "a": 2, "b": 1})
    assert [list(reversed(x)) for x in (view, view.keys(), view.items())] == [
        ["a", "b"],
        ["a", "b"],
        [("a", 2), ("b", 1)],
    ]
    items["c"] = 3
    assert view["c"] == 3
    for change in (lambda: view.__setitem__("a", 1), lambda: view.clear()):
        with pytest.raises(AttributeError):
            change()
