"""What to store of each layer, for a budget of bytes per sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from .compressor import Compressor
from .exact import LossFn
from .layers import LayerFilter
from .sketch import Dropout

Allocation = Literal["norm", "energy", "equal"]
_PILOT = 16  # stored per axis to learn how large each layer's gradients are


@dataclass(frozen=True)
class LayerChoice:
    """One layer's part: ``dims`` stored of ``shape``, the layer's ``share`` of the squared gradient norm, and how much
    of its own it keeps, ``captured`` (both estimated on the batches)."""

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
    bytes_per_sample: int

    @property
    def captured(self) -> float:
        """The share of the squared gradient norm of all layers that is kept."""
        return sum(layer.share * layer.captured for layer in self.layers)

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':<{width}}  {'gradient':>15}  {'stored':>11}  {'share':>6}  {'kept':>6}"]
        for layer in self.layers:
            full, stored = ("x".join(map(str, shape)) for shape in (layer.shape, layer.dims))
            lines.append(
                f"{layer.name:<{width}}  {full:>15}  {stored:>11}  {layer.share:>6.1%}  {layer.captured:>6.1%}"
            )
        lines.append(
            f"{self.bytes_per_sample:,} bytes per sample; {self.captured:.1%} of the squared gradient norm kept"
        )
        return "\n".join(lines)


def choose(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    budget_bytes: int,
    allocate: Allocation = "norm",
    oversample: int = 4,
    group: int = 1,
    layers: LayerFilter = None,
    seed: int = 0,
) -> Choice:
    """Choose what to store of each layer so that a sample takes at most ``budget_bytes`` as float32.

    ``batches``: a few hundred samples, read three times. ``allocate``: values per layer in proportion to the root mean
    square norm of its gradients ("norm"), to its square ("energy"), or as equal dims for all ("equal").
    ``oversample``: how many times ``dim`` values are kept before the rotation onto ``dim``; 1 is plain dropout.
    The same arguments give the same choice on every machine, up to rounding.
    Raises ValueError for a budget too small for one value per layer and axis.
    """
    if allocate not in get_args(Allocation):
        raise ValueError(f"allocate is {allocate!r}; it must be one of {', '.join(map(repr, get_args(Allocation)))}")
    if iter(batches) is batches:
        raise ValueError("batches: they are read three times; pass a list or a DataLoader, not an iterator")
    squares, shapes = _norms(model, batches, loss_fn, layers, seed)
    values = budget_bytes // 4
    if values < len(shapes):
        raise ValueError(
            f"budget_bytes is {budget_bytes}; {len(shapes)} layers need at least {4 * len(shapes)}, one value each: "
            "raise it, or track fewer layers with layers="
        )
    if allocate == "equal":
        dims = _equal(shapes, values, group)
    else:
        weights = {n: math.sqrt(v) if allocate == "norm" else v for n, v in squares.items()}
        dims = {n: _dims(shapes[n], v, group) for n, v in _shared(weights, shapes, values).items()}
    sketch = Dropout(
        {_literal(n): (d[0], d[-1]) for n, d in dims.items()},
        rank={_literal(n): oversample * max(d) for n, d in dims.items()} if oversample > 1 else None,
        group=group,
        seed=seed,
    )
    kept = _kept(model, batches, loss_fn, sketch, layers)
    # Of a layer that is kept whole the norm is known, not estimated.
    squares |= {n: kept[n] for n in shapes if dims[n] == shapes[n]}
    total = sum(squares.values()) or 1.0
    chosen = tuple(
        LayerChoice(n, shapes[n], dims[n], squares[n] / total, min(1.0, kept[n] / squares[n]) if squares[n] else 1.0)
        for n in shapes
    )
    return Choice(sketch, chosen, 4 * sum(math.prod(d) for d in dims.values()))


def _norms(
    model: nn.Module, batches: Iterable[Any], loss_fn: LossFn, layers: LayerFilter, seed: int
) -> tuple[dict[str, float], dict[str, tuple[int, ...]]]:
    """Each layer's mean squared gradient norm, by an unbiased mask, and its gradient's shape."""
    compressor = Compressor(model, Dropout(_PILOT, scale=True, seed=seed), loss_fn, layers=layers)
    gradients = compressor.compress(batches)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in compressor.layers.items():
        rows, columns = layer.matrix_shape
        shapes[name] = (rows * columns,) if layer.in_axis is None else (rows, columns)
    return {name: _mean_square(gradients[name]) for name in gradients.layers}, shapes


def _kept(
    model: nn.Module, batches: Iterable[Any], loss_fn: LossFn, sketch: Dropout, layers: LayerFilter
) -> dict[str, float]:
    compressor = Compressor(model, sketch, loss_fn, layers=layers)
    compressor.calibrate(batches)
    gradients = compressor.compress(batches)
    return {name: _mean_square(gradients[name]) for name in gradients.layers}


def _mean_square(gradient: torch.Tensor) -> float:
    return float(gradient.double().flatten(1).square().sum(1).mean())


def _literal(name: str) -> str:
    """A name as a pattern that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _shared(weights: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]], values: int) -> dict[str, int]:
    """Split ``values`` in proportion to the weights: at least 1 each, at most the whole gradient."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    given: dict[str, int] = {}
    left = values - len(sizes)
    open_ = dict(weights)
    while open_:
        total = sum(open_.values()) or 1.0
        full = {n for n, w in open_.items() if 1 + left * w / total >= sizes[n]}
        if not full:
            return given | {n: 1 + int(left * w / total) for n, w in open_.items()}
        for name in full:
            given[name] = sizes[name]
            left -= sizes[name] - 1
            del open_[name]
    return given


def _dims(shape: tuple[int, ...], values: int, group: int) -> tuple[int, ...]:
    """Dims of a layer within its share: a square, or what a short axis leaves to the other."""
    if len(shape) == 1:
        return (_runs(min(values, shape[0]), shape[0], group),)
    side = math.isqrt(values)
    rows = _runs(min(shape[0], max(side, values // shape[1])), shape[0], group)
    return rows, _runs(
        min(shape[1], max(1, values // rows)) if rows == shape[0] else min(shape[1], side), shape[1], group
    )


def _runs(dim: int, size: int, group: int) -> int:
    """A dim of whole runs, where it is not the whole axis or less than one run."""
    return dim if dim == size or dim < group else dim - dim % group


def _equal(shapes: Mapping[str, tuple[int, ...]], values: int, group: int) -> dict[str, tuple[int, ...]]:
    """The largest dim that all axes can have."""

    def at(dim: int) -> dict[str, tuple[int, ...]]:
        return {n: tuple(_runs(min(dim, size), size, group) for size in shape) for n, shape in shapes.items()}

    low, high = 1, max(max(shape) for shape in shapes.values())
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum(math.prod(d) for d in at(middle).values()) <= values
        low, high = (middle, high) if fits else (low, middle - 1)
    return at(low)
