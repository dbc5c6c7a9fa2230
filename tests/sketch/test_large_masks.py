"""Masks of long axes: drawn in time and memory of what is kept; masks of shorter axes stay what they were."""

from __future__ import annotations

import collections
import itertools
import math
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

import dropinf
from bench.peak import peak_mb
from dropinf.capture.modules import LinearUse
from dropinf.sketch import Place, draws

SIDE = 8192
SIZES = (SIDE * SIDE, 2**31 - 1)
PLACE = Place("layer", "flat")
KEPT = (1, 64, 4096, 1 << 17)


def chi_square(counts, cells):
    """Pearson's statistic of equal chances, in standard deviations from its mean."""
    counts = np.array([*counts, *[0] * (cells - len(counts))])
    expected = counts.sum() / cells
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (statistic - (cells - 1)) / math.sqrt(2 * (cells - 1))


def traced_peak(job):
    """Bytes that Python and NumPy hold at a time while a job runs for the second time, at most."""
    job()  # what is imported on the way is no part of it
    tracemalloc.start()
    try:
        job()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dim", KEPT)
def test_entries_are_distinct_and_in_range(size, dim):
    index = dropinf.Dropout(dim, mode="flat").make(size, dim, PLACE).index
    assert index.shape == (1, dim)
    assert index.dtype == torch.int32
    assert index.min() >= 0
    assert index.max() < size
    assert (index[0].diff() > 0).all()


