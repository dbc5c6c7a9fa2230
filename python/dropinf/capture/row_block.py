"""The compressed gradients of a batch on a GPU, side by side: kernels write them where they leave from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .layer import Layer


class RowBlock:
    """Room for a batch's [N, K] float32 numbers, a range of columns for each layer; made when it is first asked for."""

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._shapes = {name: layer.stored_shape for name, layer in layers.items()}
        self._rooms: dict[str, Tensor] = {}
        self._free: set[str] = set()

    def take(self, name: str, n: int, g: Tensor) -> Tensor | None:
        """Return a layer's room [N, *stored_shape] for what an output gradient on a GPU gives, to be written.

        None where it is taken, and where the rows are of another kind: more samples, another device, float64.
        """
        if g.dtype == torch.float64:
            return None
        if not self._rooms:
            widths = [math.prod(shape) for shape in self._shapes.values()]
            block = torch.empty(n, sum(widths), dtype=torch.float32, device=g.device)
            parts = zip(self._shapes.items(), block.split(widths, 1), strict=True)
            self._rooms = {name: part.unflatten(1, shape) for (name, shape), part in parts}
            self._free = set(self._rooms)
        room = self._rooms[name]
        if name not in self._free or len(room) != n or room.device != g.device:
            return None
        self._free.remove(name)
        return room

    def filled(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch's rows [N, *stored_shape] by layer, all moved into the block if some are there."""
        if not self._rooms:
            return rows
        others = [(self._rooms[name], x) for name, x in rows.items() if x is not self._rooms[name]]
        if any(x.dtype != room.dtype or x.shape != room.shape for room, x in others):
            return rows
        if others:
            # At once, as a launch for each takes longer.
            torch._foreach_copy_([room for room, _ in others], [x for _, x in others])
        return {name: self._rooms[name] for name in rows}
