"""Products of queries with stored rows, without a decoded copy of them where there is a faster way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dropinf_kernels import score_topk, score_topk_bits
from dropinf_kernels.ops.bits import BitQueries
from dropinf_kernels.ops.topk import DIGITS_STEP, INT8_COLUMNS, dot_rows, in_integers, query_digits

from .codec import by_layers

_NARROW = 1024  # columns below which a layer is decoded: its products in integers take longer to add up
_FEW = 4  # queries up to which every layer is decoded: three digits of each are no fewer columns than eight
_TILE_BYTES = 1 << 23  # of products in integers that are held
_DECODED = 1 << 20  # numbers that are decoded at a time
_TILE_ROWS, _MORE_ROWS = 32, 128  # rows of them at least, of few queries and of many: fewer make a slow product


class Stored(NamedTuple):
    """Rows as they are stored: their values [n, K], and what each is multiplied by: [n], [n, layers] or None for 1."""

    values: Tensor
    scale: Tensor | None


class Products:
    """Products of queries [Q, K] with stored rows of layers of these widths."""

    def __init__(self, q: Tensor, widths: tuple[int, ...]) -> None:
        self.q, self.widths = q, widths
        self._queries: BitQueries | None = None

    def dot(self, rows: Stored) -> Tensor:
        """Return `q @ rows^T`, [Q, n], in q's dtype."""
        values, scale = rows.values.to(self.q.device), rows.scale
        if scale is None:
            return dot_rows(self.q, values)
        scale = scale.to(self.q)
        if values.dtype == torch.uint8:  # rows of few bits, of one layer
            return self._of_bits(values).dot(values).mul_(scale)
        if scale.ndim == 1 and len(self.widths) == 1 and values.dtype == torch.int8:
            scale = scale.unsqueeze(1)  # with digits of the queries that are kept
        if scale.ndim == 1:
            return dot_rows(self.q, values).mul_(scale)
        if values.device.type != "cpu":  # few large products
            return dot_rows(self.q, by_layers(values.to(self.q.dtype, copy=True), scale, self.widths))
        if len(self.q) <= _FEW or not self._pieces or not in_integers(self.q, values):
            return self._decoded(values, scale, self._every).t()
        tiles = zip(values.split(self._tile), scale.split(self._tile), strict=True)
        total = torch.cat([self._in_integers(*tile) for tile in tiles])
        return (total + self._decoded(values, scale, self._narrow) if self._narrow else total).t()

    def top(self, values: Tensor, scale: Tensor | None, k: int, offset: int) -> tuple[Tensor, Tensor]:
        """Return the k highest products of every query and their rows, by the op; `scale` [n] or None for 1."""
        if values.dtype != torch.uint8:
            return score_topk(self.q, values, k, c_scale=scale, offset=offset)
        assert scale is not None
        return score_topk_bits(self.q, values, scale, self._bits(values), k, offset=offset)

    def _of_bits(self, codes: Tensor) -> BitQueries:
        """Return the queries as rows of few bits take them, made once."""
        if self._queries is None:
            self._queries = BitQueries(self.q, self._bits(codes))
        return self._queries

    def _bits(self, codes: Tensor) -> int:
        return 8 * codes.shape[1] // self.widths[0]

    def _decoded(self, values: Tensor, scale: Tensor, spans: list[Span]) -> Tensor:
        """Multiply these columns, decoded a tile at a time: one product for many layers, of what the cache holds."""
        total = self.q.new_zeros(len(values), len(self.q))
        step, columns = self._shape
        buffer = self.q.new_empty(step * columns)
        for start in range(0, len(values), step):
            out = total[start : start + step]
            for first, stop, layer, widths in spans:
                tile = buffer[: len(out) * (stop - first)].view(len(out), stop - first)
                tile.copy_(values[start : start + step, first:stop])
                by_layers(tile, scale[start : start + step, layer : layer + len(widths)], widths)
                out.addmm_(tile, self.q[:, first:stop].t())
        return total

    def _in_integers(self, values: Tensor, scale: Tensor) -> Tensor:
        """Multiply int8 values of wide layers with the queries' digits and add up the scaled products."""
        digits, count, weights = self._digits
        exact = torch.empty(len(self._pieces), len(values), len(digits), dtype=torch.int32, device="cpu")
        for out, (_, start, stop) in zip(exact, self._pieces, strict=True):
            torch._int_mm(values[:, start:stop], digits[:, start:stop].t(), out=out)
        parts = exact[:, :, :count].float().mul_(weights.unsqueeze(1))
        parts.mul_(scale[:, [layer for layer, _, _ in self._pieces]].t().unsqueeze(2))
        return parts.sum(0).view(len(values), 3, len(self.q)).sum(1)

    @property
    def _tile(self) -> int:
        """How many rows are multiplied in integers at a time."""
        return max(1, _TILE_BYTES // (4 * max(1, len(self._pieces)) * max(64, 3 * len(self.q))))

    @property
    def _shape(self) -> tuple[int, int]:
        """How many rows are decoded at a time, and how many columns at most."""
        least = max(_TILE_ROWS, min(_MORE_ROWS, 2 * len(self.q)))
        rows = max(least, _DECODED // max(1, sum(self.widths)))
        return rows, _DECODED // rows

    @cached_property
    def _pieces(self) -> list[tuple[int, int, int]]:
        """The wide layers in parts whose products 32 bits hold: (layer, first column, last)."""
        return [
            (layer, k, min(k + INT8_COLUMNS, stop))
            for layer, (start, stop) in enumerate(pairwise(accumulate(self.widths, initial=0)))
            for k in range(start, stop, INT8_COLUMNS)
            if stop - start >= _NARROW
        ]

    @cached_property
    def _every(self) -> list[Span]:
        """All layers."""
        return spans(self.widths, self._shape[1])

    @cached_property
    def _narrow(self) -> list[Span]:
        """The layers that are decoded."""
        return spans(self.widths, self._shape[1], below=_NARROW)

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


class Span(NamedTuple):
    """Neighbouring columns that are decoded together: whole layers, or a part of one."""

    first: int
    stop: int
    layer: int  # the first
    widths: tuple[int, ...]  # columns of each layer that are among these


def spans(widths: tuple[int, ...], columns: int, below: int | None = None) -> list[Span]:
    """Cut layers into spans of up to `columns` columns; `below`: only the layers that are narrower."""
    found: list[Span] = []
    start = 0
    for layer, width in enumerate(widths):
        for first in range(start, start + width, columns):
            stop = min(first + columns, start + width)
            if below is not None and width >= below:
                continue
            last = found[-1] if found else None
            if last is not None and last.stop == first and stop - last.first <= columns:
                found[-1] = Span(last.first, stop, last.layer, (*last.widths, stop - first))
            else:
                found.append(Span(first, stop, layer, (stop - first,)))
        start += width
    return found


class PartProducts:
    """Products of queries [Q, K] with stored rows, apart for each part: some of the layers, by position, ascending."""

    def __init__(self, q: Tensor, widths: tuple[int, ...], parts: Sequence[Sequence[int]]) -> None:
        starts = [0, *accumulate(widths)]
        self.q = q
        self._parts: list[list[tuple[slice, slice, Products]]] = [[] for _ in parts]
        for runs, part in zip(self._parts, parts, strict=True):
            for first, stop in _neighbours(part):
                columns = slice(starts[first], starts[stop])
                runs.append((columns, slice(first, stop), Products(q[:, columns], widths[first:stop])))

    def dot(self, rows: Stored) -> Tensor:
        """Return `q @ rows^T` of each part's columns, [P, Q, n], in q's dtype; 0 for a part without layers."""
        values, scale = rows.values.to(self.q.device), rows.scale
        found = self.q.new_zeros(len(self._parts), len(self.q), len(values))
        for out, runs in zip(found, self._parts, strict=True):
            for columns, layers, products in runs:
                own = scale if scale is None or scale.ndim == 1 else scale[:, layers]
                out += products.dot(Stored(values[:, columns], own))
        return found


def _neighbours(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, one past the last) of each run of neighbouring layers."""
    for _, run in groupby(enumerate(layers), lambda item: item[1] - item[0]):
        found = [layer for _, layer in run]
        yield found[0], found[-1] + 1
