"""What to store of each layer, for a budget of bytes per sample."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .capture.layer import Layer
from .capture.targets import LayerFilter
from .compressor import Compressor
from .fisher.bits import SCALE_BYTES, BitCode, Bits, checked_bits
from .fisher.fisher import Fisher, FisherKind
from .gradients import GradientSource
from .sketch.axis import Axis
from .sketch.draws import Place, chances
from .sketch.sketch import Dropout, Sampling, Statistics, whitening
from .workload import CuSeqlens, LossFn, check_batches

Allocation = Literal["spectrum", "equal"]
_PILOT = 16  # stored per axis to learn how large each layer's gradients are
_SPAN = 512  # coordinates of an axis whose covariance stands for all of it
_LEAST = 128  # survivors that a rotation has at least, and onto as many: so few cost nothing
_WIDER, _LEAST_WIDE = 64, 1 << 14  # bytes of float rows beside those of few bits, and the least
_STEP = 1.1  # ratio of the sizes that are tried


@dataclass(frozen=True)
class LayerChoice:
    """One layer's part: ``dims`` stored of ``shape``; ``share``, its weight in the budget; and ``captured``, how much
    of its energy is expected to be kept (of whitened values, where the choice is whitened)."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    share: float
    captured: float


@dataclass(frozen=True)
class Choice:
    """A sketch that fits the budget, ready for :class:`Compressor` and its ``calibrate``; printing it shows a table."""

    sketch: Dropout
    layers: tuple[LayerChoice, ...]
    bytes_per_sample: int  # of float32 rows
    bits: Bits | None = None  # of a coordinate, where rows are to be of few
    few_bytes: int | None = None  # of such a row

    @property
    def captured(self) -> float:
        """The share of the energy of all layers, by their weights, that is expected to be kept."""
        return sum(layer.share * layer.captured for layer in self.layers)

    def code(self, train: GradientSource, fisher: Fisher | FisherKind = "kronecker", **options: Any) -> BitCode:
        """Return the code of rows of few bits, fitted to rows that the sketch makes; see :meth:`BitCode.fit`.

        Raises ValueError where ``bits`` was not asked for, and as :meth:`BitCode.fit`.
        """
        if self.bits is None:
            raise ValueError("bits: this choice is of float rows; ask for it with choose(..., bits=1), 2 or 4")
        return BitCode.fit(train, fisher, bits=self.bits, bytes_per_sample=self.few_bytes, **options)

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':<{width}}  {'gradient':>15}  {'stored':>11}  {'share':>6}  {'kept':>6}"]
        for layer in self.layers:
            full, stored = ("x".join(map(str, shape)) for shape in (layer.shape, layer.dims))
            lines.append(
                f"{layer.name:<{width}}  {full:>15}  {stored:>11}  {layer.share:>6.1%}  {layer.captured:>6.1%}"
            )
        lines.append(f"{self.bytes_per_sample:,} bytes per sample; {self.captured:.1%} of the energy kept")
        if self.bits is not None:
            lines.append(f"of these, {self.few_bytes:,} bytes per sample are stored, {self.bits} bits a coordinate")
        return "\n".join(lines)


