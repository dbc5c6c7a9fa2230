"""Single entries of per-sample gradients, flattened."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import op
from .checks import ID_DTYPES, check_bounds, check_float, check_same_rows, document_bounds
from .plain import BUFFER_BYTES, Lookup, accumulator, add_at, gather_columns, sample_bounds, sample_of_row, samples_of
from .quantize import quantized

# Gathered blocks of this size stay in a core's cache until they are multiplied.
_CACHE_BYTES = 1 << 20


def check_flat(a: Tensor, g: Tensor, rows: Tensor, cols: Tensor, cu_seqlens: Tensor | None) -> None:
    ndims = (3,) if cu_seqlens is None else (2, 3)
    check_float("g", g, *ndims)
    sparse = a.dtype in ID_DTYPES
    if not sparse:
        check_float("a", a, *ndims)
    check_same_rows(a, g, "a", a.shape if sparse else a.shape[:-1], g.shape[:-1])
    for name, index in (("rows", rows), ("cols", cols)):
        if index.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {index.dtype}; it must be int32: use {name}.int()")
        if index.dim() != 1 or index.shape != rows.shape:
            raise ValueError(f"{name} has shape {list(index.shape)}; rows and cols must both be [k]")


@op(lambda c: c.g.new_empty(samples_of(c.g, c.cu_seqlens), c.rows.shape[0], dtype=accumulator(c.a, c.g)))
def compress_flat(a: Tensor, g: Tensor, rows: Tensor, cols: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Gather k entries of each per-sample gradient: `sum_t g[n, t, rows[i]] * a[n, t, cols[i]]`.

    a [N, T, d_in] float, or ids int32 or int64 [N, T] that stand for their one-hot vectors;
    g [N, T, d_out] float; rows, cols int32 [k] -> [N, k] float32 (float64 if a or g is).
    `cu_seqlens` as in compress_linear. Ids that no column names contribute 0.
    Raises TypeError, ValueError for bad dtypes or shapes, IndexError or RuntimeError for an entry out
    of range.
    Source: entry (rows[i], cols[i]) of G_n = sum_t g_nt a_nt^T (mode "flat").
    """
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


compress_flat_int8 = quantized(compress_flat)


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
    """Gather entries where `a` is the one-hot of `ids`; only entries whose column some id names are touched."""
    dtype = accumulator(g)
    k = rows.numel()
    if not rows.is_cuda:
        check_bounds("rows", rows, g.shape[-1])
    bounds = sample_bounds(ids, cu_seqlens)
    sample = sample_of_row(bounds, ids.device)
    flat_g = g.flatten(0, -2)
    out = g.new_zeros((len(bounds) - 1) * k, dtype=dtype)
    for token, entry in Lookup.build(cols).matches(ids.flatten(), -1, BUFFER_BYTES // 64):
        add_at(out, sample[token] * k + entry, flat_g[token, rows[entry].long()].to(dtype))
    return out.view(len(bounds) - 1, k)
