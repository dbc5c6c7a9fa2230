"""Compressed gradients of embeddings, by lookup instead of one-hot vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import op
from .checks import check_bounds, check_float, check_ids, check_same_rows, check_table
from .plain import (
    BUFFER_BYTES,
    Lookup,
    accumulator,
    add_at,
    columns_of,
    sample_bounds,
    sample_of_row,
    samples_of,
    sketch_columns,
)
from .quantize import quantized


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


@op(
    lambda c: c.g.new_empty(
        (
            samples_of(c.g, c.cu_seqlens),
            columns_of(c.out_index, c.g.shape[-1]),
            columns_of(c.in_index, c.num_embeddings),
        ),
        dtype=accumulator(c.g),
    )
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
    check_embedding(ids, g, num_embeddings, in_index, in_weight, out_index, out_weight, group, cu_seqlens)
    check_bounds("ids", ids, num_embeddings)
    dtype = accumulator(g)
    bounds = sample_bounds(ids, cu_seqlens)
    k_in, k_out = columns_of(in_index, num_embeddings), columns_of(out_index, g.shape[-1])
    table = torch.arange(num_embeddings, device=ids.device) if in_index is None else in_index
    lookup, coefficients = Lookup.build(table), None if in_weight is None else in_weight.flatten().to(dtype)
    flat_g = g.flatten(0, -2)
    sample = sample_of_row(bounds, ids.device)
    out = g.new_zeros((len(bounds) - 1) * k_out * k_in, dtype=dtype)
    limit = BUFFER_BYTES // (16 * max(1, g.shape[-1]))  # rows of g, places and values of one match
    lanes = torch.arange(k_out, device=ids.device) * k_in
    for token, entry in lookup.matches(ids.flatten(), padding_idx, limit):
        kept = sketch_columns(flat_g[token], out_index, out_weight, group, dtype)
        if coefficients is not None:
            kept = kept * coefficients[entry].unsqueeze(1)
        # Few ids meet a kept row, so scattered adds into the output beat a transposed copy of it.
        where = (sample[token] * (k_out * k_in) + entry % k_in).unsqueeze(1) + lanes
        add_at(out, where.flatten(), kept.flatten())
    return out.view(len(bounds) - 1, k_out, k_in)


compress_embedding_int8 = quantized(compress_embedding)
