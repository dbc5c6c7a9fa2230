"""choose(): dims for a budget of bytes, against what is stored and against uncompressed gradients."""

from __future__ import annotations

import math

import pytest
import torch

import dropinf
from dropinf import budget
from models import build


def setting(name="sequence_mlp", n=4):
    model, batch, loss_fn = build(name)
    return model, [batch] * (n // 4), loss_fn


@pytest.mark.parametrize("name", ["sequence_mlp", "cnn", "tied", "raw_parameters"])
@pytest.mark.parametrize(
    ("allocate", "budget_bytes"), [("norm", 400), ("energy", 3000), ("equal", 3000), ("norm", 10**9)]
)
def test_what_is_stored_fits_the_budget(name, allocate, budget_bytes):
    model, batches, loss_fn = setting(name)
    choice = dropinf.choose(model, batches, loss_fn, budget_bytes=budget_bytes, allocate=allocate)
    compressor = dropinf.Compressor(model, choice.sketch, loss_fn)
    compressor.calibrate(batches)
    gradients = compressor.compress(batches)
    assert {layer.name: layer.dims for layer in choice.layers} == dict(gradients.shapes)
    stored = sum(map(math.prod, gradients.shapes.values()))
    assert 4 * stored == choice.bytes_per_sample <= budget_bytes
    whole = sum(math.prod(layer.shape) for layer in choice.layers)
    if stored < whole and allocate != "equal":
        assert 4 * stored > 0.4 * budget_bytes
    if budget_bytes == 10**9:
        assert stored == whole
        assert choice.captured == pytest.approx(1)


def test_shares_and_kept_are_those_of_uncompressed_gradients():
    model, batches, loss_fn = setting("sequence_mlp", 400)
    torch.manual_seed(0)
    batches = [torch.randn_like(b) for b in batches]
    choice = dropinf.choose(model, batches, loss_fn, budget_bytes=200)
    exact = dropinf.compress(model, batches, loss_fn, dropinf.Identity())
    compressor = dropinf.Compressor(model, choice.sketch, loss_fn)
    compressor.calibrate(batches)
    kept = compressor.compress(batches)
    squares = {n: float(exact[n].double().square().sum()) for n in exact.layers}
    for layer in choice.layers:
        assert layer.share == pytest.approx(squares[layer.name] / sum(squares.values()), abs=0.02)
        want = float(kept[layer.name].double().square().sum()) / squares[layer.name]
        assert layer.captured == pytest.approx(want, rel=0.1)
    assert 0 < choice.captured < 1


def test_larger_gradients_get_more():
    model, batches, loss_fn = setting()
    by = {a: dropinf.choose(model, batches, loss_fn, budget_bytes=200, allocate=a) for a in ("norm", "energy", "equal")}
    largest = max(by["norm"].layers, key=lambda layer: layer.share).name
    size = {a: next(math.prod(x.dims) for x in c.layers if x.name == largest) for a, c in by.items()}
    assert size["energy"] >= size["norm"] >= size["equal"]
    assert size["energy"] > size["equal"]


def test_is_deterministic_and_shows_a_table():
    model, batches, loss_fn = setting()
    first, second = (dropinf.choose(model, batches, loss_fn, budget_bytes=400, seed=3) for _ in range(2))
    assert str(first) == str(second)
    lines = str(first).splitlines()
    assert len(lines) == len(first.layers) + 2
    assert lines[-1].startswith(f"{first.bytes_per_sample} bytes per sample; ")
    assert all(layer.name in line for layer, line in zip(first.layers, lines[1:], strict=False))


@pytest.mark.parametrize(
    ("shape", "values"), [((100, 100), 64), ((10, 1000), 640), ((1000, 10), 640), ((3, 4), 12), ((50, 7), 1)]
)
def test_dims_use_their_share(shape, values):
    rows, columns = budget._dims(shape, values, 1)
    assert rows * columns <= values
    assert rows * columns > values - max(rows, columns) or (rows, columns) == shape
    rows, columns = budget._dims(shape, values, 8)
    for dim, size in zip((rows, columns), shape, strict=True):
        assert dim % 8 == 0 or dim < 8 or dim == size


def test_a_name_with_special_characters_is_matched_as_it_is():
    assert dropinf.Dropout({budget._literal("a[0].*"): 3, "*": 4}).dims("a[0].*") == (3, 3)
    assert dropinf.Dropout({budget._literal("a[0].*"): 3, "*": 4}).dims("a0.b") == (4, 4)


def test_dims_by_layer():
    sketch = dropinf.Dropout({"head": (2, 3), "blocks.*": 5})
    assert sketch.dims("head") == (2, 3)
    assert sketch.dims("blocks.0.up") == (5, 5)
    with pytest.raises(ValueError, match=r'dim has no entry for layer norm; its patterns are head, blocks.*: add "\*"'):
        sketch.dims("norm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_bytes": 8}, "budget_bytes is 8; .* layers need at least"),
        ({"budget_bytes": 400, "allocate": "best"}, "allocate is 'best'; it must be one of 'norm', 'energy', 'equal'"),
    ],
)
def test_bad_input(arguments, message):
    model, batches, loss_fn = setting()
    with pytest.raises(ValueError, match=message):
        dropinf.choose(model, batches, loss_fn, **arguments)
    with pytest.raises(ValueError, match="batches: they are read three times"):
        dropinf.choose(model, iter(batches), loss_fn, budget_bytes=400)
