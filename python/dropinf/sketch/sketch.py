"""Sketches: linear maps R^d -> R^k, shared by all samples, that compress one axis of a gradient.

A new sketch is one class with one method, :meth:`Sketch.axis`. Every table is a function of
(seed, layer name, axis length, calibration statistics) alone: never of batch order, batch size,
device or number of ranks. Random bits come from Philox's raw stream, which is stable across versions.
"""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import signature
from typing import ClassVar, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .axis import Axis
from .draws import Place, bits, chances, fold_table, sample, shuffle, systematic, uniform

Statistics = Literal["energy", "covariance", "survivors"]
Sampling = Literal["uniform", "energy"]
SamplingBySide = Sampling | tuple[Sampling, Sampling]


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


# Of an axis's mean square, added before the root is taken: what is hardly ever seen is not blown up.
_FLOOR = 0.1

Dim = int | tuple[int, int]
T = TypeVar("T")


def _by_layer(name: str, value: T | Mapping[str, T], layer: str) -> T:
    """Return the value of the first pattern that matches a layer's name."""
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

    ``whiten``: divide every coordinate by its root mean square over a calibration pass before anything is dropped,
    which is a diagonal curvature of rank one per layer, as Adafactor's second moments are (arXiv 1804.04235), for the
    price of a multiplication. A dot product of such gradients is already preconditioned.
    """

    statistics: Statistics | None = None
    dense: ClassVar[bool] = False
    mode: str = "factorized"

    def __init__(self, dim: Dim | Mapping[str, Dim], *, whiten: bool = False, seed: int = 0) -> None:
        for value in dim.values() if isinstance(dim, Mapping) else (dim,):
            if isinstance(value, tuple) and len(value) != 2:
                raise ValueError(f"dim must be an int or a pair (out, in), got {value!r}")
            for axis in value if isinstance(value, tuple) else (value,):
                _whole_number("dim", axis)
        self.dim = dim
        self.whiten = whiten
        self.seed = seed

    def dims(self, layer: str) -> tuple[int, int]:
        """Return how many values are stored of a layer's (out, in) axes."""
        dim = _by_layer("dim", self.dim, layer)
        return dim if isinstance(dim, tuple) else (dim, dim)

    def dim_flat(self, layer: str) -> int:
        """Return how many values are stored of a flattened matrix: as many as of a factorized one."""
        return math.prod(self.dims(layer))

    @abstractmethod
    def axis(self, size: int, dim: int, place: Place, statistics: Tensor | None) -> Axis:
        """Return the sketch of the axis at ``place``, of length ``size``, to ``dim`` < ``size`` values.

        ``statistics`` is E[x_j^2] [size] or E[x x^T] [size, size] over the calibration pass, that of the survivors
        [kept, kept], or None.
        """

    def statistics_of(self, size: int, dim: int, place: Place) -> Statistics | None:  # noqa: ARG002
        """Return the statistics that :meth:`make` needs of the axis at ``place``, or None."""
        wanted = self.statistics if dim < size else None
        return wanted or ("energy" if self.whiten else None)

    def survivors(self, size: int, dim: int, place: Place) -> Axis | None:  # noqa: ARG002
        """Return the part of an axis whose covariance is wanted, drawn before the statistics are known; None: all."""
        return None

    def make(self, size: int, dim: int, place: Place, statistics: Tensor | None = None) -> Axis:
        """Return :meth:`axis`, or the axis kept whole where ``dim`` >= ``size``; of whitened coordinates on request."""
        axis = Axis.identity(size) if dim >= size else self.axis(size, dim, place, statistics)
        if not self.whiten:
            return axis
        assert statistics is not None, "the compressor calibrates first"
        return axis.scaled(whitening(statistics))

    def _directions(self, covariance: Tensor, dim: int) -> Tensor:
        """Return the leading principal directions [dim, size] of the coordinates, whitened where the sketch whitens."""
        if self.whiten:
            factors = whitening(covariance)
            covariance = factors[:, None] * covariance * factors
        return _principal(covariance, dim)

    def __repr__(self) -> str:
        """Return the call that makes it, with the options that differ from their defaults."""
        by_default = {name: p.default for name, p in signature(type(self)).parameters.items()}
        given = {
            name: getattr(self, name) for name in by_default if name not in ("dim", "seed") and hasattr(self, name)
        }
        options = "".join(f", {name}={value!r}" for name, value in given.items() if value != by_default[name])
        return f"{type(self).__name__}(dim={self.dim!r}{options}, seed={self.seed})"


