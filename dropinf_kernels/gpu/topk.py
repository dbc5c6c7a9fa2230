"""Streaming top-k scores on a GPU: every query keeps its best rows on chip, and [Q, N] is never written.

A list holds 64-bit keys, the score as an ordered integer above the row counted downwards: equal scores then sort by
the lowest row, and one sort moves both.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import ARCHS, Arch, arch_of
from ..op import launches
from ..ops.topk import check_topk, score_topk
from .launch import check_device, launch
from .tiling import MAX_TOP, TopkTile, cdiv, power_of_two, topk_tile

_KEYS = 1024  # that the second stage sorts at a time


@triton.jit
def to_key(score, row):
    """Return a float32 score as an integer in its order, above 0x7fffffff - row; NaN is the greatest, -0 equals 0."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(score != score, 0x7FC00000, ordered)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - row).to(tl.int64)


@triton.jit
def merge(best, other):
    """Return the greatest of ascending lists and descending ones, ascending: the larger, entry by entry, is bitonic."""
    return tl.bitonic_merge(tl.maximum(best, other), 1)


@triton.jit
def keep_best(best, scores, rows, live, TOP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the lists of greatest keys with those of a block of scores, where `live`, among them."""
    LOWEST: tl.constexpr = -(2**63)
    keys = tl.where(live[None, :], to_key(scores, rows[None, :]), LOWEST)
    better = keys > tl.min(best, 1)[:, None]
    # Flat, as reducing one axis of an accumulator in tensor memory does not compile for sm_100.
    if tl.max(tl.reshape(better.to(tl.int32), [BLOCK_Q * BLOCK_N], can_reorder=True), 0) > 0:
        best = merge(best, tl.topk(keys, TOP, 1))
    return best


@triton.jit
def store_lists(p_keys, best, split, offs_q, Q, TOP: tl.constexpr):
    """Store the lists of a block of queries over a split of the rows, for `score_topk_merge_kernel`."""
    at = (split.to(tl.int64) * Q + offs_q)[:, None] * TOP + tl.arange(0, TOP)[None, :]
    tl.store(p_keys + at, best, mask=(offs_q < Q)[:, None])


@triton.jit
def score_topk_kernel(
    p_q, p_c, p_scale, p_keys, Q, N, K, share, stride_qn, stride_qk, stride_cn, stride_ck,
    SCALED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    TOP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    split = tl.program_id(1)
    start = split * share
    # Counted from the start: a row just below 2^31, plus a block, is no int32.
    length = tl.minimum(N - start, share)
    p_query = p_q + offs_q.to(tl.int64)[:, None] * stride_qn
    LOWEST: tl.constexpr = -(2**63)
    best = tl.full([BLOCK_Q, TOP], LOWEST, tl.int64)
    for n in range(0, length, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        live = offs_n < length
        rows = start + offs_n
        p_row = p_c + rows.to(tl.int64)[None, :] * stride_cn
        scores = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            at = k + tl.arange(0, BLOCK_K)
            mask_q = (offs_q < Q)[:, None] & (at < K)[None, :]
            mask_c = (at < K)[:, None] & live[None, :]
            q = tl.load(p_query + at.to(tl.int64)[None, :] * stride_qk, mask=mask_q, other=0.0).to(DTYPE)
            c = tl.load(p_row + at.to(tl.int64)[:, None] * stride_ck, mask=mask_c, other=0).to(DTYPE)
            scores = tl.dot(q, c, scores, input_precision=PRECISION)
        if SCALED:
            scores *= tl.load(p_scale + rows, mask=live, other=0.0)[None, :]
        best = keep_best(best, scores, rows, live, TOP, BLOCK_Q, BLOCK_N)
    store_lists(p_keys, best, split, offs_q, Q, TOP)


@triton.jit(do_not_specialize=["SPLITS"])
def score_topk_merge_kernel(
    p_keys, p_values, p_indices, Q, k, offset, SPLITS, TOP: tl.constexpr, LISTS: tl.constexpr
):  # fmt: skip
    """Merge the lists of one query, LISTS at a time, and decode the result, the best first."""
    query = tl.program_id(0).to(tl.int64)
    LOWEST: tl.constexpr = -(2**63)
    best = tl.full([1, TOP], LOWEST, tl.int64)
    at = tl.arange(0, LISTS * TOP)[None, :]
    for first in range(0, SPLITS, LISTS):
        split = first + at // TOP
        p_key = p_keys + (split.to(tl.int64) * Q + query) * TOP + at % TOP
        keys = tl.load(p_key, mask=split < SPLITS, other=LOWEST)
        best = merge(best, tl.topk(keys, TOP, 1))
    # Counted from the end, an ascending list is descending.
    backwards = TOP - 1 - tl.arange(0, TOP)[None, :]
    ordered = (best >> 32).to(tl.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    rows = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    at = query * k + backwards
    tl.store(p_values + at, values, mask=backwards < k)
    tl.store(p_indices + at, rows + offset, mask=backwards < k)


@launches(score_topk)
def launch_topk(q: Tensor, c: Tensor, k: int, c_scale: Tensor | None = None, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Launch `score_topk` on q's device. Longer lists than the kernel keeps on chip take the plain body, in blocks."""
    if k > MAX_TOP:
        return score_topk.plain(q, c, k, c_scale, offset)
    check_topk(q, c, k, c_scale)
    check_device(q=q, c=c, c_scale=c_scale)
    arch, operand = arch_of(q.device) or ARCHS["sm_80"], operand_of(q, c)

    def launch_scores(keys: Tensor, tile: TopkTile, share: int) -> None:
        launch(
            score_topk_kernel, (cdiv(len(q), tile.block_q), tile.splits), q.device,
            q, c, c if c_scale is None else c_scale.contiguous(), keys, len(q), len(c), q.shape[1],
            share, *q.stride(), *c.stride(),
            SCALED=c_scale is not None, DTYPE=operand, PRECISION=arch.precision, TOP=keys.shape[2],
            BLOCK_Q=tile.block_q, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    return best_rows(launch_scores, topk_tile, q, len(c), k, offset, operand, arch)


def best_rows(
    launch_scores: Callable[[Tensor, TopkTile, int], None],
    choose_tile: Callable[[int, int, int, int, Arch], TopkTile],
    q: Tensor,
    rows: int,
    k: int,
    offset: int,
    operand: tl.dtype,
    arch: Arch,
) -> tuple[Tensor, Tensor]:
    """Return the k best of `rows` rows for every query: values and indices.

    `launch_scores(keys, tile, share)` has each split of `share` rows fill its lists, keys [splits, Q, top].
    """
    queries, kept = len(q), min(k, rows)
    if rows > 0x7FFFFFFF:
        raise ValueError(f"there are {rows} rows; there must be at most 2^31 - 1: score them in blocks, with offset")
    values = torch.empty((queries, kept), dtype=torch.float32, device=q.device)
    indices = torch.empty((queries, kept), dtype=torch.int64, device=q.device)
    if values.numel() == 0:
        return values, indices
    top = power_of_two(kept, 16, MAX_TOP)
    tile = choose_tile(queries, rows, top, 4 if operand == tl.float32 else 2, arch)
    keys = torch.empty((tile.splits, queries, top), dtype=torch.int64, device=q.device)
    launch_scores(keys, tile, min(rows, cdiv(cdiv(rows, tile.block_n), tile.splits) * tile.block_n))
    launch(
        score_topk_merge_kernel, (queries,), q.device, keys, values, indices, queries, kept, offset, tile.splits,
        TOP=top, LISTS=_KEYS // top, num_warps=4,
    )  # fmt: skip
    return values, indices


def operand_of(q: Tensor, c: Tensor) -> tl.dtype:
    """Return what the matrix units multiply; int8 and fewer bits are exact in either 16-bit dtype."""
    if q.dtype in (torch.float16, torch.bfloat16) and c.dtype in (q.dtype, torch.int8, torch.uint8):
        return tl.float16 if q.dtype == torch.float16 else tl.bfloat16
    return tl.float32
