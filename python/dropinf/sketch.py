"""Sketches: linear maps R^d -> R^k, shared by all samples, that compress one axis of a gradient.

A new sketch is one class with one method, :meth:`Sketch.axis`. Every table is a function of
(seed, layer name, axis length, calibration statistics) alone: never of batch order, batch size,
device or number of ranks. Random bits come from Philox's raw stream, which is stable across versions.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .axis import Axis

Statistics = Literal["energy", "covariance", "survivors"]


def _bits(seed: int, key: str, n: int) -> np.ndarray:
    """n uint64 that depend on (seed, key) alone."""
    word = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
    bits: np.ndarray = np.asarray(np.random.Philox(key=int.from_bytes(word, "little")).random_raw(n), dtype=np.uint64)
    return bits


def _uniform(seed: int, key: str, n: int) -> np.ndarray:
    """n floats in the open interval (0, 1)."""
    uniform: np.ndarray = ((_bits(seed, key, n) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return uniform


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


Dim = int | tuple[int, int]
T = TypeVar("T")


def _by_layer(name: str, value: T | Mapping[str, T], layer: str) -> T:
    """The value of the first pattern that matches a layer's name."""
    if not isinstance(value, Mapping):
        return value
    for pattern, found in value.items():
        if fnmatch.fnmatchcase(layer, pattern):
            return cast("T", found)
    raise ValueError(
        f'{name} has no entry for layer {layer}; its patterns are {", ".join(value)}: add "*" for the rest'
    )


class Sketch(ABC):
    """Compresses one axis. ``dim`` is what is stored per axis: an int, (out, in), or either of them by layer: a mapping
    from name patterns (fnmatch), of which the first that matches counts.

    Class attributes say what a sketch needs: ``statistics`` (``"energy"``: E[x_j^2]; ``"covariance"``: E[x x^T];
    ``"survivors"``: the covariance of what :meth:`survivors` keeps; None: no calibration pass) and ``dense`` (a matrix
    rather than a table, so that a flattened parameter is never sketched as one long axis).
    """

    statistics: Statistics | None = None
    dense: ClassVar[bool] = False
    mode: str = "factorized"

    def __init__(self, dim: Dim | Mapping[str, Dim], *, seed: int = 0) -> None:
        for value in dim.values() if isinstance(dim, Mapping) else (dim,):
            if isinstance(value, tuple) and len(value) != 2:
                raise ValueError(f"dim must be an int or a pair (out, in), got {value!r}")
            for axis in value if isinstance(value, tuple) else (value,):
                _whole_number("dim", axis)
        self.dim = dim
        self.seed = seed

    def dims(self, layer: str) -> tuple[int, int]:
        """What is stored of a layer's (out, in) axes."""
        dim = _by_layer("dim", self.dim, layer)
        return dim if isinstance(dim, tuple) else (dim, dim)

    def dim_flat(self, layer: str) -> int:
        """What is stored of a flattened matrix: as much as of a factorized one."""
        return math.prod(self.dims(layer))

    @abstractmethod
    def axis(self, size: int, dim: int, key: str, statistics: Tensor | None) -> Axis:
        """The sketch of the axis named ``key``, of length ``size``, to ``dim`` < ``size`` values.

        ``statistics`` is E[x_j^2] [size] or E[x x^T] [size, size] over the calibration pass, that of the survivors
        [kept, kept], or None.
        """

    def survivors(self, size: int, key: str) -> Axis | None:  # noqa: ARG002
        """What is kept of an axis before any statistics are known: None where the covariance of all of it is wanted."""
        return None

    def make(self, size: int, dim: int, key: str, statistics: Tensor | None = None) -> Axis:
        """:meth:`axis`, or the axis kept whole where ``dim`` >= ``size``."""
        return Axis.identity(size) if dim >= size else self.axis(size, dim, key, statistics)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim}, seed={self.seed})"


def _fold_table(order: np.ndarray, runs: int, group: int, weights: np.ndarray) -> tuple[Tensor, Tensor]:
    """Lay the surviving runs ``order`` and their ``weights`` into [fan_in, runs] slots, zero where one stays empty."""
    slots = np.zeros((math.ceil(len(order) / runs), runs), dtype=np.int64)
    slots.flat[: len(order)] = order
    index = (slots[:, :, None] * group + np.arange(group)).reshape(len(slots), -1)
    weight = np.zeros(index.shape, dtype=np.float32)
    weight.flat[: len(weights)] = weights
    return torch.from_numpy(index.astype(np.int32)), torch.from_numpy(weight)


def _chances(energies: np.ndarray, count: int) -> np.ndarray:
    """Chances [n] that sum to ``count`` <= n, proportional to the energies but for those that would exceed 1."""
    chances: np.ndarray = np.zeros(len(energies))
    while (left := count - chances.sum()) > 0:
        weights = np.where(chances == 0, energies, 0.0)
        if not weights.any():
            weights = np.where(chances == 0, 1.0, 0.0)
        share = left * (weights / weights.sum())
        if share.max() < 1:
            chances += share
            break
        chances[share >= 1] = 1.0
    return chances