def test_runs_are_aligned_and_distinct():
    axis = dropinf.Dropout(4096, group=16, mode="flat").make(SIZES[0], 4096, PLACE)
    runs = axis.index.view(-1, 16)
    assert axis.group == 16
    assert (runs[:, 0] % 16 == 0).all()
    assert (runs - runs[:, :1] == torch.arange(16)).all()
    assert (runs[:, 0].diff() > 0).all()
    assert runs.max() < SIZES[0]


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.26])
def test_folded_survivors_are_distinct(keep):
    """On both sides of the share from which on all are shuffled."""
    size = 1 << 22
    axis = dropinf.Dropout(64, keep=keep, mode="flat").make(size, 64, PLACE)
    survivors = axis.index[axis.weight != 0]
    assert len(survivors) == len(survivors.unique()) == round(keep * size)
    assert set(axis.weight.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert survivors.min() >= 0
    assert survivors.max() < size


@pytest.mark.parametrize("size", SIZES)
def test_scaled_masks_know_their_chance(size):
    axis = dropinf.Dropout(64, mode="flat", scale=True).make(size, 64, PLACE)
    torch.testing.assert_close(axis.weight, torch.full((1, 64), math.sqrt(size / 64)))


@pytest.mark.parametrize("n", [7, 100, 2**31 - 1])
def test_the_first_distinct_values_of_the_stream_are_taken(n):
    for seed, count in itertools.product(range(50), (1, 2, 5)):
        stream = (draws.bits(seed, PLACE, 1000) % np.uint64(n)).tolist()
        assert draws._distinct(seed, PLACE, n, count).tolist() == list(dict.fromkeys(stream))[:count]


def test_a_stream_of_many_repeats_is_drawn_on(monkeypatch):
    monkeypatch.setattr(draws, "bits", lambda _seed, _place, n: np.arange(n, dtype=np.uint64) // np.uint64(50))
    assert draws._distinct(0, PLACE, 100, 3).tolist() == [0, 1, 2]


def test_small_samples_are_uniform_without_replacement():
    """Every ordered pair of eight items is as likely as any other."""
    pairs = collections.Counter(tuple(draws._distinct(seed, PLACE, 8, 2).tolist()) for seed in range(11200))
    assert chi_square(pairs.values(), 8 * 7) < 4


@pytest.mark.parametrize("size", SIZES)
def test_large_samples_are_uniform(size):
    found = np.stack([draws.sample(seed, PLACE, size, 64) for seed in range(1000)])
    assert chi_square(np.bincount(found.flatten() * 64 // size, minlength=64), 64) < 4
    assert chi_square(np.bincount(found.flatten() % 61, minlength=61), 61) < 4
    orders = collections.Counter(map(tuple, found[:, :3].argsort(1).tolist()))
    assert chi_square(orders.values(), math.factorial(3)) < 4


@pytest.mark.parametrize("size", SIZES)
def test_masks_differ_by_seed_layer_and_side(size):
    def mask(seed, place):
        return tuple(dropinf.Dropout(64, seed=seed).make(size, 64, place).index[0].tolist())

    masks = [mask(s, Place(layer, side)) for s in (0, 1) for layer in ("a", "b") for side in ("out", "flat")]
    assert len(set(masks)) == len(masks)
    assert mask(0, Place("a", "out")) == masks[0]
    assert mask(0, Place("a.bias", "out")) == masks[0]
    assert max(len(set(x) & set(y)) for x, y in itertools.combinations(masks, 2)) <= 1


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (2**20 + 1, {}, "f40ff33693e62cd017bf3eb8749fb89f"),
        (2**26, {"group": 16}, "2ade25f386175c62f425eeb3c842e1fd"),
        (2**26, {"keep": 1e-4, "scale": True, "seed": 5}, "167fd7281ff8d195a61d891a5dca2a47"),
        (2**31 - 1, {}, "569d069080aba324a92100690c884cc8"),
    ],
)
def test_masks_of_long_axes_stay_the_same(size, options, expected):
    """In every process, of every version: masks that no file keeps are drawn again from the seed."""
    axis = dropinf.Dropout(64, mode="flat", **options).make(size, 64, PLACE)
    assert axis.digest().hex() == expected


def test_another_process_draws_the_same_mask():
    code = (
        "import dropinf; from dropinf.sketch import Place; "
        f"print(dropinf.Dropout(64, mode='flat', seed=7).make({SIZES[0]}, 64, Place('layer', 'flat')).digest().hex())"
    )
    here = dropinf.Dropout(64, mode="flat", seed=7).make(SIZES[0], 64, PLACE).digest().hex()
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dim", "keep"), [*((dim, None) for dim in KEPT), (64, 1e-4)])
def test_no_more_is_drawn_or_held_than_is_kept(monkeypatch, size, dim, keep):
    drawn, bits = [], draws.bits
    monkeypatch.setattr(draws, "bits", lambda seed, place, n: drawn.append(n) or bits(seed, place, n))
    sketch, kept = dropinf.Dropout(dim, keep=keep, mode="flat", scale=True), round(size * keep) if keep else dim

    def make():
        drawn.clear()
        sketch.make(size, dim, PLACE)

    assert traced_peak(make) < 100 * kept + 20_000
    assert kept <= sum(drawn) <= 1.25 * kept


class Raw(nn.Module):
    """A parameter that no module kind covers: its gradient is flattened whatever the mode."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.empty(SIDE, SIDE))  # never written to, so it takes no memory


@pytest.mark.parametrize(
    ("model", "sketch"),
    [
        (
            lambda: nn.Linear(SIDE, SIDE, bias=False, device="meta").to_empty(device="cpu"),
            dropinf.Dropout(64, mode="flat"),
        ),
        (Raw, dropinf.Dropout(8)),
    ],
    ids=["linear", "raw"],
)
def test_a_compressor_of_a_large_flat_layer_holds_what_it_keeps(model, sketch):
    model = model()

    def make():
        (layer,) = dropinf.Compressor(model, sketch, lambda model, batch: model(batch).sum(1)).layers.values()
        assert layer.in_axis is None
        assert layer.entries.shape == (64,)
        LinearUse("layer", model, layer, None)

    assert traced_peak(make) < 50_000
    assert peak_mb(make) < 0.02


SMALL = {
    "few": (dropinf.Dropout(64, seed=3), 1000, 64, "c69d8cc82869b3290f2718ed3a97e8c4"),
    "most": (dropinf.Dropout(64, seed=3), 100, 64, "61778bafb1da233271a90978a1cada76"),
    "runs": (dropinf.Dropout(64, group=16, scale=True), 4096, 64, "d65edddeb69538d75294217b2c04fbbd"),
    "fold": (dropinf.Dropout(8, keep=0.3, scale=True, seed=1), 1003, 8, "4a501735130552b2f827220615d1ddca"),
    "runs folded": (dropinf.Dropout(16, keep=0.5, group=4), 4096, 16, "0efd2e4e615d5edc5b841bcf9b66be74"),
    "all folded": (dropinf.SJLT(16), 333, 16, "4650f50540e4f7863610f00428e4a05e"),
    "longest": (dropinf.Dropout(64, mode="flat"), 2**20, 64, "a5aa1f19378d0a2d93e5a919d028054c"),
    "longest in runs": (dropinf.Dropout(64, mode="flat", group=16), 2**24, 64, "b7a5d8bb598392aab199463b88aa5516"),
    "most of many": (dropinf.Dropout(64, keep=0.75), 2**20 + 4, 64, "f7104b64de7b476af61b4152a7dbb7c4"),
}


@pytest.mark.parametrize("name", SMALL)
def test_masks_of_short_axes_are_those_of_the_first_version(name):
    sketch, size, dim, expected = SMALL[name]
    assert sketch.make(size, dim, PLACE).digest().hex() == expected


@pytest.mark.parametrize(
    ("dim", "options", "expected"),
    [(64, {}, "76764277d928f7f7b294392fe1b1256f"), (10, {"keep": 0.1}, "6ea974d350b37b45fbb5b0cd27eef712")],
)
def test_masks_by_energy_are_those_of_the_first_version(dim, options, expected):
    energies = torch.arange(1, 1001, dtype=torch.float64)
    axis = dropinf.Dropout(dim, sampling="energy", scale=True, **options).make(1000, dim, PLACE, energies)
    assert axis.digest().hex() == expected
