"""choose(): dims for a budget of bytes, against what is stored and against uncompressed gradients."""

from __future__ import annotations

import glob
import itertools
import math

import numpy as np
import pytest
import torch

import dropinf
from dropinf import budget
from tests.api.models import build


def setting(name="sequence_mlp", n=4):
    model, batch, loss_fn = build(name)
    return model, [batch] * (n // 4), loss_fn


@pytest.mark.parametrize("name", ["sequence_mlp", "cnn", "tied", "raw_parameters"])
@pytest.mark.parametrize(
    ("allocate", "budget_bytes"), [("spectrum", 400), ("spectrum", 3000), ("equal", 3000), ("spectrum", 10**9)]
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
    if allocate == "spectrum":  # what is left over could keep nothing more
        assert 4 * stored > 0.8 * budget_bytes or choice.captured == pytest.approx(1)
    if budget_bytes == 10**9:
        assert choice.captured == pytest.approx(1)


def spread(n=400):
    """A model whose layers' axes are of unequal energy, on random samples."""
    model, batches, loss_fn = setting("sequence_mlp", n)
    torch.manual_seed(0)
    return model, [torch.randn_like(b) * torch.linspace(0.2, 2, b.shape[-1]) for b in batches], loss_fn


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("oversample", [1, 4])
def test_expects_what_is_kept(whiten, oversample):
    """Against whole gradients: their size in Adam's geometry, and the energy that is left of each layer's two axes."""
    model, batches, loss_fn = spread()
    options = {"budget_bytes": 200, "whiten": whiten, "oversample": oversample}
    choice = dropinf.choose(model, batches, loss_fn, **options)
    exact = dropinf.compress(model, batches, loss_fn, dropinf.Identity())
    weights = {n: math.sqrt(float(exact[n].square().sum(0).sum()) * exact[n][0].numel()) for n in exact.layers}
    whole = dropinf.compress(model, batches, loss_fn, dropinf.Dropout(10**6, whiten=whiten))
    kept = dropinf.compress(model, batches, loss_fn, choice.sketch)
    for layer in choice.layers:
        assert layer.share == pytest.approx(weights[layer.name] / sum(weights.values()), rel=0.1)
        left = float(kept[layer.name].square().sum() / whole[layer.name].square().sum())
        # Sizes of a mask differ from their expectation; axes are taken as independent.
        assert layer.captured == pytest.approx(left, rel=0.15 if oversample > 1 else 0.6)
    assert 0 < choice.captured < 1


def test_keeps_the_most_of_all_sizes_that_fit():
    """Two layers, every combination of their axes' sizes tried."""
    generator = np.random.default_rng(0)

    def axis(size):
        kept = np.sort(generator.uniform(0, 1, size - 1))
        options = [budget._Option(d + 1, 1, "uniform", k) for d, k in enumerate((*kept, 1.0))]
        return budget._AxisPlan(size, tuple(options))

    gaps = []
    for _ in range(20):
        plans = {"a": budget._Plan((axis(5), axis(4)), 3.0), "b": budget._Plan((axis(6),), 1.0)}
        tables = {n: p.tables() for n, p in plans.items()}
        for values in (2, 7, 12, 20):
            picks = budget._largest(plans, values)
            used, found = (sum(tables[n][i][picks[n]] for n in plans) for i in (0, 1))
            assert used <= values
            stored, kept = ([tables[n][i].flatten() for n in plans] for i in (0, 1))
            fits = np.add.outer(*stored) <= values
            gaps.append(np.add.outer(*kept)[fits].max() - found)
    assert min(gaps) >= 0
    assert np.mean(gaps) < 0.03 * 4  # one price for all is the best but for what is left over


def test_a_large_vocabulary_is_sampled_and_a_narrow_axis_rotated():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3000, bias=False)
    batches = [(torch.randn(64, 8) * torch.arange(8), torch.randint(3000, (64,))) for _ in range(100)]
    loss_fn = lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")  # noqa: E731
    choice = dropinf.choose(model, batches, loss_fn, budget_bytes=48000)
    compressor = dropinf.Compressor(model, choice.sketch, loss_fn)
    compressor.calibrate(batches)
    (layer,) = compressor.layers.values()
    assert layer.out_axis.matrix is None
    assert layer.in_axis.matrix is not None
    assert layer.out_axis.dim > 10 * layer.in_axis.dim


@pytest.mark.parametrize("budget_bytes", [80, 288, 680, 1500])
def test_a_budget_is_used(budget_bytes):
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 10)
    batches = [(torch.randn(200, 64) * torch.logspace(-1, 1, 64), torch.randint(10, (200,)))]
    loss_fn = lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")  # noqa: E731
    choice = dropinf.choose(model, batches, loss_fn, budget_bytes=budget_bytes)
    assert 0.85 * budget_bytes <= choice.bytes_per_sample <= budget_bytes
    compressor = dropinf.Compressor(model, choice.sketch, loss_fn)
    compressor.calibrate(batches)
    inner = compressor.layers["weight"].in_axis
    assert inner.dim == 64 or inner.matrix is not None  # a rotation of so few is always affordable


