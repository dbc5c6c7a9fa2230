"""Random draws that depend on (seed, place) alone, and the tables that they are laid into."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Items that are all shuffled, however few are kept: 0.2 s and 17 MB. The largest vocabularies have a quarter as many.
SHUFFLED = 1 << 20


class Place(NamedTuple):
    """An axis of a model: a layer, by its name, and the "out", "in" or "flat" side of its gradient."""

    layer: str
    side: str

    def __str__(self) -> str:
        return f"{self.layer}/{self.side}"


def bits(seed: int, place: Place, n: int, purpose: str = "") -> np.ndarray:
    """Return n uint64 that depend on (seed, place, purpose) alone. A bias shares its layer's output mask."""
    shared = str(place).replace(".bias/", "/")
    word = hashlib.blake2b(f"{seed}/{shared}{purpose}".encode(), digest_size=16).digest()
    bits: np.ndarray = np.asarray(np.random.Philox(key=int.from_bytes(word, "little")).random_raw(n), dtype=np.uint64)
    return bits


def uniform(seed: int, place: Place, n: int, purpose: str = "") -> np.ndarray:
    """Return n floats in the open interval (0, 1) that depend on (seed, place, purpose) alone."""
    uniform: np.ndarray = ((bits(seed, place, n, purpose) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return uniform


def shuffle(seed: int, place: Place, n: int) -> np.ndarray:
    """Return 0, ..., n - 1 in random order."""
    order: np.ndarray = np.argsort(bits(seed, place, n), kind="stable")
    return order


def sample(seed: int, place: Place, n: int, count: int) -> np.ndarray:
    """Return ``count`` of 0, ..., n - 1, uniformly without replacement, in random order.

    Up to 2^20 items, or where more than a quarter is kept, all are shuffled, so these masks are the same as in every
    earlier version; of more items only about ``count`` numbers are drawn. NumPy's ``Generator.choice`` would serve
    there, but its stream may change from one version of NumPy to the next.
    """
    if n <= SHUFFLED or 4 * count > n:
        return shuffle(seed, place, n)[:count]
    return _distinct(seed, place, n, count)


def _distinct(seed: int, place: Place, n: int, count: int) -> np.ndarray:
    """Return the first ``count`` distinct values of a stream of uniform draws from 0, ..., n - 1."""
    drawn = count + count // 4  # n / 4 distinct values are expected after 1.15 draws for each
    while True:
        values = bits(seed, place, drawn) % np.uint64(n)  # uniform up to n / 2^64
        first = np.unique(values, return_index=True)[1]
        if len(first) >= count:
            distinct: np.ndarray = values[np.sort(first)[:count]].astype(np.int64)
            return distinct
        drawn *= 2  # the longer stream starts with the shorter one, so ``drawn`` does not change the result


def fold_table(order: np.ndarray, runs: int, group: int, weights: np.ndarray) -> tuple[Tensor, Tensor]:
    """Lay the surviving runs ``order`` and their ``weights`` into [fan_in, runs] slots, zero where one stays empty."""
    slots = np.zeros((math.ceil(len(order) / runs), runs), dtype=np.int64)
    slots.flat[: len(order)] = order
    index = (slots[:, :, None] * group + np.arange(group)).reshape(len(slots), -1)
    weight = np.zeros(index.shape, dtype=np.float32)
    weight.flat[: len(weights)] = weights
    return torch.from_numpy(index.astype(np.int32)), torch.from_numpy(weight)


def chances(energies: np.ndarray, count: float) -> np.ndarray:
    """Return chances [n] that sum to ``count`` <= n: in proportion to the energies, or 1 where that would exceed 1."""
    found: np.ndarray = np.zeros(len(energies))
    while (left := count - found.sum()) > 0:
        weights = np.where(found == 0, energies, 0.0)
        if not weights.any():
            weights = np.where(found == 0, 1.0, 0.0)
        share = left * (weights / weights.sum())
        if share.max() < 1:
            found += share
            break
        found[share >= 1] = 1.0
    return found


def systematic(chances: np.ndarray, order: np.ndarray, start: float) -> np.ndarray:
    """Draw without replacement, each item with exactly its chance where ``start`` is uniform in (0, 1).

    The chances lie end to end, in the given order, and a point falls at every whole step. Source: Madow (1949).
    """
    ordered = chances[order]
    sure: np.ndarray = order[ordered == 1]
    rest = order[(ordered > 0) & (ordered < 1)]
    points = round(chances[rest].sum())
    if points == 0:
        return sure
    ends = np.cumsum(chances[rest])
    picks = np.searchsorted(ends * (points / ends[-1]), start + np.arange(points), side="right")
    picks = np.minimum(picks, len(rest) - 1)  # rounding may step over the end
    sample: np.ndarray = np.concatenate([sure, rest[picks]])
    return sample
