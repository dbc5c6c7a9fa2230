"""Fisher accumulation, streaming top-k scores and int8 storage in plain PyTorch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import ParamSpec

import torch
from torch import Tensor

from ._checks import check_float
from .reference import BUFFER_BYTES, accumulator, exact

P = ParamSpec("P")
_GRAM_WIDE = 768  # rows of a tile right of the diagonal: products of few rows are slower
_GRAM_NARROW = 256  # rows of a tile on the diagonal, whose lower triangle is multiplied for nothing
_PAD = 16  # entries between the rows of a tile: a line of the cache
_INT8_COLUMNS = 131072  # products of int8 that 32 bits hold


def check_rows(c: Tensor, c_scale: Tensor | None, name: str = "c") -> None:
    """Check rows of compressed gradients: float [N, K], or int8 with the scale of each row."""
    if c.dtype == torch.int8:
        if c_scale is None:
            raise ValueError(f"{name} is int8 and c_scale is missing; pass the scale of each row, float32 [N]")
        if c.dim() != 2:
            raise ValueError(f"{name} has shape {list(c.shape)}; it must have 2 dimensions")
    else:
        check_float(name, c, 2)
    if c_scale is not None and (c_scale.dtype != torch.float32 or c_scale.shape != c.shape[:1]):
        raise ValueError(
            f"c_scale is {c_scale.dtype} {list(c_scale.shape)}; it must be float32 [N] with {name}'s N = {c.shape[0]}"
        )


def check_gram(F: Tensor, C: Tensor, c_scale: Tensor | None) -> None:
    check_rows(C, c_scale, "C")
    if F.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"F has dtype {F.dtype}; it must be float32 or float64")
    if F.dim() != 2 or F.shape[0] != F.shape[1] or F.shape[0] != C.shape[1]:
        raise ValueError(f"F has shape {list(F.shape)}; it must be [K, K] with C's width, K = {C.shape[1]}")


@exact
def gram_update(F: Tensor, C: Tensor, c_scale: Tensor | None = None) -> None:
    check_gram(F, C, c_scale)
    rows = C.shape[0]
    buffer = F.new_empty(min(_GRAM_WIDE, F.shape[0]) * (F.shape[0] + _PAD))
    if C.dtype != F.dtype or c_scale is not None:
        rows = max(1, BUFFER_BYTES // max(1, C.shape[1] * F.element_size()))
    for n in range(0, C.shape[0], max(1, rows)):
        part = C[n : n + rows].to(F.dtype)
        if c_scale is not None:
            part = part * c_scale[n : n + rows].to(F.dtype).unsqueeze(1)
        for tile in _upper_tiles(F.shape[0]):
            _add_tile(F, part, *tile, buffer, mirror=n + rows >= C.shape[0])


def _upper_tiles(size: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield rows i:j and columns a:b that cover the upper triangle: on the diagonal (a = i) or right of it (a = j)."""
    for i in range(0, size, _GRAM_WIDE):
        j = min(i + _GRAM_WIDE, size)
        for u in range(i, j, _GRAM_NARROW):
            yield u, min(u + _GRAM_NARROW, j), u, j
        if j < size:
            yield i, j, j, size


def _add_tile(F: Tensor, part: Tensor, i: int, j: int, a: int, b: int, buffer: Tensor, mirror: bool) -> None:
    """Add rows i:j and columns a:b of `part^T part` to F and mirror them: its own two halves need not round alike."""
    # A copy whose rows do not start a power of two apart, which would put a column of them in few sets of the cache.
    tile = buffer.as_strided((j - i, b - a), (b - a + _PAD, 1))
    tile.copy_(F[i:j, a:b]).addmm_(part[:, i:j].t(), part[:, a:b])
    if a == i:
        corner = tile[:, : j - i]
        corner.copy_(corner.triu() + corner.triu(1).t())
    F[i:j, a:b].copy_(tile)
    if mirror:
        F[j:b, i:j].copy_(tile[:, j - a :].t())


def check_topk(q: Tensor, c: Tensor, k: int, c_scale: Tensor | None) -> None:
    check_float("q", q, 2)
    check_rows(c, c_scale)
    if c.shape[1] != q.shape[1]:
        raise ValueError(f"c has {c.shape[1]} columns and q has {q.shape[1]}; they must agree")
    if k < 0:
        raise ValueError(f"k is {k}; it must not be negative")


