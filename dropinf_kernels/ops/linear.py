"""Compressed gradients of linear maps: both sides are gathered or folded before they are multiplied."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..op import op
from .checks import FLOAT_DTYPES, check_float, check_same_rows, check_table, document_bounds
from .plain import accumulator, cast, columns_of, samples_of, sketch_columns
from .quantize import quantized


def check_linear(
    a: Tensor,
    g: Tensor,
    in_index: Tensor | None,
    in_weight: Tensor | None,
    out_index: Tensor | None,
    out_weight: Tensor | None,
    group: int,
    cu_seqlens: Tensor | None,
) -> None:
    ndims = (3,) if cu_seqlens is None else (2, 3)
    check_float("a", a, *ndims)
    check_float("g", g, *ndims)
    check_same_rows(a, g, "a", a.shape[:-1], g.shape[:-1])
    check_table("in_", in_index, in_weight, a.shape[-1], group)
    check_table("out_", out_index, out_weight, g.shape[-1], group)


def check_output_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"dtype is {dtype}; it must be float16, bfloat16, float32 or float64 (for int8: compress_linear_int8)"
        )


@op(
    lambda c: c.g.new_empty(
        (samples_of(c.g, c.cu_seqlens), columns_of(c.out_index, c.g.shape[-1]), columns_of(c.in_index, c.a.shape[-1])),
        dtype=c.dtype or accumulator(c.a, c.g),
    )
)
def compress_linear(
    a: Tensor,
    g: Tensor,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compress the per-sample gradients of a linear map: `C_n = sum_t (S_out g_nt)(S_in a_nt)^T`.

    a [N, T, d_in], g [N, T, d_out] float -> [N, k_out, k_in] in `dtype`, by default what it accumulates in:
    float32 (float64 if a or g is).
    A side without an index is kept whole. With `cu_seqlens` int32 or int64 [N + 1], a and g are [rows, d]
    or [B, T, d] and rows cu_seqlens[n]:cu_seqlens[n + 1] of the flattened input are document n.
    Raises TypeError, ValueError for bad tables, leading shapes or cu_seqlens.
    Source: the gradient of a linear map factorizes as G_n = sum_t g_nt a_nt^T; S_out G_n S_in^T = C_n.
    """
    check_linear(a, g, in_index, in_weight, out_index, out_weight, group, cu_seqlens)
    check_output_dtype(dtype)
    wide = accumulator(a, g)
    k_in, k_out = columns_of(in_index, a.shape[-1]), columns_of(out_index, g.shape[-1])
    samples = samples_of(g, cu_seqlens)
    # Weights of one survivor per output commute with the product: they scale it where it has fewer values.
    smaller = samples * k_in * k_out < math.prod(g.shape[:-1]) * (k_in + k_out)
    (in_weight, in_scale), (out_weight, out_scale) = (
        (None, w) if smaller and w is not None and w.shape[0] == 1 else (w, None) for w in (in_weight, out_weight)
    )
    kept_a = sketch_columns(a, in_index, in_weight, group, wide)
    kept_g = sketch_columns(g, out_index, out_weight, group, wide)
    out = outer_products(kept_a, kept_g, cu_seqlens)
    if in_scale is not None:
        out.mul_(in_scale.to(wide))
    if out_scale is not None:
        out.mul_(out_scale.to(wide).mT)
    return cast(out, dtype or wide)


compress_linear_int8 = quantized(compress_linear)


def check_into(
    out: Tensor, a: Tensor, g: Tensor, in_index: Tensor | None, out_index: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    check_output_dtype(out.dtype)
    k_out, k_in = columns_of(out_index, g.shape[-1]), columns_of(in_index, a.shape[-1])
    shape = (samples_of(g, cu_seqlens), k_out, k_in)
    if out.shape != shape or (out.numel() and out.stride()[1:] != (k_in, 1)):
        raise ValueError(
            f"out has shape {list(out.shape)} and strides {out.stride()}; it must be {list(shape)}, each sample's part "
            "contiguous, as a range of columns of [N, K] is with .unflatten(1, (k_out, k_in))"
        )


@op(lambda _: None, writes="out")
def compress_linear_into(
    out: Tensor,
    a: Tensor,
    g: Tensor,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Write what `compress_linear` returns into ``out`` [N, k_out, k_in] float, whose samples may lie apart.

    So the layers of a batch fill one [N, K] block, each its range of columns: ``out`` is a view of it.
    Raises TypeError, ValueError as `compress_linear`, and where ``out`` has another shape.
    Source: as `compress_linear`.
    """
    check_into(out, a, g, in_index, out_index, cu_seqlens)
    out.copy_(compress_linear.plain(a, g, in_index, in_weight, out_index, out_weight, group, cu_seqlens, out.dtype))


def outer_products(a: Tensor, g: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return each sample's sum over its rows of g a^T, in the dtype that it accumulates in."""
    wide = accumulator(a, g)
    a, g = cast(a, wide), cast(g, wide)
    if cu_seqlens is None:
        return torch.bmm(g.transpose(1, 2), a)
    a, g = a.flatten(0, -2), g.flatten(0, -2)
    bounds = document_bounds(cu_seqlens, g.shape[0])
    out = g.new_empty(len(bounds) - 1, g.shape[1], a.shape[1])
    for n in range(len(bounds) - 1):
        rows = slice(bounds[n], bounds[n + 1])
        torch.mm(g[rows].t(), a[rows], out=out[n])
    return out
