"""Streaming top-k scores."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from ..op import op
from .checks import check_float, check_rows
from .plain import BUFFER_BYTES, accumulator

INT8_COLUMNS = 131072  # products of int8 that 32 bits hold
DIGITS_STEP = 127 * 256 * 256  # what three digits hold
_IN_INTEGERS = (torch.int8, torch.uint8)  # of what rows products in integers are made


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

    def scores(rows: slice) -> Tensor:
        found = dot_rows(query, c[rows])
        return found if c_scale is None else found.mul_(c_scale[rows].to(dtype))

    # What is held of a step: its scores and, where it must be converted, its rows.
    held = max(1, len(q), 0 if c.dtype == dtype or in_integers(query, c) else q.shape[1])
    step = max(1, min(BUFFER_BYTES // (held * dtype.itemsize), c.shape[0]))
    return topk_of_blocks(scores, query, c.shape[0], step, k, offset)


def topk_of_blocks(
    scores: Callable[[slice], Tensor], q: Tensor, rows: int, step: int, k: int, offset: int
) -> tuple[Tensor, Tensor]:
    """Return the top k of every query over `rows` rows, whose scores [Q, n] are asked for `step` rows at a time."""
    values = q.new_empty(len(q), 0)
    indices = torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
    for n in range(0, rows, step):
        block = scores(slice(n, n + step))
        block_values, block_indices = topk_lowest_index(block, min(k, block.shape[1]))
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
    """Return whether rows are multiplied in integers: rows of integers, finite queries, and products exact and fast.

    Without VNNI they saturate in 16 bits.
    """
    if c.dtype not in _IN_INTEGERS or q.dtype != torch.float32 or c.device.type != "cpu":
        return False
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    has = torch.backends.mkldnn.is_available() and supported is not None and supported()
    return bool(has and q.sum().isfinite())


def _dot_int8(q: Tensor, c: Tensor) -> Tensor:
    """Return `q @ c^T` without a float copy of c: each query is three digits to base 256, as exact as float32."""
    step = q.abs().amax(1, keepdim=True) / DIGITS_STEP
    return dot_digits(*query_digits(q, step), step, c)


def dot_digits(digits: Tensor, count: int, step: Tensor, c: Tensor) -> Tensor:
    """Return [Q, N], the products of int8 rows c [N, K] with queries in digits, of which 1 is `step` [Q, 1]."""
    total = torch.zeros((), device="cpu")
    for k in range(0, c.shape[1], INT8_COLUMNS):
        part = torch._int_mm(c[:, k : k + INT8_COLUMNS], digits[:, k : k + INT8_COLUMNS].t())
        total = total + part[:, :count].t().float()
    *lower, highest = total.split(len(step))
    scores: Tensor = highest
    for digit in reversed(lower):
        scores.mul_(256.0).add_(digit)
    return scores.mul_(step)


def query_digits(q: Tensor, step: Tensor) -> tuple[Tensor, int]:
    """Return `q / step` in three digits to base 256, the lowest first: int8 [3 Q and padding, K], and 3 Q."""
    return digits_of((q / torch.where(step > 0, step, 1.0)).round_(), 3)


def digits_of(whole: Tensor, places: int) -> tuple[Tensor, int]:
    """Return whole numbers [Q, K] in digits to base 256, the lowest first: int8 [places * Q and padding, K]."""
    left, count = whole.to(torch.int32), places * len(whole)
    # As a product packs them: with each of its calls turning them, many small ones take a tenth longer.
    digits = torch.empty(whole.shape[1], _padded(count), dtype=torch.int8, device="cpu").t()
    digits[count:] = 0
    for digit in digits[:count].split(len(whole)):
        low = left.add(128).bitwise_and_(255).sub_(128)  # -128 to 127
        digit.copy_(low)
        left.sub_(low).bitwise_right_shift_(8)
    return digits, count


def _padded(count: int) -> int:
    """Return how many columns a product in integers is given: whole registers, or with AMX whole tiles.

    With AMX, 48 columns were seen to take twice as long as 64; without it, three quarters as long.
    """
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    block = 64 if has_tiles is None or has_tiles() else 16
    return count if count <= 8 else -(-count // block) * block


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
