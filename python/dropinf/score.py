"""Scores of training samples for queries: influence, dot product, cosine and relative influence."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args, overload

import torch
import torch.distributed as dist
from torch import Tensor

from dropinf_kernels.ops.plain import BUFFER_BYTES
from dropinf_kernels.ops.topk import topk_lowest_index

from .builder import GradientsBuilder
from .files import new_array, open_array
from .fisher.fisher import Fisher
from .gradients import (
    At,
    Gradients,
    GradientSource,
    RunKind,
    Sketched,
    StepScores,
    Traced,
    block_rows,
    check_same_sketch,
    placed_blocks,
    share_of,
)
from .index.coded import check_few_bits, check_one_code, queries_of
from .index.export import check_outside
from .index.products import PartProducts, Products, Stored
from .index.reader import Index
from .origin import check_one_model
from .ranks import Ranks
from .score_by import By, ScoreParts, Sources, taken_apart

ScoreKind = Literal["influence", "dot", "cosine", "relative"]
Reduce = Literal["mean", "max"]


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
    reduce: Reduce | None = ...,
    out: str | os.PathLike[str] | None = ...,
    group: dist.ProcessGroup | None = ...,
    other_model: bool = ...,
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
    group: dist.ProcessGroup | None = ...,
    other_model: bool = ...,
) -> TopK: ...


@overload
def score(
    query: GradientSource,
    train: GradientSource,
    fisher: Fisher | None = ...,
    *,
    kind: ScoreKind = ...,
    by: By,
    sources: Sources | None = ...,
    group: dist.ProcessGroup | None = ...,
    other_model: bool = ...,
) -> ScoreParts: ...


@overload
def score(
    query: GradientSource,
    train: Traced,
    *,
    kind: RunKind,
    reduce: Reduce | None = ...,
    curvature: bool = ...,
    gamma: float = ...,
    window: int = ...,
    other_model: bool = ...,
) -> StepScores: ...


def score(
    query: GradientSource,
    train: GradientSource | Traced,
    fisher: Fisher | None = None,
    *,
    kind: ScoreKind | RunKind = "influence",
    top: int | None = None,
    largest: bool = True,
    reduce: Reduce | None = None,
    by: By | None = None,
    sources: Sources | None = None,
    out: str | os.PathLike[str] | None = None,
    group: dist.ProcessGroup | None = None,
    other_model: bool = False,
    **of_run: Any,
) -> Tensor | TopK | ScoreParts | StepScores:
    """Score every training sample for every query. Positive: training on the sample lowers the query's loss.

    Args:
        query: gradients of Q samples.
        train: gradients of N samples, read by row blocks; or a recorded run, of which each sample's part of each step
            is scored: see `dropinf.recording.score_run` for its kinds "adamw" and "tracin", and their options.
        fisher: needed by "influence" and "relative"; the other kinds do not read it. Rows of few bits have theirs in
            their code, and take none.
        kind: "influence" is `c_q^T (F + lambda I)^{-1} c_n`; "dot" is `c_q^T c_n`; "cosine" divides that by
            both norms; "relative" divides influence by the square root of the training sample's
            self-influence (RelatIF: Barshan et al. 2020, arXiv 2003.11630), which holds back outliers.
            A sample whose divisor is zero scores 0.
        top: keep only the best `top` training samples of each query; at most N are returned. The matrix
            `[Q, N]` is never formed.
        largest: with `top`, whether the best are the proponents (most positive, descending) or the opponents
            (most negative, ascending).
        reduce: "mean" or "max": one score per sample over all queries, `[N]`, as of a validation set. The matrix is
            never formed. Of a recorded run, "mean".
        by: take the scores apart in one pass, as `ScoreParts` says: "layer", "source", or a mapping from the name of a
            group to name patterns of its layers, `{"attention": "*.attn.*", "rest": "*"}` ("*": all that are left).
        sources: for "source", one label per training sample (str or int), or a function from an id of the index to one.
        out: write the matrix `[Q, N]` to this .npy file, complete once it has its name, and return it mapped: neither
            it nor `train` need fit in memory.
        group: ranks of `torch.distributed` that share the work, each with the same query and train (an index: each
            reads its own shards); every rank gets all. None: this process alone.
        other_model: let query, train and fisher be of models with different weights, such as two checkpoints.

    Returns:
        `[Q, N]`, `[N]` with `reduce`, `TopK` of `[Q, min(top, N)]`, or `ScoreParts` with `by`; fp32, or fp64 if the
        gradients are; on the device of `fisher` where it is read, and of `query` elsewhere.

    Raises:
        ValueError: unknown kind, missing fisher, `top` below 1, a layer in no group or in two, sources that are not one
            per sample, gradients or Fisher of different sketches, gradients or a Fisher of different models, or a
            Fisher matrix that is singular with its damping.
        TypeError: a group's patterns or a source's label of the wrong type.
    """
    if isinstance(train, Traced):
        if not all(given is None for given in (fisher, top, by, sources, out, group)):
            raise ValueError("train is a recorded run, which takes no fisher, top, by, sources, out or group; see kind")
        return train.score(query, cast("RunKind", kind), reduce=reduce, other_model=other_model, **of_run)
    if of_run:
        raise TypeError(f"score got {', '.join(of_run)}, which are of recorded runs, and train is {train!r}")
    kind = cast("ScoreKind", kind)
    code = train.code if isinstance(train, Index) else None
    if code is not None:
        check_few_bits(fisher, kind, by)
        check_one_code(Ranks(group), code)
        query, kind = queries_of(code, _in_memory(query), other_model=other_model), "dot"
    _check_arguments(kind, fisher, top, largest)
    if out is not None and (top is not None or group is not None or reduce is not None):
        raise ValueError("out is for the whole matrix from one process; pass neither top, reduce nor group with it")
    if reduce is not None and (reduce not in get_args(Reduce) or top is not None):
        raise ValueError(f"reduce must be one of {', '.join(get_args(Reduce))}, without top; got {reduce!r}")
    ids = train.ids if isinstance(train, Index) and train.manifest.ids else None
    apart = taken_apart(by, sources, train, ids, top=top, reduce=reduce, out=out)
    check_same_sketch(query, train, "query and train")
    reads_fisher = kind in ("influence", "relative")
    if not other_model:
        used = {"query": query, "train": train} | ({"fisher": fisher} if reads_fisher else {})
        way_out = (
            "Compress all with one model, which Compressor.from_index checks, or pass other_model=True (for "
            "checkpoints, say)"
        )
        check_one_model(list(used.values()), list(used), way_out)
    if fisher is not None and reads_fisher:
        fisher.check(train, "fisher and train")
    dtype = torch.promote_types(torch.promote_types(query.dtype, train.dtype), torch.float32)
    q = _query_side(_in_memory(query), fisher, kind)
    q = q.to(torch.promote_types(q.dtype, dtype))
    ranks = Ranks(group)
    if apart is not None:
        columns = _columns(q, train, fisher, kind, ranks, apart.layers)
        return apart.collect(columns, q.to(dtype), ranks)
    if top is not None:
        best = _stream_top(q if largest else -q, train, fisher, kind, top, ranks)
        values = best.values.to(dtype)
        return TopK(values if largest else -values, best.indices)
    if reduce is not None:
        best_of = q.new_zeros(len(train), dtype=dtype)
        for at, block in _columns(q, train, fisher, kind, ranks):
            best_of[at] = (block.amax(0) if reduce == "max" else block.mean(0)).to(best_of)
        return ranks.sum(best_of)
    if out is not None:
        check_outside(out, query, train)
        with new_array(out, (len(q), len(train)), dtype) as file:
            for at, block in _columns(q, train, fisher, kind, ranks):
                file.write_columns(at, block.to(dtype))
        return open_array(out)
    matrix = q.new_zeros(len(q), len(train), dtype=dtype)
    for at, block in _columns(q, train, fisher, kind, ranks):
        matrix[:, at] = block.to(matrix)
    return ranks.sum(matrix)


def self_influence(train: GradientSource, fisher: Fisher, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return `c_n^T (F + lambda I)^{-1} c_n` of every sample, `[N]`, fp32 or fp64; O(N), streamed.

    Large values mark samples that the rest of the data does not explain: outliers and wrong labels. `group`: ranks that
    share the work, each with the same index; every rank gets all.

    Raises:
        ValueError: a Fisher matrix of another sketch, without samples, or singular with its damping; rows of few bits.
    """
    if isinstance(train, Index) and train.manifest.codec.bits is not None:
        raise ValueError(f"train: {train!r} has rows of few bits, which have no self-influence; take it of float rows")
    fisher.check(train, "fisher and train")
    check_one_model([fisher, train], ["fisher", "train"], "Use build_fisher(train)")
    ranks = Ranks(group)
    return ranks.sum(fisher.quadratic(share_of(train, ranks.rank, ranks.world)))


