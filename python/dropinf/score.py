"""Scores of training samples for queries: influence, dot product, cosine and relative influence."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from dropinf._cholesky import solver_dtype
from dropinf.fisher import Fisher
from dropinf.gradients import Gradients, GradientsBuilder, GradientSource, block_rows, check_same_sketch
from dropinf_kernels import score_topk

ScoreKind = Literal["influence", "dot", "cosine", "relative"]


class TopK(NamedTuple):
    """The best training samples of each query, best first; equal scores by lowest index."""

    values: Tensor  # [Q, k]
    indices: Tensor  # [Q, k], int64 positions in train


@overload
def score(
    query: GradientSource,
    train: GradientSource,
    fisher: Fisher | None = ...,
    *,
    kind: ScoreKind = ...,
    top: None = ...,
    largest: bool = ...,
) -> Tensor: ...
@overload
def score(
    query: GradientSource,
    train: GradientSource,
    fisher: Fisher | None = ...,
    *,
    kind: ScoreKind = ...,
    top: int,
    largest: bool = ...,
) -> TopK: ...
def score(
    query: GradientSource,
    train: GradientSource,
    fisher: Fisher | None = None,
    *,
    kind: ScoreKind = "influence",
    top: int | None = None,
    largest: bool = True,
) -> Tensor | TopK:
    """Score every training sample for every query. Positive: training on the sample lowers the query's loss.

    Args:
        query: gradients of Q samples.
        train: gradients of N samples, read by row blocks.
        fisher: needed by "influence" and "relative"; the other kinds do not read it.
        kind: "influence" is `c_q^T (F + lambda I)^{-1} c_n`; "dot" is `c_q^T c_n`; "cosine" divides that by
            both norms; "relative" divides influence by the square root of the training sample's
            self-influence (RelatIF: Barshan et al. 2020, arXiv 2003.11630), which holds back outliers.
            A sample whose divisor is zero scores 0.
        top: keep only the best `top` training samples of each query; at most N are returned. The matrix
            `[Q, N]` is never formed.
        largest: with `top`, whether the best are the proponents (most positive, descending) or the opponents
            (most negative, ascending).

    Returns:
        `[Q, N]`, or `TopK` of `[Q, min(top, N)]`; fp32, or fp64 if the gradients are; on the device of
        `fisher` where it is read, and of `query` elsewhere.

    Raises:
        ValueError: unknown kind, missing fisher, `top` below 1, gradients or Fisher of different sketches,
            or a Fisher matrix that is singular with its damping.
    """
    _check_arguments(kind, fisher, top, largest)
    check_same_sketch(query, train, "query and train")
    reads_fisher = kind in ("influence", "relative")
    if fisher is not None and reads_fisher:
        fisher.check(train, "fisher and train")
    dtype = solver_dtype(torch.promote_types(query.dtype, train.dtype))
    q = _query_side(_in_memory(query), fisher, kind).to(dtype)
    if top is not None:
        best = _stream_top(q if largest else -q, train, fisher, kind, top)
        return best if largest else TopK(-best.values, best.indices)
    out = q.new_empty(len(q), len(train))
    for offset, part in train.blocks(block_rows(train)):
        block = out[:, offset : offset + len(part)]
        torch.mm(q, part.flat.to(q.device, dtype).T, out=block)
        scale = _train_scale(part, fisher, kind, q)
        if scale is not None:
            block *= scale
    return out


def self_influence(train: GradientSource, fisher: Fisher) -> Tensor:
    """Return `c_n^T (F + lambda I)^{-1} c_n` of every sample, `[N]`, fp32 or fp64; O(N), streamed.

    Large values mark samples that the rest of the data does not explain: outliers and wrong labels.

    Raises:
        ValueError: a Fisher matrix of another sketch, without samples, or singular with its damping.
    """
    fisher.check(train, "fisher and train")
    return fisher.quadratic(train)


def _check_arguments(kind: str, fisher: Fisher | None, top: int | None, largest: bool) -> None:
    if kind not in get_args(ScoreKind):
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, get_args(ScoreKind)))}")
    if fisher is None and kind in ("influence", "relative"):
        raise ValueError(f"fisher is None; kind={kind!r} needs build_fisher(train), or use kind='dot' or 'cosine'")
    if top is None and not largest:
        raise ValueError("largest is False without top; pass top=k for the k most negative scores")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ValueError(f"top is {top!r}; it must be an int of at least 1, or None for the whole matrix")


def _in_memory(source: GradientSource) -> Gradients:
    if isinstance(source, Gradients):
        return source
    builder = GradientsBuilder(
        source.shapes, source.digest, capacity=len(source), dtype=source.dtype, device=source.device
    )
    for _, part in source.blocks(block_rows(source)):
        builder.append(part.layers)
    return builder.finish()


def _query_side(query: Gradients, fisher: Fisher | None, kind: ScoreKind) -> Tensor:
    """Return the `[Q, K]` whose dot products with training gradients are the scores, but for a scale."""
    if fisher is not None and kind in ("influence", "relative"):
        return fisher.solve(query).flat
    if kind == "cosine":
        flat = query.flat.to(solver_dtype(query.dtype))
        return flat * _reciprocal(_norm(flat, flat.dtype)).unsqueeze(1)
    return query.flat


def _train_scale(part: Gradients, fisher: Fisher | None, kind: ScoreKind, like: Tensor) -> Tensor | None:
    """Return what each training sample's dot products are multiplied with, `[n]`, or None for 1."""
    if kind == "cosine":
        return _reciprocal(_norm(part.flat, like.dtype)).to(like.device)
    if kind == "relative" and fisher is not None:
        return _reciprocal(fisher.quadratic(part).sqrt()).to(like)
    return None


def _norm(flat: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=dtype)
    return norm


def _reciprocal(x: Tensor) -> Tensor:
    """Return `1 / x`, and 0 where x is 0."""
    return torch.where(x > 0, x.reciprocal(), torch.zeros_like(x))


def _stream_top(q: Tensor, train: GradientSource, fisher: Fisher | None, kind: ScoreKind, top: int) -> TopK:
    """Merge the best of each row block into a running best; ties keep the earlier block: the lowest index."""
    values = q.new_empty(len(q), 0)
    indices = torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
    for offset, part in train.blocks(block_rows(train)):
        flat, scale = part.flat.to(q.device), _train_scale(part, fisher, kind, q)
        if scale is not None and q.dtype == torch.float64:
            flat, scale = flat * scale.unsqueeze(1), None  # the op takes fp32 scales
        block_values, block_indices = score_topk(q, flat, top, c_scale=scale, offset=offset)
        values, order = torch.cat([values, block_values], 1).sort(dim=1, descending=True, stable=True)
        indices = torch.cat([indices, block_indices], 1).gather(1, order[:, :top])
        values = values[:, :top]
    return TopK(values.contiguous(), indices)
