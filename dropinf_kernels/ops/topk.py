"""Streaming top-k scores."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from ..op import op
from .checks import check_float, check_rows
from .plain import BUFFER_BYTES, accumulator

INT8_COLUMNS = 131072  # products of int8 that 32 bits hold
DIGITS_STEP = 127 * 256 * 256  # what three digits hold


def check_topk(q: Tensor, c: Tensor, k: int, c_scale: Tensor | None) -> None:
    check_float("q", q, 2)
    check_rows(c, c_scale)
    if c.shape[1] != q.shape[1]:
        raise ValueError(f"c has {c.shape[1]} columns and q has {q.shape[1]}; they must agree")
    if k < 0:
        raise ValueError(f"k is {k}; it must not be negative")


def _fake(c: SimpleNamespace) -> tuple[Tensor, Tensor]:
    shape = (c.q.shape[0], torch.sym_min(c.k, c.c.shape[0]))
    return c.q.new_empty(shape, dtype=accumulator(c.q, c.c)), c.q.new_empty(shape, dtype=torch.int64)


@op(_fake)
def score_topk(q: Tensor, c: Tensor, k: int, c_scale: Tensor | None = None, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Return the k highest scores of every query over all rows of c, never holding [Q, N].

    q [Q, K] float; c [N, K] float, or int8 with c_scale float32 [N] -> values [Q, min(k, N)] float32
    (float64 if q or c is), descending, and indices int64, raised by `offset`. Ties: lowest index first.
    Raises TypeError, ValueError for bad dtypes, shapes, a missing c_scale or a negative k.
    Source: the rows of q @ (c * c_scale[:, None])^T.
    """
    check_topk(q, c, k, c_scale)
    dtype = accumulator(q, c)
    query = q.to(dtype)
    values = query.new_empty(q.shape[0], 0)
    indices = torch.empty(q.shape[0], 0, dtype=torch.int64, device=q.device)
    # What is held of a step: its scores and, where it must be converted, its rows.
    held = max(1, len(q), 0 if c.dtype == dtype or in_integers(query, c) else q.shape[1])
    step = max(1, min(BUFFER_BYTES // (held * dtype.itemsize), c.shape[0]))
    for n in range(0, c.shape[0], step):
        scores = dot_rows(query, c[n : n + step])
        if c_scale is not None:
            scores.mul_(c_scale[n : n + step].to(dtype))
        block_values, block_indices = topk_lowest_index(scores, min(k, scores.shape[1]))
        merged = torch.cat([values, block_values], 1)
        # Earlier blocks come first, so a stable sort leaves ties at the lowest index.
        order = torch.sort(merged, dim=1, descending=True, stable=True).indices[:, :k]
        values = merged.gather(1, order)
        indices = torch.cat([indices, block_indices + (n + offset)], 1).gather(1, order)
    return values, indices


def dot_rows(q: Tensor, c: Tensor) -> Tensor:
    """Return `q @ c^T` in q's dtype; q [Q, K] float32 or float64, c [N, K] float or int8."""
    if in_integers(q, c):
        return _dot_int8(q, c)
    return (c.to(q.dtype) @ q.t()).t()  # the few queries as columns: a third faster than as rows


def in_integers(q: Tensor, c: Tensor) -> bool:
    """Return whether `dot_rows` multiplies integers: int8 rows and finite queries, where products are exact and fast.

    Without VNNI they saturate in 16 bits.
    """
    if c.dtype != torch.int8 or q.dtype != torch.float32 or c.device.type != "cpu":
        return False
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    has = torch.backends.mkldnn.is_available() and supported is not None and supported()
    return bool(has and q.sum().isfinite())


def _dot_int8(q: Tensor, c: Tensor) -> Tensor:
    """Return `q @ c^T` without a float copy of c: each query is three digits to base 256, as exact as float32."""
    step = q.abs().amax(1, keepdim=True) / DIGITS_STEP
    digits, count = query_digits(q, step)
    total = torch.zeros((), device="cpu")
    for k in range(0, q.shape[1], INT8_COLUMNS):
        part = torch._int_mm(c[:, k : k + INT8_COLUMNS], digits[:, k : k + INT8_COLUMNS].t())
        total = total + part[:, :count].t().float()
    low, middle, high = total.split(len(q))
    scores: Tensor = high.mul_(256.0).add_(middle).mul_(256.0).add_(low).mul_(step)
    return scores


def query_digits(q: Tensor, step: Tensor) -> tuple[Tensor, int]:
    """Return `q / step` in three digits to base 256, the lowest first: int8 [3 Q and padding, K], and 3 Q."""
    left = (q / torch.where(step > 0, step, 1.0)).round_().to(torch.int32)
    count = 3 * len(q)
    # A product with 48 columns was seen to take twice as long as one with 64.
    digits = torch.empty(count if count <= 8 else -(-count // 64) * 64, q.shape[1], dtype=torch.int8, device="cpu")
    digits[count:] = 0
    for digit in digits[:count].split(len(q)):
        low = left.add(128).bitwise_and_(255).sub_(128)  # -128 to 127
        digit.copy_(low)
        left.sub_(low).bitwise_right_shift_(8)
    return digits, count


def topk_lowest_index(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the top k per row, descending, ties to the lowest index; torch.topk promises no order of ties."""
    values, indices = torch.topk(scores, min(k + 1, scores.shape[1]), dim=1)
    if k == 0 or scores.shape[0] == 0:
        return values[:, :k], indices[:, :k]
    if values.shape[1] > k:
        # A tie across the cut: topk may have kept any of the equal ones, so sort those rows in full.
        # "Not greater" rather than "equal" so that rows with NaN go the same way.
        cut = (~(values[:, k - 1] > values[:, k])).nonzero().flatten()
        if cut.numel():
            values[cut, :k], indices[cut, :k] = (
                t[:, :k] for t in torch.sort(scores[cut], dim=1, descending=True, stable=True)
            )
    indices, by_index = torch.sort(indices[:, :k], dim=1)
    values, by_value = torch.sort(values.gather(1, by_index), dim=1, descending=True, stable=True)
    return values, indices.gather(1, by_value)