def _columns(
    q: Tensor,
    train: GradientSource,
    fisher: Fisher | None,
    kind: ScoreKind,
    ranks: Ranks,
    layers: Sequence[Sequence[int]] | None = None,
) -> Iterator[tuple[At, Tensor]]:
    """Yield (positions, scores [Q, n], or [P, Q, n] of parts with these layers) of this rank's samples, by blocks."""
    q, blocks = _blocks(q, train, fisher, kind, ranks)
    products = Products(q, _widths(train)) if layers is None else PartProducts(q, _widths(train), layers)
    for at, part, rows in blocks:
        block = products.dot(rows)
        factor = _train_scale(part, fisher, kind, q)
        yield at, block if factor is None else block.mul_(factor.to(block))


_TOGETHER = 4096  # samples whose best are found together
Part = tuple[At, "Gradients | None", Stored]


def _blocks(
    q: Tensor, train: GradientSource, fisher: Fisher | None, kind: ScoreKind, ranks: Ranks
) -> tuple[Tensor, Iterator[Part]]:
    """Return the queries to multiply with, and (positions, gradients, rows as they are stored) of blocks.

    Where nothing but the product reads them, an index's rows are taken as they are stored: without the gradients.
    Where the Fisher asks for fp64, they are not: its products need the very rows it was built from, rounding and all.
    """
    mine = share_of(train, ranks.rank, ranks.world)
    exact = kind == "influence" and fisher is not None and fisher.result_dtype(torch.float32) == torch.float64
    if isinstance(mine, Index) and kind in ("influence", "dot") and not exact:
        factors = mine.factors()
        many = None if q.device.type == "cpu" else max(1, 2 * mine.block_bytes // mine.bytes_per_sample)
        stored = ((at, None, rows) for at, rows in mine.stored_blocks(many, reuse=True))
        return (q if factors is None else q * factors.to(q)), stored
    rows = block_rows(train)
    read = mine.placed_blocks(rows, reuse=True) if isinstance(mine, Index) else placed_blocks(mine, rows)
    return q, ((at, part, Stored(part.flat, None)) for at, part in read)


def _widths(train: Sketched) -> tuple[int, ...]:
    return tuple(map(math.prod, train.shapes.values()))


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
        flat = query.flat.to(torch.promote_types(query.dtype, torch.float32))
        return flat * _reciprocal(_norm(flat, flat.dtype)).unsqueeze(1)
    return query.flat


def _train_scale(part: Gradients | None, fisher: Fisher | None, kind: ScoreKind, like: Tensor) -> Tensor | None:
    """Return what each training sample's dot products are multiplied with, `[n]`, or None for 1."""
    if part is None:
        return None
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


def _stream_top(
    q: Tensor, train: GradientSource, fisher: Fisher | None, kind: ScoreKind, top: int, ranks: Ranks
) -> TopK:
    """Merge the best of each row block into a running best; ties keep the earlier block: the lowest index."""
    best = TopK(q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64, device=q.device))
    q, blocks = _blocks(q, train, fisher, kind, ranks)
    products = Products(q, _widths(train))
    held: list[tuple[Tensor, Tensor]] = []  # positions and scores of small blocks, whose best are found together
    for at, part, rows in blocks:
        if part is not None:
            rows = Stored(rows.values, _train_scale(part, fisher, kind, q))
        few_bits = rows.values.dtype == torch.uint8
        if rows.scale is not None and rows.scale.ndim == 1 and q.dtype == torch.float64 and not few_bits:
            rows = Stored(rows.values * rows.scale.unsqueeze(1), None)  # the op takes fp32 scales
        small = part is None and q.device.type == "cpu"
        if small or isinstance(at, Tensor) or (rows.scale is not None and rows.scale.ndim > 1):
            for scored in _scored(products, rows, at):
                held.append(scored)
                if sum(map(len, (positions for positions, _ in held))) >= _TOGETHER:
                    best, held = _merge([best, _best_of(held, top)], top), []
            continue
        flat, scale = rows.values.to(q.device), rows.scale
        scale = None if scale is None else scale.to(q.device)
        best = _merge([best, TopK(*products.top(flat, scale, top, at.start))], top)
    if held:
        best = _merge([best, _best_of(held, top)], top)
    if ranks.world > 1:
        parts = zip(ranks.gather(best.values.T), ranks.gather(best.indices.T), strict=True)
        best = _merge([TopK(values.T, indices.T) for values, indices in parts], top)
    return best


