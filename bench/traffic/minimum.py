"""The fewest bytes that an op can move, from its arguments alone: each used input once, each output byte once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .recorder import SECTOR


def all_bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def used_columns(x: Tensor, index: Tensor | None) -> int:
    """Bytes of x [..., d] that a table of runs or a fold uses."""
    columns = x.shape[-1] if index is None else index.unique().numel()
    return math.prod(x.shape[:-1]) * columns * x.element_size()


def touched_columns(x: Tensor, index: Tensor | None) -> int:
    """Bytes of the sectors that a table's columns of x [..., d] touch; never more than whole rows."""
    return all_bytes(x) if index is None else math.prod(x.shape[:-1]) * touched_row(x, index)


def touched_row(x: Tensor, columns: Tensor) -> int:
    row = x.shape[-1] * x.element_size()
    if not x.is_contiguous() or row % SECTOR:
        raise ValueError(f"x has shape {list(x.shape)} and strides {list(x.stride())}; its rows must be whole sectors")
    sectors = (columns.long().flatten() * x.element_size() // SECTOR).unique().numel()
    return min(sectors * SECTOR, row)


def used_planes(g: Tensor, index: Tensor | None) -> int:
    """Bytes of g [N, C, ...] in the channels that a table uses."""
    channels = g.shape[1] if index is None else index.unique().numel()
    return g.numel() // g.shape[1] * channels * g.element_size()


def used_patches(x: Tensor, index: Tensor | None, kernel_size: Sequence[int], padding: Sequence[int]) -> int:
    """Bytes of x [N, C, H, W] inside the kept taps of a stride-1 convolution, each value once."""
    plane = torch.arange(1, 1 + x[0].numel(), dtype=torch.float64).view(1, *x.shape[1:])
    taps = torch.nn.functional.unfold(plane, list(kernel_size), padding=list(padding))[0]
    taps = taps if index is None else taps[index.unique().long()]
    used = taps.unique()
    return x.shape[0] * int((used > 0).sum()) * x.element_size()


def named_rows(g: Tensor, ids: Tensor, in_index: Tensor, out_index: Tensor) -> int:
    """Bytes of g [N, T, d] that compress_embedding uses: the kept columns of positions whose id is kept."""
    named = int(torch.isin(ids, in_index.long()).sum())
    return named * out_index.unique().numel() * g.element_size()


def matched_entries(g: Tensor, ids: Tensor, rows: Tensor, cols: Tensor) -> int:
    """Bytes of the sectors of g [N, T, d] that compress_flat touches: column rows[j] where the id is cols[j]."""
    flat = ids.flatten()
    total = 0
    for name in cols.unique():
        here = int((flat == name).sum())
        total += here * touched_row(g, rows[cols == name])
    return total
