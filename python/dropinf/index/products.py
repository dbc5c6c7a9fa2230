"""Products of queries with stored rows, without a decoded copy of them where there is a faster way."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf_kernels.ops.topk import DIGITS_STEP, INT8_COLUMNS, dot_rows, in_integers, query_digits

from .codec import by_layers, layer_runs

_NARROW = 64  # columns below which a layer is decoded: its products in integers would be more than its numbers
_TILE_BYTES = 1 << 23  # of products in integers that are held


class Stored(NamedTuple):
    """Rows as they are stored: their values [n, K], and what each is multiplied by: [n], [n, layers] or None for 1."""

    values: Tensor
    scale: Tensor | None


class Products:
    """Products of queries [Q, K] with stored rows of layers of these widths."""

    def __init__(self, q: Tensor, widths: tuple[int, ...]) -> None:
        self.q, self.widths = q, widths

    def dot(self, rows: Stored) -> Tensor:
        """Return `q @ rows^T`, [Q, n], in q's dtype."""
        values, scale = rows.values.to(self.q.device), rows.scale
        if scale is None:
            return dot_rows(self.q, values)
        scale = scale.to(self.q)
        if scale.ndim == 1:
            return dot_rows(self.q, values).mul_(scale)
        if not in_integers(self.q, values):
            return dot_rows(self.q, by_layers(values.to(self.q.dtype, copy=True), scale, self.widths))
        found = self.q.new_empty(len(self.q), len(values))
        for tile in range(0, len(values), self._tile):
            stop = tile + self._tile
            found[:, tile:stop] = self._in_integers(values[tile:stop], scale[tile:stop])
        return found

    def _in_integers(self, values: Tensor, scale: Tensor) -> Tensor:
        """Multiply int8 values with the queries' digits, layer by layer, and add up the scaled products."""
        total = self.q.new_zeros(len(values), len(self.q))
        if self._pieces:
            digits, count, weights = self._digits
            exact = torch.empty(len(self._pieces), len(values), len(digits), dtype=torch.int32, device="cpu")
            for out, (_, start, stop) in zip(exact, self._pieces, strict=True):
                torch._int_mm(values[:, start:stop], digits[:, start:stop].t(), out=out)
            parts = exact[:, :, :count].float().mul_(weights.unsqueeze(1))
            parts.mul_(scale[:, [layer for layer, _, _ in self._pieces]].t().unsqueeze(2))
            total = parts.sum(0).view(len(values), 3, len(self.q)).sum(1)
        for column, layer, count, width in self._narrow:
            columns = slice(column, column + count * width)
            rows = values[:, columns].to(self.q.dtype)
            by_layers(rows, scale[:, layer : layer + count], (width,) * count)
            total += rows @ self.q[:, columns].t()
        return total.t()

    @property
    def _tile(self) -> int:
        """How many rows are multiplied at a time."""
        return max(1, _TILE_BYTES // (4 * max(1, len(self._pieces)) * max(64, 3 * len(self.q))))

    @cached_property
    def _pieces(self) -> list[tuple[int, int, int]]:
        """The wide layers in parts whose products 32 bits hold: (layer, first column, last)."""
        return [
            (layer, k, min(k + INT8_COLUMNS, stop))
            for layer, start, stop in self._spans()
            for k in range(start, stop, INT8_COLUMNS)
            if stop - start >= _NARROW
        ]

    @property
    def _narrow(self) -> list[tuple[int, int, int, int]]:
        """The runs of narrow layers: (first column, first layer, how many layers, width)."""
        return [run for run in layer_runs(self.widths) if run[3] < _NARROW]

    @cached_property
    def _digits(self) -> tuple[Tensor, int, Tensor]:
        """The queries as digits, how many rows these are of, and what the products of each are worth, by piece."""
        steps = torch.stack([part.abs().amax(1) for part in self.q.split(self.widths, 1)], 1) / DIGITS_STEP
        of_column = torch.repeat_interleave(
            torch.arange(len(self.widths), device="cpu"), torch.tensor(self.widths, device="cpu")
        )
        digits, count = query_digits(self.q, steps[:, of_column])
        own = steps[:, [layer for layer, _, _ in self._pieces]].t()  # [pieces, Q]
        return digits, count, torch.cat([own, own * 256, own * 65536], 1)

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """Yield (layer, first column, last) of each layer."""
        for i, (start, stop) in enumerate(pairwise(accumulate(self.widths, initial=0))):
            yield i, start, stop