def whitening(statistics: Tensor) -> Tensor:
    """Return the factor that whitens each coordinate, from E[x_j^2] or E[x x^T]; 1 where the axis is zero."""
    energies = (statistics if statistics.ndim == 1 else statistics.diagonal()).double()
    mean = energies.mean()
    return (energies + _FLOOR * mean).rsqrt() if mean > 0 else torch.ones_like(energies)


def _leading(size: int, dim: int, energies: Tensor) -> Axis:
    """Keep the coordinates of most energy: the principal directions of a diagonal second moment."""
    top = torch.sort(energies, descending=True, stable=True).indices[:dim]
    return Axis(size, top.sort().values.to(torch.int32)[None])


def _principal(covariance: Tensor, dim: int) -> Tensor:
    """Return the ``dim`` leading eigenvectors [dim, size], float32."""
    vectors: Tensor = torch.linalg.eigh(covariance.double()).eigenvectors[:, -dim:].flip(1).T
    # An eigenvector's sign is arbitrary: fix it, so that equal statistics give equal sketches.
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return (vectors * largest.sign()).float().contiguous()


class Dropout(Sketch):
    """Keep few coordinates and drop the rest: one fixed random mask per axis, shared by all samples.

    ``dim``, ``rank`` and ``sampling`` may be mappings from layer name patterns too; see :class:`Sketch`.
    ``dim``: what is stored per axis, an int or (out, in); ``dim`` >= d keeps the axis whole.
    ``keep``: the surviving fraction of an axis. None: exactly ``dim`` coordinates survive. More survivors than
    ``dim`` are folded: each stored value is a sum with random signs of several survivors.
    ``group``: coordinates survive in aligned runs of this length (the greatest common divisor of
    ``group``, d and ``dim`` where they do not divide).
    ``sampling``: ``"uniform"``, or ``"energy"``: without replacement, with probability proportional to E[x_j^2] (1 for
    those that would exceed it), which needs :meth:`Compressor.calibrate`; or a pair of them, (out, in).
    ``mode``: ``"factorized"`` masks the inputs and output gradients of a layer, ``"flat"`` the flattened
    gradient of a parameter (``dim`` values of it).
    ``rank``: keep this many values of an axis instead of ``dim``, and rotate them onto their ``dim`` leading principal
    directions, which needs :meth:`Compressor.calibrate`: a dense sketch's quality for ``rank`` / d of its price. Of
    one-hot inputs (an embedding's vocabulary) the most frequent rows are kept. Of a pair (out, in), an entry of at most
    ``dim`` leaves that axis without a rotation.
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
        sampling: SamplingBySide | Mapping[str, SamplingBySide] = "uniform",
        rank: Dim | Mapping[str, Dim] | None = None,
        mode: Literal["factorized", "flat"] = "factorized",
        scale: bool = False,
        whiten: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, whiten=whiten, seed=seed)
        if keep is not None and not (isinstance(keep, float | int) and 0 < keep <= 1):
            raise ValueError(f"keep must be a fraction in (0, 1] or None, got {keep!r}")
        sides = sampling.values() if isinstance(sampling, Mapping) else (sampling,)
        samplings = [side for value in sides for side in (value if isinstance(value, tuple) else (value,))]
        for value in samplings:
            if value not in ("uniform", "energy"):
                raise ValueError(f"sampling must be 'uniform' or 'energy', got {value!r}")
        if mode not in ("factorized", "flat"):
            raise ValueError(f"mode must be 'factorized' or 'flat', got {mode!r}")
        if mode == "flat" and ("energy" in samplings or whiten):
            raise ValueError(
                "mode='flat' samples uniformly and is not whitened; use mode='factorized' with sampling='energy' or "
                "whiten=True"
            )
        for entry in rank.values() if isinstance(rank, Mapping) else (() if rank is None else (rank,)):
            for axis in entry if isinstance(entry, tuple) else (entry,):
                _whole_number("rank", axis)
        if rank is not None and (mode == "flat" or scale):
            raise ValueError("rank= rotates the axes of factorized gradients: leave mode='factorized' and scale=False")
        self.keep, self.group, self.scale, self.rank = keep, _whole_number("group", group), scale, rank
        self.sampling, self.mode = sampling, mode

    def dim_flat(self, layer: str) -> int:
        return self.dims(layer)[0] if self.mode == "flat" else super().dim_flat(layer)

    def statistics_of(self, size: int, dim: int, place: Place) -> Statistics | None:
        energy = dim < size and self._by_energy(place)
        if dim < size and self._kept(dim, place):
            return "covariance" if energy else "survivors"
        return "energy" if energy or self.whiten else None

    def _by_energy(self, place: Place) -> bool:
        sampling = cast("SamplingBySide", _by_layer("sampling", self.sampling, place.layer))
        return (sampling[place.side == "in"] if isinstance(sampling, tuple) else sampling) == "energy"

    def _kept(self, dim: int, place: Place) -> int:
        """Return how many values of an axis are kept, to be rotated onto ``dim``; 0 without a rotation."""
        if self.rank is None:
            return 0
        rank, dims = cast("Dim", _by_layer("rank", self.rank, place.layer)), self.dims(place.layer)
        if isinstance(rank, tuple):
            rank = rank[place.side == "in"]
        elif rank <= max(dims):
            raise ValueError(
                f"rank must be more than dim, got rank={rank} and dim={max(dims)} for layer {place.layer}: rank values "
                "of an axis are kept and rotated onto dim; four times dim is a good choice"
            )
        return rank if rank > dim else 0

    def survivors(self, size: int, dim: int, place: Place) -> Axis | None:
        rank = self._kept(dim, place)
        return self._table(size, rank, place, None) if 0 < rank < size else None

    def axis(self, size: int, dim: int, place: Place, statistics: Tensor | None) -> Axis:
        rank, energy = self._kept(dim, place), self._by_energy(place)
        if not rank:
            return self._table(size, dim, place, statistics if energy else None)
        assert statistics is not None, "the compressor calibrates first"
        if statistics.ndim == 1:
            return _leading(size, dim, statistics)
        if rank >= size:
            return Axis(size, matrix=self._directions(statistics, dim))
        if not energy:
            table = self._table(size, rank, place, None)
            return Axis(size, table.index, table.weight, self._directions(statistics, dim), table.group)
        table = self._table(size, rank, place, statistics.diagonal())
        kept = table.scaled(whitening(statistics)) if self.whiten else table
        statistics = kept.apply(kept.apply(statistics).T)  # the table is linear: S E[x x^T] S^T
        return Axis(size, table.index, table.weight, _principal(statistics, dim), table.group)

    def _table(self, size: int, dim: int, place: Place, energies: Tensor | None) -> Axis:
        group = math.gcd(self.group, size, dim)
        survivors = dim if self.keep is None else min(size, max(dim, round(self.keep * size)))
        order, chance = self._runs(size // group, math.ceil(survivors / group), place, energies)
        folded = survivors > dim
        if not folded:
            ascending = np.argsort(order)
            order, chance = order[ascending], chance[ascending]
        weights = np.repeat(1 / np.sqrt(chance) if self.scale else np.ones(len(order)), group)
        if folded:
            weights *= (bits(self.seed, place, len(weights), "/sign") & np.uint64(1)).astype(np.float32) * 2 - 1
        index, weight = fold_table(order, dim // group, group, weights)
        return Axis(size, index, weight if folded or self.scale else None, group=group)

    def _runs(self, runs: int, count: int, place: Place, energies: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        """Return which ``count`` of ``runs`` survive, in random order, and the chance of each of these."""
        if energies is None:
            return sample(self.seed, place, runs, count), np.full(count, count / runs)
        found = chances(energies.double().cpu().numpy().reshape(runs, -1).mean(1), count)
        start = float(uniform(self.seed, place, 1, "/energy")[0])
        order = systematic(found, shuffle(self.seed, place, runs), start)
        return order, found[order]


class SJLT(Sketch):
    """Sparse Johnson-Lindenstrauss transform, one nonzero per column: every coordinate survives, folded with
    random signs into ``dim`` sums of equal size. Source: Kane & Nelson, arXiv 1012.1577."""

    def __init__(self, dim: Dim | Mapping[str, Dim] = 64, *, whiten: bool = False, seed: int = 0) -> None:
        super().__init__(dim, whiten=whiten, seed=seed)
        self._fold = Dropout(dim, keep=1.0, seed=seed)

    def axis(self, size: int, dim: int, place: Place, statistics: Tensor | None) -> Axis:
        return self._fold.axis(size, dim, place, statistics)


class Gaussian(Sketch):
    """Dense random projection with N(0, 1/dim) entries (LoGra's random factors, arXiv 2405.13954)."""

    dense = True

    def axis(self, size: int, dim: int, place: Place, statistics: Tensor | None) -> Axis:  # noqa: ARG002
        normal = torch.special.ndtri(torch.from_numpy(uniform(self.seed, place, dim * size)))
        return Axis(size, matrix=(normal / math.sqrt(dim)).float().view(dim, size))


class Rademacher(Sketch):
    """Dense random projection with +-1/sqrt(dim) entries (TRAK's default, arXiv 2303.14186)."""

    dense = True

    def axis(self, size: int, dim: int, place: Place, statistics: Tensor | None) -> Axis:  # noqa: ARG002
        signs = (bits(self.seed, place, dim * size) & np.uint64(1)).astype(np.float32) * 2 - 1
        return Axis(size, matrix=torch.from_numpy(signs / np.float32(math.sqrt(dim))).view(dim, size))


class PCA(Sketch):
    """Projection on the leading eigenvectors of E[x x^T] over the calibration pass (LoGra's PCA factors).

    An axis of one-hot inputs (an embedding's vocabulary) has a diagonal second moment: its leading
    eigenvectors are the most frequent rows, kept by lookup. The same is done for axes too long for a
    covariance, where it is an approximation.
    """

    statistics = "covariance"
    dense = True

    def axis(self, size: int, dim: int, place: Place, statistics: Tensor | None) -> Axis:  # noqa: ARG002
        assert statistics is not None, "the compressor calibrates first"
        if statistics.ndim == 1:
            return _leading(size, dim, statistics)
        return Axis(size, matrix=self._directions(statistics, dim))


class Identity(Sketch):
    """No compression: the uncompressed per-sample gradient."""

    def __init__(self) -> None:
        super().__init__(1)

    def dim_flat(self, layer: str) -> int:  # noqa: ARG002
        return 1

    def make(self, size: int, dim: int, place: Place, statistics: Tensor | None = None) -> Axis:  # noqa: ARG002
        return Axis.identity(size)

    def axis(self, size: int, dim: int, place: Place, statistics: Tensor | None) -> Axis:  # noqa: ARG002
        return Axis.identity(size)

    def __repr__(self) -> str:
        return "Identity()"
