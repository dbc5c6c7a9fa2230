"""Fisher accumulation: F += C^T C."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..op import op
from .checks import check_rows
from .plain import BUFFER_BYTES

_GRAM_WIDE = 768  # rows of a tile right of the diagonal: products of few rows are slower
_GRAM_NARROW = 256  # rows of a tile on the diagonal, whose lower triangle is multiplied for nothing
_PAD = 16  # entries between the rows of a tile: a line of the cache


def check_gram(F: Tensor, C: Tensor, c_scale: Tensor | None) -> None:
    check_rows(C, c_scale, "C")
    if F.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"F has dtype {F.dtype}; it must be float32 or float64")
    if F.dim() != 2 or F.shape[0] != F.shape[1] or F.shape[0] != C.shape[1]:
        raise ValueError(f"F has shape {list(F.shape)}; it must be [K, K] with C's width, K = {C.shape[1]}")


@op(lambda _: None, writes="F")
def gram_update(F: Tensor, C: Tensor, c_scale: Tensor | None = None) -> None:
    """Add `C^T C` to a symmetric F in place, leaving it exactly symmetric.

    F [K, K] float32 or float64, C [N, K] float, or int8 with c_scale float32 [N], which multiplies its rows.
    Only one triangle of F is read.
    Raises TypeError, ValueError for bad dtypes or shapes, or a missing c_scale.
    Source: the empirical Fisher matrix, F = (1/N) sum_n c_n c_n^T, before the division.
    """
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