def test_a_rotation_keeps_what_its_survivors_tell():
    """128 survivors of 1,024 coordinates: an eighth where coordinates are independent, all where they are one."""
    independent = budget._Rotation.of(torch.eye(64, dtype=torch.float64))
    assert independent.kept(32, 128, 1024) == pytest.approx(16 / 64 * 8 / 64, rel=1e-6)
    one = budget._Rotation.of(torch.ones(64, 64, dtype=torch.float64))
    assert one.kept(1, 128, 1024) == pytest.approx(1, abs=1e-2)


def test_more_is_stored_where_gradients_are_larger():
    model, batches, loss_fn = spread()
    choices = {a: dropinf.choose(model, batches, loss_fn, budget_bytes=200, allocate=a) for a in ("spectrum", "equal")}
    heaviest = max(choices["spectrum"].layers, key=lambda layer: layer.share).name
    size = {a: next(math.prod(x.dims) for x in c.layers if x.name == heaviest) for a, c in choices.items()}
    assert size["spectrum"] > size["equal"]


def test_is_deterministic_and_shows_a_table():
    model, batches, loss_fn = setting()
    first, second = (dropinf.choose(model, batches, loss_fn, budget_bytes=400, seed=3) for _ in range(2))
    assert str(first) == str(second)
    lines = str(first).splitlines()
    assert len(lines) == len(first.layers) + 2
    assert lines[-1].startswith(f"{first.bytes_per_sample} bytes per sample; ")
    assert all(layer.name in line for layer, line in zip(first.layers, lines[1:], strict=False))


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("size", [1, 5, 64, 1000])
def test_sizes_are_whole_runs(size, group):
    sizes = budget._sizes(size, group)
    assert sizes[-1] == size
    assert sizes == sorted(set(sizes))
    assert all(dim % group == 0 or dim < group or dim == size for dim in sizes)
    assert all(b <= max(a + group, 1.2 * a + 1) for a, b in itertools.pairwise(sizes))


def test_a_name_with_special_characters_is_matched_as_it_is():
    assert dropinf.Dropout({glob.escape("a[0].*"): 3, "*": 4}).dims("a[0].*") == (3, 3)
    assert dropinf.Dropout({glob.escape("a[0].*"): 3, "*": 4}).dims("a0.b") == (4, 4)


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
        ({"budget_bytes": 400, "allocate": "best"}, "allocate is 'best'; it must be one of 'spectrum', 'equal'"),
    ],
)
def test_bad_input(arguments, message):
    model, batches, loss_fn = setting()
    with pytest.raises(ValueError, match=message):
        dropinf.choose(model, batches, loss_fn, **arguments)
    with pytest.raises(ValueError, match="batches: they are read twice"):
        dropinf.choose(model, iter(batches), loss_fn, budget_bytes=400)