def _systematic(chances: np.ndarray, order: np.ndarray, start: float) -> np.ndarray:
    """A sample without replacement in which each item has exactly its chance, over a ``start`` uniform in (0, 1).

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


def _leading(size: int, dim: int, energies: Tensor) -> Axis:
    """Keep the coordinates of most energy: the principal directions of a diagonal second moment."""
    top = torch.sort(energies, descending=True, stable=True).indices[:dim]
    return Axis(size, top.sort().values.to(torch.int32)[None])


def _principal(covariance: Tensor, dim: int) -> Tensor:
    """The ``dim`` leading eigenvectors [dim, size], float32."""
    vectors: Tensor = torch.linalg.eigh(covariance.double()).eigenvectors[:, -dim:].flip(1).T
    # An eigenvector's sign is arbitrary: fix it, so that equal statistics give equal sketches.
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return (vectors * largest.sign()).float().contiguous()


class Dropout(Sketch):
    """Keep few coordinates and drop the rest: one fixed random mask per axis, shared by all samples.

    ``dim``: what is stored per axis, an int or (out, in); ``dim`` >= d keeps the axis whole.
    ``keep``: the surviving fraction of an axis. None: exactly ``dim`` coordinates survive. More survivors than
    ``dim`` are folded: each stored value is a sum with random signs of several survivors.
    ``group``: coordinates survive in aligned runs of this length (the greatest common divisor of
    ``group``, d and ``dim`` where they do not divide).
    ``sampling``: ``"uniform"``, or ``"energy"``: without replacement, with probability proportional to E[x_j^2] (1 for
    those that would exceed it), which needs :meth:`Compressor.calibrate`.
    ``mode``: ``"factorized"`` masks the inputs and output gradients of a layer, ``"flat"`` the flattened
    gradient of a parameter (``dim`` values of it).
    ``rank``: keep this many values of an axis instead of ``dim``, and rotate them onto their ``dim`` leading principal
    directions, which needs :meth:`Compressor.calibrate`: a dense sketch's quality for ``rank`` / d of its price. Of
    one-hot inputs (an embedding's vocabulary) the most frequent rows are kept.
    ``scale``: divide each survivor by the square root of its chance to survive, so that inner products are unbiased
    over masks (Horvitz & Thompson 1952).
    Source: Zhang & Amiri, arXiv 2509.15651, reconstructed from the abstract and headline results.
    """

    def __init__(
        self,
        dim: Dim | Mapping[str, Dim] = 64,
        *,
        keep: float | None = None,
        group: int = 1,
        sampling: Literal["uniform", "energy"] = "uniform",
        rank: int | Mapping[str, int] | None = None,
        mode: Literal["factorized", "flat"] = "factorized",
        scale: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, seed=seed)
        if keep is not None and not (isinstance(keep, float | int) and 0 < keep <= 1):
            raise ValueError(f"keep must be a fraction in (0, 1] or None, got {keep!r}")
        if sampling not in ("uniform", "energy"):
            raise ValueError(f"sampling must be 'uniform' or 'energy', got {sampling!r}")
        if mode not in ("factorized", "flat"):
            raise ValueError(f"mode must be 'factorized' or 'flat', got {mode!r}")
        if mode == "flat" and sampling == "energy":
            raise ValueError("mode='flat' samples uniformly; use mode='factorized' with sampling='energy'")
        for value in rank.values() if isinstance(rank, Mapping) else (() if rank is None else (rank,)):
            _whole_number("rank", value)
        if rank is not None and (mode == "flat" or scale):
            raise ValueError("rank= rotates the axes of factorized gradients: leave mode='factorized' and scale=False")
        self.keep, self.group, self.scale, self.rank = keep, _whole_number("group", group), scale, rank
        self.statistics = "energy" if sampling == "energy" else None
        if rank is not None:
            self.statistics = "survivors" if sampling == "uniform" else "covariance"
        self.mode = mode

    def dim_flat(self, layer: str) -> int:
        return self.dims(layer)[0] if self.mode == "flat" else super().dim_flat(layer)

    def _kept(self, key: str) -> int:
        """How many values of an axis are kept, to be rotated."""
        layer = key.rsplit("/", 1)[0]
        assert self.rank is not None
        rank, dim = _by_layer("rank", self.rank, layer), max(self.dims(layer))
        if rank <= dim:
            raise ValueError(
                f"rank must be more than dim, got rank={rank} and dim={dim} for layer {layer}: rank values of an axis "
                "are kept and rotated onto dim; four times dim is a good choice"
            )
        return rank

    def survivors(self, size: int, key: str) -> Axis | None:
        if self.rank is None or self._kept(key) >= size:
            return None
        return self._table(size, self._kept(key), key, None)

    def axis(self, size: int, dim: int, key: str, statistics: Tensor | None) -> Axis:
        if self.rank is None:
            return self._table(size, dim, key, statistics)
        assert statistics is not None, "the compressor calibrates first"
        if statistics.ndim == 1:
            return _leading(size, dim, statistics)
        rank = self._kept(key)
        if rank >= size:
            return Axis(size, matrix=_principal(statistics, dim))
        if self.statistics == "survivors":
            table = self._table(size, rank, key, None)
        else:
            table = self._table(size, rank, key, statistics.diagonal())
            statistics = table.apply(table.apply(statistics).T)  # the table is linear: S E[x x^T] S^T
        return Axis(size, table.index, table.weight, _principal(statistics, dim), table.group)

    def _table(self, size: int, dim: int, key: str, energies: Tensor | None) -> Axis:
        group = math.gcd(self.group, size, dim)
        survivors = dim if self.keep is None else min(size, max(dim, round(self.keep * size)))
        order, chances = self._runs(size // group, math.ceil(survivors / group), key, energies)
        folded = survivors > dim
        if not folded:
            order = np.sort(order)
        weights = np.repeat(1 / np.sqrt(chances[order]) if self.scale else np.ones(len(order)), group)
        if folded:
            weights *= (_bits(self.seed, key + "/sign", len(weights)) & np.uint64(1)).astype(np.float32) * 2 - 1
        index, weight = _fold_table(order, dim // group, group, weights)
        return Axis(size, index, weight if folded or self.scale else None, group=group)

    def _runs(self, runs: int, count: int, key: str, energies: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        """Which ``count`` of ``runs`` survive, in random order, and the chance of every run."""
        order = np.argsort(_bits(self.seed, key, runs), kind="stable")
        if energies is None:
            return order[:count], np.full(runs, count / runs)
        chances = _chances(energies.double().cpu().numpy().reshape(runs, -1).mean(1), count)
        return _systematic(chances, order, float(_uniform(self.seed, key + "/energy", 1)[0])), chances


class SJLT(Sketch):
    """Sparse Johnson-Lindenstrauss transform, one nonzero per column: every coordinate survives, folded with
    random signs into ``dim`` sums of equal size. Source: Kane & Nelson, arXiv 1012.1577."""

    def __init__(self, dim: Dim | Mapping[str, Dim] = 64, *, seed: int = 0) -> None:
        super().__init__(dim, seed=seed)
        self._fold = Dropout(dim, keep=1.0, seed=seed)

    def axis(self, size: int, dim: int, key: str, statistics: Tensor | None) -> Axis:
        return self._fold.axis(size, dim, key, statistics)


class Gaussian(Sketch):
    """Dense random projection with N(0, 1/dim) entries (LoGra's random factors, arXiv 2405.13954)."""

    dense = True

    def axis(self, size: int, dim: int, key: str, statistics: Tensor | None) -> Axis:  # noqa: ARG002
        normal = torch.special.ndtri(torch.from_numpy(_uniform(self.seed, key, dim * size)))
        return Axis(size, matrix=(normal / math.sqrt(dim)).float().view(dim, size))


class Rademacher(Sketch):
    """Dense random projection with +-1/sqrt(dim) entries (TRAK's default, arXiv 2303.14186)."""

    dense = True

    def axis(self, size: int, dim: int, key: str, statistics: Tensor | None) -> Axis:  # noqa: ARG002
        signs = (_bits(self.seed, key, dim * size) & np.uint64(1)).astype(np.float32) * 2 - 1
        return Axis(size, matrix=torch.from_numpy(signs / np.float32(math.sqrt(dim))).view(dim, size))


class PCA(Sketch):
    """Projection on the leading eigenvectors of E[x x^T] over the calibration pass (LoGra's PCA factors).

    An axis of one-hot inputs (an embedding's vocabulary) has a diagonal second moment: its leading
    eigenvectors are the most frequent rows, kept by lookup. The same is done for axes too long for a
    covariance, where it is an approximation.
    """

    statistics = "covariance"
    dense = True

    def axis(self, size: int, dim: int, key: str, statistics: Tensor | None) -> Axis:  # noqa: ARG002
        assert statistics is not None, "the compressor calibrates first"
        if statistics.ndim == 1:
            return _leading(size, dim, statistics)
        return Axis(size, matrix=_principal(statistics, dim))


class Identity(Sketch):
    """No compression: the uncompressed per-sample gradient."""

    def __init__(self) -> None:
        super().__init__(1)

    def dim_flat(self, layer: str) -> int:  # noqa: ARG002
        return 1

    def make(self, size: int, dim: int, key: str, statistics: Tensor | None = None) -> Axis:  # noqa: ARG002
        return Axis.identity(size)

    def axis(self, size: int, dim: int, key: str, statistics: Tensor | None) -> Axis:  # noqa: ARG002
        return Axis.identity(size)

    def __repr__(self) -> str:
        return "Identity()"
