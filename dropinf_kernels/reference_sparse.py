"""Compressed gradients that are lookups: embeddings, and single entries of a flattened gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import (
    ID_DTYPES,
    check_bounds,
    check_flat,
    check_float,
    check_ids,
    check_same_rows,
    check_table,
    document_bounds,
)
from .reference import BUFFER_BYTES, accumulator, exact, gather_columns, sketch_columns

# Gathered blocks of this size stay in a core's cache until they are multiplied.
_CACHE_BYTES = 1 << 20


@dataclass(frozen=True)
class _Lookup:
    """Entries of a table sorted by the vocabulary row they read."""

    keys: Tensor  # sorted vocabulary rows
    entry: Tensor  # where each came from in the flattened table

    @classmethod
    def build(cls, rows: Tensor) -> _Lookup:
        keys, entry = torch.sort(rows.flatten().long(), stable=True)
        return cls(keys, entry)

    def matches(self, ids: Tensor, skip: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (token, entry) for each pair of an id and an entry that reads it, `limit` pairs at a time."""
        ids = ids.long()
        first = torch.searchsorted(self.keys, ids)
        count = torch.searchsorted(self.keys, ids, right=True) - first
        count.masked_fill_(ids == skip, 0)
        ends = count.cumsum(0)
        total, limit = int(ends[-1]) if ends.numel() else 0, max(1, limit)
        for start in range(0, total, limit):
            pair = torch.arange(start, min(start + limit, total), device=ids.device)
            token = torch.searchsorted(ends, pair, right=True)
            yield token, self.entry[first[token] + pair - (ends - count)[token]]


def _add_at(out: Tensor, where: Tensor, values: Tensor) -> None:
    if out.is_cuda:
        # index_add_ would use atomics there, whose order changes from run to run.
        out.index_put_((where,), values, accumulate=True)
    else:
        out.index_add_(0, where, values)


def _sample_bounds(ids: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Return where each sample, or document, starts in the flattened ids, and their end."""
    if cu_seqlens is not None:
        return document_bounds(cu_seqlens, ids.numel())
    return [n * ids.shape[1] for n in range(ids.shape[0] + 1)]


def _sample_of_row(bounds: list[int], device: torch.device) -> Tensor:
    """Return the sample that each row belongs to."""
    edges = torch.tensor(bounds, device=device)
    return torch.repeat_interleave(torch.arange(len(bounds) - 1, device=device), edges.diff())


def check_embedding(
    ids: Tensor,
    g: Tensor,
    num_embeddings: int,
    in_index: Tensor | None,
    in_weight: Tensor | None,
    out_index: Tensor | None,
    out_weight: Tensor | None,
    group: int,
    cu_seqlens: Tensor | None,
) -> None:
    check_ids("ids", ids, *((2,) if cu_seqlens is None else (1, 2)))
    check_float("g", g, ids.dim() + 1)
    check_same_rows(ids, g, "ids", ids.shape, g.shape[:-1])
    check_table("in_", in_index, in_weight, num_embeddings, group)
    check_table("out_", out_index, out_weight, g.shape[-1], group)


@exact
def compress_embedding(
    ids: Tensor,
    g: Tensor,
    num_embeddings: int,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    padding_idx: int = -1,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    check_embedding(ids, g, num_embeddings, in_index, in_weight, out_index, out_weight, group, cu_seqlens)
    check_bounds("ids", ids, num_embeddings)
    dtype = accumulator(g)
    bounds = _sample_bounds(ids, cu_seqlens)
    k_in = num_embeddings if in_index is None else in_index.shape[1]
    k_out = g.shape[-1] if out_index is None else out_index.shape[1]
    table = torch.arange(num_embeddings, device=ids.device) if in_index is None else in_index
    lookup, coefficients = _Lookup.build(table), None if in_weight is None else in_weight.flatten().to(dtype)
    flat_g = g.flatten(0, -2)
    sample = _sample_of_row(bounds, ids.device)
    out = g.new_zeros((len(bounds) - 1) * k_out * k_in, dtype=dtype)
    limit = BUFFER_BYTES // (16 * max(1, g.shape[-1]))  # rows of g, places and values of one match
    lanes = torch.arange(k_out, device=ids.device) * k_in
    for token, entry in lookup.matches(ids.flatten(), padding_idx, limit):
        kept = sketch_columns(flat_g[token], out_index, out_weight, group, dtype)
        if coefficients is not None:
            kept = kept * coefficients[entry].unsqueeze(1)
        # Few ids meet a kept row, so scattered adds into the output beat a transposed copy of it.
        where = (sample[token] * (k_out * k_in) + entry % k_in).unsqueeze(1) + lanes
        _add_at(out, where.flatten(), kept.flatten())
    return out.view(len(bounds) - 1, k_out, k_in)


@exact
def compress_flat(a: Tensor, g: Tensor, rows: Tensor, cols: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    check_flat(a, g, rows, cols, cu_seqlens)
    if a.dtype in ID_DTYPES:
        return _flat_ids(a, g, rows, cols, cu_seqlens)
    if cu_seqlens is None:
        return _flat_dense(a, g, rows, cols)
    a, g = a.flatten(0, -2), g.flatten(0, -2)
    bounds = document_bounds(cu_seqlens, g.shape[0])
    out = g.new_empty(len(bounds) - 1, rows.numel(), dtype=accumulator(a, g))
    for n in range(len(bounds) - 1):
        part = slice(bounds[n], bounds[n + 1])
        out[n] = _flat_dense(a[None, part], g[None, part], rows, cols)[0]
    return out


def _flat_dense(a: Tensor, g: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    dtype = accumulator(a, g)
    samples, t, k = g.shape[0], g.shape[1], rows.numel()
    out = g.new_empty(samples, k, dtype=dtype)
    # Many entries read each column several times; then it pays to make columns contiguous first.
    turned = t >= 8 and k > 2 * max(a.shape[-1], g.shape[-1])
    line = max(1, t * dtype.itemsize)
    step = max(1, _CACHE_BYTES // (line * max(1, k)))
    width = max(1, min(max(1, k), _CACHE_BYTES // line))
    for n in range(0, samples, step):
        block = slice(n, n + step)
        left, right = g[block], a[block]
        if turned:
            left, right = left.transpose(1, 2).contiguous(), right.transpose(1, 2).contiguous()
        for i in range(0, k, width):
            part = slice(i, i + width)
            if turned:
                product = left.index_select(1, rows[part]).to(dtype)
                out[block, part] = product.mul_(right.index_select(1, cols[part])).sum(2)
            else:
                product = gather_columns(left, rows[part], 1).to(dtype)
                out[block, part] = product.mul_(gather_columns(right, cols[part], 1)).sum(1)
    return out


def _flat_ids(ids: Tensor, g: Tensor, rows: Tensor, cols: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`a` is the one-hot of `ids`: only the entries whose column some id names are touched."""
    dtype = accumulator(g)
    k = rows.numel()
    if not rows.is_cuda:
        check_bounds("rows", rows, g.shape[-1])
    bounds = _sample_bounds(ids, cu_seqlens)
    sample = _sample_of_row(bounds, ids.device)
    flat_g = g.flatten(0, -2)
    out = g.new_zeros((len(bounds) - 1) * k, dtype=dtype)
    for token, entry in _Lookup.build(cols).matches(ids.flatten(), -1, BUFFER_BYTES // 64):
        _add_at(out, sample[token] * k + entry, flat_g[token, rows[entry].long()].to(dtype))
    return out.view(len(bounds) - 1, k)