def _scored(products: Products, rows: Stored, at: At) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield positions and scores [Q, n] of rows that the op does not take, part by part, so that few are held."""
    step = max(1, BUFFER_BYTES // (products.q.itemsize * max(1, len(products.q))))
    for start in range(0, len(rows.values), step):
        scale = None if rows.scale is None else rows.scale[start : start + step]
        scores = products.dot(Stored(rows.values[start : start + step], scale))
        if isinstance(at, Tensor):
            yield at[start : start + step].to(scores.device), scores
        else:
            first = at.start + start
            yield torch.arange(first, first + scores.shape[1], device=scores.device), scores


def _best_of(held: list[tuple[Tensor, Tensor]], top: int) -> TopK:
    """Return the best of positions and their scores; of equal ones, the lowest position."""
    positions, scores = torch.cat([at for at, _ in held]), torch.cat([part for _, part in held], 1)
    if len(positions) > 1 and bool((positions.diff() < 0).any()):
        positions, order = positions.sort()
        scores = scores[:, order]
    values, indices = topk_lowest_index(scores, min(top, scores.shape[1]))
    return TopK(values, positions[indices])


def _merge(parts: list[TopK], top: int) -> TopK:
    """Return the best of all parts; of equal ones, the lowest index."""
    values, indices = torch.cat([p.values for p in parts], 1), torch.cat([p.indices for p in parts], 1)
    indices, by_index = indices.sort(dim=1)
    values, order = values.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return TopK(values[:, :top].contiguous(), indices.gather(1, order)[:, :top])
