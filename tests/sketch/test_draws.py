"""Scaled masks are unbiased: the exact expectation over every mask that can be drawn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import dropinf
from dropinf.sketch import Place, draws
from dropinf.sketch import sketch as module

SIZE = 12
# Two that always survive, one that never does, and one far smaller than the rest.
ENERGIES = torch.tensor([50.0, 40.0, 3.0, 2.0, 2.0, 1.5, 1.0, 1.0, 0.5, 0.25, 1e-3, 0.0], dtype=torch.float64)
X, Y = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X[11] = 0  # energy 0 says that it is never anything else


def _spans(sketch, dim, place, energies, survivors):
    """(length, middle) of the intervals of the uniform start between which the mask is the same."""
    group = math.gcd(sketch.group, SIZE, dim)
    chances = draws.chances(energies.numpy().reshape(-1, group).mean(1), survivors // group)
    order = np.argsort(draws.bits(sketch.seed, place, SIZE // group), kind="stable")
    ends = np.cumsum(chances[order][chances[order] < 1]) % 1
    cuts = np.unique(np.concatenate([[0.0, 1.0], ends]))
    return [(b - a, (a + b) / 2) for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("dim", "group"), [(3, 1), (5, 1), (8, 1), (4, 2), (6, 3)])
def test_energy_masks_are_unbiased(monkeypatch, seed, dim, group):
    sketch = dropinf.Dropout(dim, sampling="energy", group=group, scale=True, seed=seed)
    energies = ENERGIES.clamp_min(0.1) if group > 1 else ENERGIES
    total, tables = 0.0, set()
    for length, middle in _spans(sketch, dim, Place("layer", "in"), energies, dim):
        monkeypatch.setattr(module, "uniform", lambda *_, u=middle: np.array([u]))
        axis = sketch.make(SIZE, dim, Place("layer", "in"), energies)
        assert axis.dim == dim
        assert len(axis.index.unique()) == dim
        tables.add(tuple(axis.index.flatten().tolist()))
        total += length * float(axis.apply(X) @ axis.apply(Y))
    assert len(tables) > 1
    assert total == pytest.approx(float(X @ Y), abs=2e-6)  # the factors are float32


@pytest.mark.parametrize("seed", range(5))
def test_folded_energy_masks_are_unbiased(monkeypatch, seed):
    """Products of two survivors that share a sum have a random sign: what is left of the expectation are the squares."""
    sketch = dropinf.Dropout(3, keep=0.5, sampling="energy", scale=True, seed=seed)
    total = 0.0
    for length, middle in _spans(sketch, 3, Place("layer", "in"), ENERGIES, 6):
        monkeypatch.setattr(module, "uniform", lambda *_, u=middle: np.array([u]))
        axis = sketch.make(SIZE, 3, Place("layer", "in"), ENERGIES)
        assert axis.index.shape == (2, 3)
        total += length * float((axis.weight.double().square() * (X * Y)[axis.index.long()]).sum())
    assert total == pytest.approx(float(X @ Y), abs=2e-6)


def test_uniform_masks_are_unbiased_over_seeds():
    found = []
    for seed in range(4000):
        axis = dropinf.Dropout(4, scale=True, seed=seed).make(SIZE, 4, Place("layer", "in"))
        found.append(float(axis.apply(X) @ axis.apply(Y)))
    found = torch.tensor(found)
    assert abs(found.mean() - X @ Y) < 4 * found.std() / math.sqrt(len(found))


@pytest.mark.parametrize("count", [1, 3, 7, 11])
def test_chances_are_proportional_up_to_one(count):
    energies = ENERGIES.numpy()
    chances = draws.chances(energies, count)
    assert chances.sum() == pytest.approx(count)
    assert chances.max() <= 1
    below = (chances < 1) & (energies > 0)
    rates = chances[below] / energies[below]
    np.testing.assert_allclose(rates, rates[:1].repeat(len(rates)))
    assert (chances[~below & (energies > 0)] == 1).all()


def test_more_survivors_than_energies_fill_up_evenly():
    chances = draws.chances(np.array([2.0, 0.0, 0.0, 1.0]), 3)
    np.testing.assert_allclose(chances, [1, 0.5, 0.5, 1])
    axis = dropinf.Dropout(3, sampling="energy").make(4, 3, Place("layer", "in"), torch.tensor([2.0, 0.0, 0.0, 1.0]))
    assert len(axis.index.unique()) == 3


@pytest.mark.parametrize(
    "sketch",
    [
        dropinf.Dropout(),
        dropinf.Dropout((3, 4), keep=0.5, group=8, sampling="energy", whiten=True, seed=3),
        dropinf.Dropout({"*.bias": 2, "*": (5, 6)}, rank={"*": 9}, sampling=("energy", "uniform")),
        dropinf.Dropout(7, mode="flat", scale=True),
        dropinf.Gaussian(3, whiten=True),
        dropinf.PCA(4),
        dropinf.SJLT(5, seed=1),
        dropinf.Identity(),
    ],
)
def test_what_a_sketch_prints_makes_it_again(sketch):
    """Whoever tells sketches apart by what they print must not take two for one."""
    again = eval(repr(sketch), vars(dropinf))
    public = [{k: v for k, v in vars(x).items() if k[0] != "_"} for x in (again, sketch)]
    assert public[0] == public[1]
    assert type(again) is type(sketch)
