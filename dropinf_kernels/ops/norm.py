"""Compressed gradients of elementwise scales and of biases."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import op
from .checks import check_float, check_same_rows, check_table, document_bounds
from .plain import BUFFER_BYTES, accumulator, columns_of, gather_columns, samples_of, sketch_columns
from .quantize import quantized


def check_norm(
    a: Tensor | None, g: Tensor, index: Tensor | None, weight: Tensor | None, group: int, cu_seqlens: Tensor | None
) -> None:
    ndims = (3,) if cu_seqlens is None else (2, 3)
    check_float("g", g, *ndims)
    if a is not None:
        check_float("a", a, *ndims)
        check_same_rows(a, g, "a", a.shape, g.shape)
    check_table("", index, weight, g.shape[-1], group)


@op(
    lambda c: c.g.new_empty(
        samples_of(c.g, c.cu_seqlens), columns_of(c.index, c.g.shape[-1]), dtype=accumulator(c.a, c.g)
    )
)
def compress_norm(
    a: Tensor | None,
    g: Tensor,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compress the per-sample gradients of an elementwise scale, or of a bias when `a` is None.

    a [N, T, d] or None (ones), g [N, T, d] float -> [N, k] float32 (float64 if a or g is): the sketch of
    sum_t a_nt * g_nt. `cu_seqlens` as in compress_linear.
    Raises TypeError, ValueError for a bad table, shapes that differ, or bad cu_seqlens.
    Source: y = w * a + b has dL/dw = sum_t a_nt * g_nt and dL/db = sum_t g_nt.
    """
    check_norm(a, g, index, weight, group, cu_seqlens)
    dtype = accumulator(a, g)
    if index is not None and index.shape[0] == 1:
        # One survivor per output: the sum needs the kept columns alone.
        a, g = None if a is None else gather_columns(a, index[0], group), gather_columns(g, index[0], group)
        total = sum_products(a, g, cu_seqlens, dtype)
        return total if weight is None else total.mul_(weight[0].to(dtype))
    # The sketch is linear: applied to the sum, it sees N rows instead of N * T.
    return sketch_columns(sum_products(a, g, cu_seqlens, dtype), index, weight, group, dtype)


compress_norm_int8 = quantized(compress_norm)


def sum_products(a: Tensor | None, g: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return sum_t a_nt * g_nt per sample, or per document, in `dtype`; no `a` means ones."""
    if cu_seqlens is not None:
        g = g.flatten(0, -2)
        a = None if a is None else a.flatten(0, -2)
        bounds = document_bounds(cu_seqlens, g.shape[0])
        out = g.new_empty(len(bounds) - 1, g.shape[1], dtype=dtype)
        for n in range(len(bounds) - 1):
            rows = slice(bounds[n], bounds[n + 1])
            product = g[rows] if a is None else g[rows].to(dtype) * a[rows]
            torch.sum(product, 0, dtype=dtype, out=out[n])
        return out
    samples = max(1, BUFFER_BYTES // max(1, g.shape[1] * g.shape[2] * dtype.itemsize))
    out = g.new_empty(g.shape[0], g.shape[2], dtype=dtype)
    for n in range(0, g.shape[0], samples):
        block = slice(n, n + samples)
        product = g[block] if a is None else g[block].to(dtype) * a[block]
        torch.sum(product, 1, dtype=dtype, out=out[block])
    return out
