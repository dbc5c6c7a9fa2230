"""whiten=True: every coordinate divided by its root mean square before anything is dropped."""

from __future__ import annotations

import pytest
import torch

import dropinf
from dropinf.sketch import Place
from dropinf.sketch.sketch import _FLOOR

SIZE = 24


def moments(seed=0):
    """Correlated rows of very different size, and their second moment."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, SIZE, generator=generator, dtype=torch.float64)
    rows = (rows + rows[:, :1]) * torch.logspace(-1, 1, SIZE, dtype=torch.float64)
    return rows, rows.T @ rows / len(rows)


def whitened(rows, energies):
    return rows / (energies + _FLOOR * energies.mean()).sqrt()


SKETCHES = {
    "whole": (dropinf.Dropout, SIZE, {}),
    "dropout": (dropinf.Dropout, 6, {}),
    "group": (dropinf.Dropout, 6, {"group": 3}),
    "fold": (dropinf.Dropout, 6, {"keep": 1.0}),
    "scaled": (dropinf.Dropout, 6, {"scale": True}),
    "gaussian": (dropinf.Gaussian, 6, {}),
    "rademacher": (dropinf.Rademacher, 6, {}),
    "sjlt": (dropinf.SJLT, 6, {}),
}


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("diagonal", [True, False])
def test_is_the_sketch_of_whitened_values(name, diagonal):
    cls, dim, options = SKETCHES[name]
    rows, covariance = moments()
    statistics = covariance.diagonal() if diagonal else covariance
    axis = cls(dim, whiten=True, **options).make(SIZE, dim, Place("layer", "in"), statistics)
    plain = cls(dim, **options).make(SIZE, dim, Place("layer", "in"))
    torch.testing.assert_close(
        axis.apply(rows), plain.apply(whitened(rows, covariance.diagonal())), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("rank", "sampling"), [(None, "uniform"), (12, "uniform"), (12, "energy"), (SIZE, "uniform"), (SIZE, "energy")]
)
def test_rotates_onto_principal_directions_of_whitened_values(rank, sampling):
    rows, covariance = moments()
    whole = whitened(rows, covariance.diagonal())
    if rank is None:
        axis = dropinf.PCA(4, whiten=True).make(SIZE, 4, Place("layer", "in"), covariance)
    else:
        sketch = dropinf.Dropout(4, rank=rank, sampling=sampling, whiten=True)
        kept = (
            sketch.survivors(SIZE, 4, Place("layer", "in"))
            if sketch.statistics_of(SIZE, 4, Place("layer", "in")) == "survivors"
            else None
        )
        statistics = covariance if kept is None else kept.apply(kept.apply(covariance).T)
        axis = sketch.make(SIZE, 4, Place("layer", "in"), statistics)
        if rank < SIZE:
            # The survivors' own mean is what a floor is taken of, where nothing else was measured.
            index = axis.index[0].long()
            energies = covariance.diagonal() if sampling == "energy" else covariance.diagonal()[index]
            whole = (rows / (covariance.diagonal() + _FLOOR * energies.mean()).sqrt())[:, index]
    found = axis.apply(rows)
    second = found.T @ found / len(rows)
    best = torch.linalg.eigvalsh(whole.T @ whole / len(rows)).flip(0)[:4]
    torch.testing.assert_close(second, torch.diag(best), rtol=1e-5, atol=1e-5)


def test_a_dot_product_is_preconditioned_by_a_rank_one_diagonal():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 7, bias=False).double()
    x, y = torch.randn(40, 5, dtype=torch.float64) * torch.arange(1, 6), torch.randn(40, 7, dtype=torch.float64)
    loss_fn = lambda m, b: (m(b[0]) - b[1]).square().sum(1)  # noqa: E731
    gradients = dropinf.compress(model, [(x, y)], loss_fn, dropinf.Dropout(8, whiten=True))
    g = 2 * (model(x) - y).detach()
    rows, columns = g.square().mean(0), x.square().mean(0)
    rows, columns = rows + _FLOOR * rows.mean(), columns + _FLOOR * columns.mean()
    exact = torch.einsum("no,ni->noi", g, x)
    want = torch.einsum("noi,moi,oi->nm", exact, exact, 1 / (rows[:, None] * columns))
    torch.testing.assert_close(dropinf.score(gradients, gradients, kind="dot"), want, rtol=1e-6, atol=1e-6)


def test_an_axis_without_energy_is_left_alone():
    axis = dropinf.Dropout(3, whiten=True).make(6, 3, Place("layer", "in"), torch.zeros(6, dtype=torch.float64))
    assert (axis.weight == 1).all()


def test_one_axis_rotated_and_the_other_not():
    sketch = dropinf.Dropout((6, 2), rank=(1, 8), whiten=True)
    assert sketch.statistics_of(SIZE, 6, Place("layer", "out")) == "energy"
    assert sketch.statistics_of(SIZE, 2, Place("layer", "in")) == "survivors"
    _, covariance = moments()
    assert sketch.make(SIZE, 6, Place("layer", "out"), covariance.diagonal()).matrix is None
    kept = sketch.survivors(SIZE, 2, Place("layer", "in"))
    assert sketch.make(SIZE, 2, Place("layer", "in"), kept.apply(kept.apply(covariance).T)).matrix.shape == (2, 8)
    assert dropinf.Dropout((6, 2), rank=(1, 8)).statistics_of(SIZE, 6, Place("layer", "out")) is None


def test_flat_masks_are_not_whitened():
    with pytest.raises(ValueError, match="mode='flat' samples uniformly and is not whitened; use mode='factorized'"):
        dropinf.Dropout(8, mode="flat", whiten=True)
