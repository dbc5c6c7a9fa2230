"""The ops as Python functions: the bare body in eager mode, the registered op under torch.compile.

A call of a registered op costs 6 to 60 microseconds more than its body. No function is differentiable;
none depends on autocast; all take non-contiguous and empty inputs. An `index` is int32 [fan_in, k] and
a `weight` float32 [fan_in, k] throughout: (S x)[j] = sum_f weight[f, j] * x[index[f, j]], without a
weight 1. `group` > 1 promises that each row of an index consists of runs start, ..., start + group - 1
with `start` a multiple of `group`; `group` must divide the axis and k. A wrong dtype raises TypeError,
a wrong shape ValueError, an index or id outside its axis IndexError or torch's RuntimeError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import bodies
from . import ops as _ops  # noqa: F401  registers torch.ops.dropinf

P = ParamSpec("P")
R = TypeVar("R")


def _call(op: Any, body: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    if not torch.compiler.is_compiling():
        return body(*args, **kwargs)
    with torch.no_grad():
        result: R = op(*args, **kwargs)
        return result


def sketch(x: Tensor, index: Tensor, weight: Tensor | None = None, group: int = 1) -> Tensor:
    """Sketch the last axis: `out[..., j] = sum_f weight[f, j] * x[..., index[f, j]]`.

    x [..., d] float -> [..., k] in x's dtype, accumulated in float32 (float64 for float64).
    Raises TypeError, ValueError for a bad table, RuntimeError or IndexError for an index outside [0, d).
    Source: dropout compression, Zhang & Amiri, arXiv 2509.15651; fan_in > 1 with signs is a
    sparse Johnson-Lindenstrauss transform of the survivors (GraSS, arXiv 2505.18976).
    """
    return _call(torch.ops.dropinf.sketch, bodies.sketch, x, index, weight, group)


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
    return _call(
        torch.ops.dropinf.compress_linear,
        bodies.compress_linear,
        a,
        g,
        in_index,
        in_weight,
        out_index,
        out_weight,
        group,
        cu_seqlens,
        dtype,
    )


def compress_conv(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    group: int = 1,
) -> Tensor:
    """Compress the per-sample gradients of a 1d, 2d or 3d convolution with zero padding.

    x [N, C_in, *S], g [N, C_out, *O] float -> [N, k_out, k_in] float32 (float64 if x or g is).
    The gradient is viewed as [C_out, (C_in / groups) * prod(kernel_size)] in the weight's memory order:
    out_index points into C_out, in_index into the product. Rows that fold output channels of several
    groups sum them. Only kept taps are gathered, in chunks of about 4 MiB; runs (`group`) gain nothing.
    Raises TypeError, ValueError for bad tables, windows or shapes, IndexError for an index out of range.
    Source: C_n = S_out G_n S_in^T, where
    G_n[o, (c, u)] = sum_p g_n[o, p] * x_n[c, p * stride - padding + u * dilation].
    """
    return _call(
        torch.ops.dropinf.compress_conv,
        bodies.compress_conv,
        x,
        g,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        in_index,
        in_weight,
        out_index,
        out_weight,
        group,
    )


def sketch_patches(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    index: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Sketch the patches that a convolution with one group reads, without unfolding them.

    x [N, C_in, *S] float -> [N, T_out, k] in x's dtype, T_out the number of output positions;
    index points into C_in * prod(kernel_size).
    Raises TypeError, ValueError for a bad table or window, IndexError for an index out of range.
    Source: S_in applied to the columns of im2col (torch.nn.functional.unfold).
    """
    return _call(
        torch.ops.dropinf.sketch_patches,
        bodies.sketch_patches,
        x,
        kernel_size,
        stride,
        padding,
        dilation,
        index,
        weight,
    )


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
    """Compress the per-sample gradients of an embedding, by lookup instead of one-hot vectors.

    ids int32 or int64 [N, T], g [N, T, d_out] float -> [N, k_out, k_in] float32 (float64 if g is).
    in_index points into num_embeddings, and may name a row several times. Positions whose id is
    `padding_idx` contribute 0; -1 means none. `cu_seqlens` as in compress_linear, with ids [rows] or [B, T].
    Raises TypeError, ValueError for bad tables or shapes, IndexError for an id outside [0, num_embeddings).
    Source: compress_linear with a_nt the one-hot of ids[n, t].
    """
    return _call(
        torch.ops.dropinf.compress_embedding,
        bodies.compress_embedding,
        ids,
        g,
        num_embeddings,
        in_index,
        in_weight,
        out_index,
        out_weight,
        padding_idx,
        group,
        cu_seqlens,
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
    return _call(torch.ops.dropinf.compress_norm, bodies.compress_norm, a, g, index, weight, group, cu_seqlens)


def compress_flat(a: Tensor, g: Tensor, rows: Tensor, cols: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Gather k entries of each per-sample gradient: `sum_t g[n, t, rows[i]] * a[n, t, cols[i]]`.

    a [N, T, d_in] float, or ids int32 or int64 [N, T] that stand for their one-hot vectors;
    g [N, T, d_out] float; rows, cols int32 [k] -> [N, k] float32 (float64 if a or g is).
    `cu_seqlens` as in compress_linear. Ids that no column names contribute 0.
    Raises TypeError, ValueError for bad dtypes or shapes, IndexError or RuntimeError for an entry out
    of range.
    Source: entry (rows[i], cols[i]) of G_n = sum_t g_nt a_nt^T (mode "flat").
    """
    return _call(torch.ops.dropinf.compress_flat, bodies.compress_flat, a, g, rows, cols, cu_seqlens)


def _int8(
    compress: Callable[..., Tensor], body: Callable[P, tuple[Tensor, Tensor]]
) -> Callable[P, tuple[Tensor, Tensor]]:
    """Return the variant of `compress` that quantizes each sample's gradient in the same pass."""
    op = getattr(torch.ops.dropinf, body.__name__)

    @functools.wraps(body)
    def call(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, Tensor]:
        return _call(op, body, *args, **kwargs)

    call.__module__, call.__qualname__ = __name__, body.__name__
    name = compress.__name__
    call.__doc__ = f"""Compress as {name} does, and quantize each sample as quantize_rows does, in one pass.

    Takes what {name} takes, but no `dtype`. Returns int8 values of the same shape and the scale of each
    sample, float32 [N]; a gradient that is not finite has scale NaN and values 0 on a GPU, and raises ValueError
    elsewhere. Raises as {name}.
    Source: see {name} and quantize_rows.
    """
    return call


compress_linear_int8 = _int8(compress_linear, bodies.compress_linear_int8)
compress_conv_int8 = _int8(compress_conv, bodies.compress_conv_int8)
compress_embedding_int8 = _int8(compress_embedding, bodies.compress_embedding_int8)
compress_norm_int8 = _int8(compress_norm, bodies.compress_norm_int8)
compress_flat_int8 = _int8(compress_flat, bodies.compress_flat_int8)


def gram_update(F: Tensor, C: Tensor, c_scale: Tensor | None = None) -> None:
    """Add `C^T C` to a symmetric F in place, leaving it exactly symmetric.

    F [K, K] float32 or float64, C [N, K] float, or int8 with c_scale float32 [N], which multiplies its rows.
    Only one triangle of F is read.
    Raises TypeError, ValueError for bad dtypes or shapes, or a missing c_scale.
    Source: the empirical Fisher matrix, F = (1/N) sum_n c_n c_n^T, before the division.
    """
    return _call(torch.ops.dropinf.gram_update, bodies.gram_update, F, C, c_scale)


def score_topk(q: Tensor, c: Tensor, k: int, c_scale: Tensor | None = None, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Return the k highest scores of every query over all rows of c, never holding [Q, N].

    q [Q, K] float; c [N, K] float, or int8 with c_scale float32 [N] -> values [Q, min(k, N)] float32
    (float64 if q or c is), descending, and indices int64, raised by `offset`. Ties: lowest index first.
    Raises TypeError, ValueError for bad dtypes, shapes, a missing c_scale or a negative k.
    Source: the rows of q @ (c * c_scale[:, None])^T.
    """
    return _call(torch.ops.dropinf.score_topk, bodies.score_topk, q, c, k, c_scale, offset)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8 with one scale, symmetric: `q = round(x / scale)`, `scale = max|x| / 127`.

    x [N, K] float -> q int8 [N, K], scale float32 [N]; a zero row has scale 0 and q 0.
    Raises ValueError naming the first row with a value that is not finite.
    Source: absmax quantization per row (LLM.int8(), arXiv 2208.07339, section 2).
    """
    return _call(torch.ops.dropinf.quantize_rows, bodies.quantize_rows, x)


def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `q * scale[:, None]` in `dtype`, the inverse of quantize_rows up to half a scale.

    q int8 [N, K], scale float32 [N] -> [N, K].
    Raises TypeError, ValueError for bad dtypes or shapes.
    Source: see quantize_rows.
    """
    return _call(torch.ops.dropinf.dequantize_rows, bodies.dequantize_rows, q, scale, dtype)