def choose(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    budget_bytes: int,
    bits: Bits | None = None,
    allocate: Allocation = "spectrum",
    oversample: int = 4,
    whiten: bool = True,
    group: int = 1,
    layers: LayerFilter = None,
    cu_seqlens: CuSeqlens | None = None,
    seed: int = 0,
) -> Choice:
    """Choose what to store of each layer so that a sample takes at most ``budget_bytes`` as float32.

    ``batches``: a few hundred samples in random order, read twice.
    ``bits``: 1, 2 or 4, for rows of few bits: the budget is that of such a row, and the sketch makes float rows of 64
    times as many bytes (16 KB at least), of which :meth:`Choice.code` keeps the coordinates of most energy.
    ``allocate``: the sizes that keep the most energy, layers weighted by sqrt(E |G|^2 * entries), their gradient's size
    in the geometry of Adam ("spectrum"); or the same dims for all ("equal").
    ``oversample``: how many times ``dim`` values are kept before the rotation onto ``dim``; 1 is plain dropout. An axis
    whose rotation would cost more than a quarter of its layer's forward pass, such as that of a large vocabulary, is
    sampled by energy instead.
    ``whiten``: see :class:`Sketch`; ``cu_seqlens``: of packed batches, see :class:`Compressor`.
    Score what the choice stores with ``build_fisher(train, "block", "auto")``, or ``"joint"`` and a damping of 1 for a
    model whose output layer has most of the gradient, as language models have.
    The same arguments give the same choice on every machine, up to rounding.
    Raises ValueError for a budget too small for one value per layer.
    """
    if allocate not in get_args(Allocation):
        raise ValueError(f"allocate is {allocate!r}; it must be one of {', '.join(map(repr, get_args(Allocation)))}")
    bits = None if bits is None else checked_bits(bits)
    if bits is not None and budget_bytes <= SCALE_BYTES:
        raise ValueError(f"budget_bytes is {budget_bytes}; a row of few bits has at least a byte beside its scale of 2")
    check_batches(batches)
    if iter(batches) is batches:
        raise ValueError("batches: they are read twice; pass a list or a DataLoader, not an iterator")
    pilot = Compressor(model, _Pilot(seed), loss_fn, layers=layers, cu_seqlens=cu_seqlens)
    pilot.calibrate(batches)
    gradients = pilot.compress(batch for batch in batches)  # in any order: no warning of a loader that shuffles
    plans = {
        name: _plan(layer, pilot.moments(name), _mean_square(gradients[name]), oversample, whiten, group)
        for name, layer in pilot.layers.items()
    }
    values = budget_bytes // 4 if bits is None else max(_WIDER * budget_bytes, _LEAST_WIDE) // 4
    if values < len(plans):
        raise ValueError(
            f"budget_bytes is {budget_bytes}; {len(plans)} layers need at least {4 * len(plans)}, one value each: "
            "raise it, or track fewer layers with layers="
        )
    picks = _equal(plans, values) if allocate == "equal" else _largest(plans, values)
    total = sum(plan.weight for plan in plans.values()) or 1.0
    options = {name: plan.picked(picks[name]) for name, plan in plans.items()}
    chosen = tuple(
        LayerChoice(
            name,
            tuple(axis.size for axis in plan.axes),
            tuple(option.dim for option in options[name]),
            plan.weight / total,
            math.prod(option.captured for option in options[name]),
        )
        for name, plan in plans.items()
    )
    stored = sum(math.prod(layer.dims) for layer in chosen)
    few = None if bits is None else budget_bytes
    return Choice(_sketch(options, whiten, group, seed), chosen, 4 * stored, bits, few)


class _Pilot(Dropout):
    """Unbiased masks, that tell a gradient's size; calibration finds the covariance of a part of every axis."""

    def __init__(self, seed: int) -> None:
        super().__init__(_PILOT, scale=True, seed=seed)
        self._part = Dropout(_SPAN, seed=seed)

    def statistics_of(self, size: int, dim: int, place: Place) -> Statistics | None:  # noqa: ARG002
        return "survivors"

    def survivors(self, size: int, dim: int, place: Place) -> Axis | None:  # noqa: ARG002
        return self._part.make(size, _SPAN, place)


@dataclass(frozen=True)
class _Option:
    """One size of one axis: ``dim`` values of ``rank`` survivors (1: no rotation), by energy or not."""

    dim: int
    rank: int
    sampling: Sampling
    captured: float


@dataclass(frozen=True)
class _AxisPlan:
    size: int
    options: tuple[_Option, ...]


@dataclass(frozen=True)
class _Plan:
    """A layer's axes, and its weight."""

    axes: tuple[_AxisPlan, ...]
    weight: float

    def picked(self, picks: tuple[int, ...]) -> list[_Option]:
        """Return the options of a combination."""
        return [axis.options[i] for axis, i in zip(self.axes, picks, strict=True)]

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (values stored, weighted energy kept) for every combination of the axes' options."""
        values, kept = np.ones(()), np.full((), self.weight)
        for axis in self.axes:
            values = np.multiply.outer(values, np.array([option.dim for option in axis.options]))
            kept = np.multiply.outer(kept, np.array([option.captured for option in axis.options]))
        return values, kept


def _plan(
    layer: Layer, moments: Mapping[str, Tensor], square: float, oversample: int, whiten: bool, group: int
) -> _Plan:
    rows, columns = layer.matrix_shape
    entries = rows * columns
    vector = layer.in_axis is None
    sides = {"flat" if "flat" in moments else "out": entries} if vector else {"out": rows, "in": columns}
    # A vector is rotated once per sample, not once per position.
    affordable = math.inf if vector else max(entries / 4, _LEAST * _LEAST)
    axes = tuple(
        _AxisPlan(size, _options(size, moments[side], oversample, affordable, whiten, group))
        for side, size in sides.items()
    )
    return _Plan(axes, math.sqrt(square * entries))


def _options(
    size: int, statistics: Tensor, oversample: int, affordable: float, whiten: bool, group: int
) -> tuple[_Option, ...]:
    """Return the sizes to try for an axis, with what each keeps; ``statistics`` are of the whole axis or of a part."""
    factors = whitening(statistics) if whiten else torch.ones(len(statistics), dtype=torch.float64, device="cpu")
    energies = statistics if statistics.ndim == 1 else statistics.diagonal()
    white = (energies * factors.square()).numpy()
    rotation = None
    if statistics.ndim == 2 and oversample > 1:
        rotation = _Rotation.of(factors[:, None] * statistics * factors)
    part = len(energies)
    found = []
    for dim in _sizes(size, group):
        rank = min(size, max(oversample * dim, _LEAST))
        if dim == size:
            found.append(_Option(dim, 1, "uniform", 1.0))
        elif rotation is not None and dim * rank <= affordable:
            found.append(_Option(dim, rank, "uniform", rotation.kept(dim, rank, size)))
        else:
            chance = chances(energies.numpy(), dim * part / size)
            found.append(_Option(dim, 1, "energy", float(chance @ white / (white.sum() or 1.0))))
    return tuple(found)