@exact
def score_topk(q: Tensor, c: Tensor, k: int, c_scale: Tensor | None = None, offset: int = 0) -> tuple[Tensor, Tensor]:
    check_topk(q, c, k, c_scale)
    dtype = accumulator(q, c)
    query = q.to(dtype)
    values = query.new_empty(q.shape[0], 0)
    indices = torch.empty(q.shape[0], 0, dtype=torch.int64, device=q.device)
    # What is held of a step: its scores and, where it must be converted, its rows.
    held = max(1, len(q), 0 if c.dtype == dtype or _in_integers(query, c) else q.shape[1])
    step = max(1, min(BUFFER_BYTES // (held * dtype.itemsize), c.shape[0]))
    for n in range(0, c.shape[0], step):
        scores = dot_rows(query, c[n : n + step])
        if c_scale is not None:
            scores.mul_(c_scale[n : n + step].to(dtype))
        block_values, block_indices = _topk_lowest_index(scores, min(k, scores.shape[1]))
        merged = torch.cat([values, block_values], 1)
        # Earlier blocks come first, so a stable sort leaves ties at the lowest index.
        order = torch.sort(merged, dim=1, descending=True, stable=True).indices[:, :k]
        values = merged.gather(1, order)
        indices = torch.cat([indices, block_indices + (n + offset)], 1).gather(1, order)
    return values, indices


def dot_rows(q: Tensor, c: Tensor) -> Tensor:
    """Return `q @ c^T` in q's dtype; q [Q, K] float32 or float64, c [N, K] float or int8."""
    if _in_integers(q, c):
        return _dot_int8(q, c)
    return (c.to(q.dtype) @ q.t()).t()  # the few queries as columns: a third faster than as rows


def _in_integers(q: Tensor, c: Tensor) -> bool:
    """Whether `dot_rows` multiplies integers: int8 rows where their products are exact and fast, and finite queries.

    Without VNNI they saturate in 16 bits."""
    if c.dtype != torch.int8 or q.dtype != torch.float32 or c.device.type != "cpu":
        return False
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    has = torch.backends.mkldnn.is_available() and supported is not None and supported()
    return bool(has and q.sum().isfinite())


def _dot_int8(q: Tensor, c: Tensor) -> Tensor:
    """`q @ c^T` in integers, without a float copy of c: each query is three digits to base 256, as exact as float32."""
    step = q.abs().amax(1, keepdim=True) / (127 * 256 * 256)
    left = (q / torch.where(step > 0, step, 1.0)).round_().to(torch.int32)
    count = 3 * len(q)
    # A product with 48 columns was seen to take twice as long as one with 64.
    digits = torch.empty(count if count <= 8 else -(-count // 64) * 64, q.shape[1], dtype=torch.int8)
    digits[count:] = 0
    for digit in digits[:count].split(len(q)):
        low = left.add(128).bitwise_and_(255).sub_(128)  # -128 to 127
        digit.copy_(low)
        left.sub_(low).bitwise_right_shift_(8)
    total = torch.zeros(())
    for k in range(0, q.shape[1], _INT8_COLUMNS):
        part = torch._int_mm(c[:, k : k + _INT8_COLUMNS], digits[:, k : k + _INT8_COLUMNS].t())
        total = total + part[:, :count].t().float()
    low, middle, high = total.split(len(q))
    scores: Tensor = high.mul_(256.0).add_(middle).mul_(256.0).add_(low).mul_(step)
    return scores


def _topk_lowest_index(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k per row, descending, ties to the lowest index; torch.topk promises no order of ties."""
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


@exact
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    check_float("x", x, 2)
    if x.shape[1] == 0:
        return x.new_empty(x.shape, dtype=torch.int8), x.new_zeros(x.shape[0], dtype=torch.float32)
    wide = x.to(accumulator(x))
    low, high = torch.aminmax(wide, dim=1)
    scale = (torch.maximum(-low, high) / 127).float()
    bad = (~torch.isfinite(scale)).nonzero()
    if bad.numel():
        raise ValueError(f"x is not finite, or beyond float32, in row {int(bad[0])} ({bad.shape[0]} such rows)")
    divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
    q = (wide / divisor).round_().clamp_(-127, 127).to(torch.int8)
    return q, scale


def check_quantized(q: Tensor, scale: Tensor) -> None:
    if q.dtype != torch.int8 or q.dim() != 2:
        raise TypeError(f"q is {q.dtype} {list(q.shape)}; it must be int8 [N, K]")
    if scale.dtype != torch.float32 or scale.shape != q.shape[:1]:
        raise ValueError(
            f"scale is {scale.dtype} {list(scale.shape)}; it must be float32 [N] with q's N = {q.shape[0]}"
        )


@exact
def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    check_quantized(q, scale)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return q.to(wide).mul_(scale.to(wide).unsqueeze(1)).to(dtype)


def quantizing(compress: Callable[P, Tensor]) -> Callable[P, tuple[Tensor, Tensor]]:
    """Return `<name>_int8`, which compresses as `compress` does and then quantizes the row of each sample."""

    @functools.wraps(compress)
    def body(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, Tensor]:
        wide = compress(*args, **kwargs)
        q, scale = quantize_rows(wide.flatten(1))
        return q.view(wide.shape), scale

    signature = inspect.signature(compress)
    parameters = [p for p in signature.parameters.values() if p.name != "dtype"]
    returned = "tuple[Tensor, Tensor]"
    vars(body)["__signature__"] = signature.replace(parameters=parameters, return_annotation=returned)
    body.__name__ = f"{compress.__name__}_int8"
    return body
