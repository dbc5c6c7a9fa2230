"""Compressed gradients that are collected batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .gradients import Gradients, Origin, Shapes, check_layout


class GradientsBuilder:
    """Collects batches of compressed gradients in one growing buffer.

    Args:
        shapes: layer name -> per-sample shape, in column order.
        digest: layer name -> hex digest of the sketch's tables.
        capacity: expected number of samples. With the exact number nothing is ever copied twice; the buffer
            doubles when it runs out.
        dtype: what is stored; batches are cast as they are copied in.
        device: where it is stored.
        origin: the model and the loss that made it.
    """

    def __init__(
        self,
        shapes: Shapes,
        digest: Mapping[str, str],
        *,
        capacity: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        origin: Origin | None = None,
    ) -> None:
        self._shapes, self._digest, self._columns = check_layout(shapes, digest)
        if capacity < 0:
            raise ValueError(f"capacity is {capacity}; it must be a number of samples, 0 if unknown")
        width = sum(map(math.prod, self._shapes.values()))
        try:
            self._buffer = torch.empty(capacity, width, dtype=dtype, device=device)
        except RuntimeError:  # out of memory: the first batch may have been the largest by far
            self._buffer = torch.empty(0, width, dtype=dtype, device=device)
        self._count, self._origin = 0, origin

    def __len__(self) -> int:
        return self._count

    def append(self, layers: Mapping[str, Tensor]) -> None:
        """Copy in a batch: layer name -> `[n, *shape]`, in any order of layers, detached.

        Raises:
            ValueError: a layer is missing or unknown, has another shape, or n differs between layers.
        """
        if layers.keys() != self._shapes.keys():
            missing, unknown = self._shapes.keys() - layers.keys(), layers.keys() - self._shapes.keys()
            raise ValueError(f"layers must be those of shapes: missing {sorted(missing)}, unknown {sorted(unknown)}")
        rows = len(next(iter(layers.values())))
        for name, shape in self._shapes.items():
            if layers[name].shape != (rows, *shape):
                found = tuple(layers[name].shape)
                raise ValueError(f"layer {name!r} is {found}; it must be {(rows, *shape)}")
        self._reserve(self._count + rows)
        target = self._buffer[self._count : self._count + rows]
        for name, columns in self._columns.items():
            target[:, columns].copy_(layers[name].detach().flatten(1))
        self._count += rows

    def finish(self) -> Gradients:
        """Return what was appended and let go of it; copied only if more than half of the buffer is empty."""
        flat = self._buffer[: self._count]
        if 2 * self._count < len(self._buffer):
            flat = flat.clone()
        self._buffer, self._count = self._buffer.new_empty(0, self._buffer.shape[1]), 0
        return Gradients(flat, self._shapes, self._digest, self._origin)

    def _reserve(self, rows: int) -> None:
        if rows <= len(self._buffer):
            return
        grown = self._buffer.new_empty(max(rows, 2 * len(self._buffer)), self._buffer.shape[1])
        grown[: self._count].copy_(self._buffer[: self._count])
        self._buffer = grown


def kind_of(layers: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and device of a batch's gradients; no name for one of them would keep it alive."""
    first = next(iter(layers.values()))
    return first.dtype, first.device


def rows_of(shapes: Shapes, digest: Mapping[str, str], layers: Mapping[str, Tensor], count: int) -> Tensor:
    """Return one batch's gradients side by side, `[count, K]`, in their dtype and on their device."""
    dtype, device = kind_of(layers)
    builder = GradientsBuilder(shapes, digest, capacity=count, dtype=dtype, device=device)
    builder.append(layers)
    return builder.finish().flat