@dataclass(frozen=True)
class _Rotation:
    """What rotations keep of an axis, from the covariance of a part of it: by its leading directions (``spectrum``),
    and by how much of all coordinates the first so many explain (``explained``)."""

    spectrum: np.ndarray
    explained: np.ndarray

    @classmethod
    def of(cls, covariance: Tensor) -> _Rotation:
        size = len(covariance)
        trace = float(covariance.trace()) or 1.0
        values = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
        # Column j of a Cholesky factor is what coordinate j tells of all, beyond those before it.
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0), device="cpu")
        jitter = 1e-4 * trace / size * torch.eye(size, dtype=covariance.dtype, device="cpu")
        columns = torch.linalg.cholesky(covariance[order][:, order] + jitter).square().sum(0)
        return cls((values.cumsum(0) / trace).numpy(), (columns.cumsum(0) / columns.sum()).numpy())

    def kept(self, dim: int, rank: int, size: int) -> float:
        """Return the share of an axis's energy in ``dim`` directions of ``rank`` survivors of ``size`` coordinates."""
        part = len(self.spectrum)
        seen = max(1, min(dim, dim * part // rank))  # of the part, which stands for the survivors
        told = self.explained[max(1, round(rank * part / size)) - 1]
        return float(self.spectrum[seen - 1] * told)


def _sizes(size: int, group: int) -> list[int]:
    """Return sizes from 1 to the whole axis, in whole runs, each about a tenth more than the one before."""
    found, dim = [], 1.0
    while dim < size:
        whole = math.ceil(dim)
        found.append(whole if whole < group else whole - whole % group)
        dim *= _STEP
    return [*dict.fromkeys([*found, size])]


def _largest(plans: Mapping[str, _Plan], values: int) -> dict[str, tuple[int, ...]]:
    """Choose the options that keep the most energy in ``values`` values, by one price per value for all layers.

    What is left over goes to the layers of most weight.
    """
    tables = {name: plan.tables() for name, plan in plans.items()}

    def at(price: float) -> dict[str, tuple[int, ...]]:
        return {name: _argmax(kept - price * stored) for name, (stored, kept) in tables.items()}

    def used(picks: Mapping[str, tuple[int, ...]]) -> int:
        return sum(int(tables[name][0][pick]) for name, pick in picks.items())

    most = max(plan.weight for plan in plans.values()) or 1.0
    low, high = most * 1e-15, most * 10
    for _ in range(64):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if used(at(middle)) > values else (low, middle)
    picks = at(high)
    for name in sorted(plans, key=lambda n: -plans[n].weight):
        stored, kept = tables[name]
        left = values - used(picks) + int(stored[picks[name]])
        picks[name] = _argmax(np.where(stored <= left, kept, -np.inf))
    return picks


def _argmax(table: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(table.argmax()), table.shape))


def _equal(plans: Mapping[str, _Plan], values: int) -> dict[str, tuple[int, ...]]:
    """Choose the largest size that all axes can have within ``values`` values."""

    def at(dim: int) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(max(i for i, o in enumerate(axis.options) if i == 0 or o.dim <= dim) for axis in plan.axes)
            for name, plan in plans.items()
        }

    sizes = sorted({option.dim for plan in plans.values() for axis in plan.axes for option in axis.options})

    def fits(dim: int) -> bool:
        picks = at(dim)
        return sum(math.prod(o.dim for o in plan.picked(picks[name])) for name, plan in plans.items()) <= values

    return at(max((dim for dim in sizes if fits(dim)), default=1))


def _sketch(options: Mapping[str, list[_Option]], whiten: bool, group: int, seed: int) -> Dropout:
    dims, ranks, samplings = {}, {}, {}
    for name, chosen in options.items():
        out, in_ = (*chosen, _Option(1, 1, "uniform", 1.0))[:2]  # the second of a vector counts nothing
        key = glob.escape(name)
        dims[key] = (out.dim, in_.dim)
        ranks[key] = (out.rank, in_.rank)
        samplings[key] = (out.sampling, in_.sampling)
    return Dropout(dims, rank=ranks, sampling=samplings, whiten=whiten, group=group, seed=seed)


def _mean_square(gradient: Tensor) -> float:
    return float(gradient.double().flatten(1).square().sum(1).mean())
