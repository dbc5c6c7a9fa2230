"""Compressed gradients that are collected batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .gradients import Gradients, Shapes, check_layout
from .origin import Origin
from .outflow import Outflow


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
        self._shapes, self._digest, _ = check_layout(shapes, digest)
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

    def append(self, layers: Mapping[str, Tensor], outflow: Outflow | None = None) -> None:
        """Copy in a batch: layer name -> `[n, *shape]`, in any order of layers, detached.

        With `outflow`, rows on a GPU that are stored on the CPU take that way: they are in when it ends.

        Raises:
            ValueError: a layer is missing or unknown, has another shape, or n differs between layers.
        """
        parts = _columns(layers, self._shapes)
        held = self._buffer.device
        if outflow is not None and held.type == "cpu" and parts[0].device.type != "cpu":
            outflow.put(side_by_side(parts), self._append_rows)
            return
        target = self._grown_by(len(parts[0]))
        # At once: a copy for each layer takes fifteen times as long.
        torch.cat([part.to(held, target.dtype) for part in parts], 1, out=target)

    def _append_rows(self, rows: Tensor) -> None:
        self._grown_by(len(rows)).copy_(rows)

    def finish(self) -> Gradients:
        """Return what was appended and let go of it; copied only if more than half of the buffer is empty."""
        flat = self._buffer[: self._count]
        if 2 * self._count < len(self._buffer):
            flat = flat.clone()
        self._buffer, self._count = self._buffer.new_empty(0, self._buffer.shape[1]), 0
        return Gradients(flat, self._shapes, self._digest, self._origin)

    def _grown_by(self, rows: int) -> Tensor:
        """Return the room of the next rows."""
        start, self._count = self._count, self._count + rows
        if self._count > len(self._buffer):
            grown = self._buffer.new_empty(max(self._count, 2 * len(self._buffer)), self._buffer.shape[1])
            grown[:start].copy_(self._buffer[:start])
            self._buffer = grown
        return self._buffer[start : self._count]


def collect(
    compress: Callable[[Any], tuple[Mapping[str, Tensor], int]],
    batches: Iterable[Any],
    shapes: Shapes,
    digest: Mapping[str, str],
    number: int,
    device: str | torch.device,
    origin: Origin | None,
) -> Gradients:
    """Return the gradients of batches. ``compress(batch) -> (layers, n)``; ``number``: of batches, as far as is known.

    Raises ValueError where there is none.
    """
    builder = None
    with Outflow() as outflow:
        for batch in batches:
            layers, n = compress(batch)
            if builder is None:
                dtype, capacity = _dtype_of(layers), n * number
                builder = GradientsBuilder(shapes, digest, capacity=capacity, dtype=dtype, device=device, origin=origin)
            builder.append(layers, outflow)
    if builder is None:
        raise ValueError("batches: it is empty (or an iterator that is used up); pass at least one batch")
    return builder.finish()


def _dtype_of(layers: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of a batch's gradients, of which no name keeps one alive."""
    return next(iter(layers.values())).dtype


def rows_of(shapes: Shapes, digest: Mapping[str, str], layers: Mapping[str, Tensor]) -> Tensor:
    """Return one batch's gradients side by side, `[n, K]`, in their dtype and on their device."""
    return side_by_side(_columns(layers, check_layout(shapes, digest)[0]))


def _columns(layers: Mapping[str, Tensor], shapes: Shapes) -> list[Tensor]:
    """Return a batch's gradients [n, k] in the order of shapes."""
    if layers.keys() != shapes.keys():
        missing, unknown = shapes.keys() - layers.keys(), layers.keys() - shapes.keys()
        raise ValueError(f"layers must be those of shapes: missing {sorted(missing)}, unknown {sorted(unknown)}")
    rows = len(next(iter(layers.values())))
    for name, shape in shapes.items():
        if layers[name].shape != (rows, *shape):
            found = tuple(layers[name].shape)
            raise ValueError(f"layer {name!r} is {found}; it must be {(rows, *shape)}")
    return [layers[name].detach().flatten(1) for name in shapes]


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return parts [N, k] as one tensor [N, K]: on a GPU as they lie where they are a block's columns, else a copy."""
    width, at = sum(part.shape[1] for part in parts), int(parts[0].storage_offset())
    for part in parts:
        if not part.is_cuda or not _lies_at(part, at, width, parts[0]):
            return torch.cat([part.to(parts[0].device) for part in parts], 1)
        at += part.shape[1]
    return parts[0].as_strided((len(parts[0]), width), (width, 1))


def _lies_at(part: Tensor, offset: int, width: int, first: Tensor) -> bool:
    """Return whether a part [N, k] is a range of columns of rows of this width, in the storage of the first."""
    strides = [stride for size, stride in zip(part.shape, part.stride(), strict=True) if size > 1]
    wanted = [stride for size, stride in zip(part.shape, (width, 1), strict=True) if size > 1]
    is_one = part.dtype == first.dtype and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    return is_one and part.storage_offset() == offset and strides == wanted
