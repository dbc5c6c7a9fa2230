"""Gathering, folding, looking up and accumulating in plain PyTorch: what the ops' bodies share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import document_bounds

# What a body may hold beyond its inputs and its output.
BUFFER_BYTES = 16 << 20
# One element of this dtype moves one run of that many bytes.
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x.to(dtype)`. A call of `to` that changes nothing costs microseconds, asking does not."""
    return x if x.dtype == dtype else x.to(dtype)


def _can_widen(x: Tensor, ratio: int) -> bool:
    aligned = all(s % ratio == 0 for s in x.stride()[:-1]) and x.storage_offset() % ratio == 0
    return x.stride(-1) == 1 and aligned


def gather_columns(x: Tensor, columns: Tensor, group: int) -> Tensor:
    """Return `x[..., columns]`, as whole runs when `columns` is made of aligned runs of `group`."""
    return gather_runs(x, runs_of(columns, group), group)


def runs_of(columns: Tensor, group: int) -> Tensor:
    """Return which aligned runs of `group` columns `columns` is made of."""
    return columns if group == 1 else columns[::group] // group


def gather_runs(x: Tensor, runs: Tensor, group: int) -> Tensor:
    """Return the columns of `x` in each of `runs`: `runs[0] * group`, ..., `runs[0] * group + group - 1`, ..."""
    lead = x.shape[:-1]
    if x.dim() > 1 and x.stride(-1) != 1 and x.stride(-2) == 1:  # turned: its columns are rows in memory
        if group == 1:
            return x.mT.index_select(-2, runs).mT
        runs_as_rows: Tensor = x.mT.unflatten(-2, (-1, group))
        return runs_as_rows.index_select(-3, runs).flatten(-3, -2).mT
    # Of two or three dimensions index_select takes half to three quarters of the time, but on one thread alone.
    alone = torch.get_num_threads() == 1 and x.is_contiguous()
    if group == 1:
        if alone and x.element_size() == 4:
            return x.view(math.prod(lead), x.shape[-1]).index_select(1, runs).view(*lead, runs.numel())
        # Twice as fast as index_select on the last axis of a CPU tensor.
        return x.gather(-1, runs.long().expand(*lead, -1))
    wide = _WIDE.get(group * x.element_size())
    if wide is not None and _can_widen(x, group):
        return x.view(wide).gather(-1, runs.long().expand(*lead, -1)).view(x.dtype)
    if alone:
        kept = x.view(math.prod(lead), x.shape[-1] // group, group).index_select(1, runs)
        return kept.view(*lead, runs.numel() * group)
    return x.view(*lead, x.shape[-1] // group, group).index_select(-2, runs).flatten(-2)


def sketch_columns(x: Tensor, index: Tensor | None, weight: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """Sketch the last axis of `x` in `dtype`; no index keeps the axis whole."""
    if index is None:
        return cast(x, dtype)
    return fold(lambda f: cast(gather_columns(x, index[f], group), dtype), index.shape[0], weight)


def fold(part: Callable[[int], Tensor], fan_in: int, weight: Tensor | None) -> Tensor:
    """Return sum_f weight[f] * part(f), where weight[f] broadcasts and part(f) is owned by the caller."""
    out = part(0)
    if weight is not None:
        weight = weight.to(out.dtype)
        out.mul_(weight[0])
    for f in range(1, fan_in):
        if weight is None:
            out.add_(part(f))
        else:
            out.addcmul_(part(f), weight[f])
    return out


def columns_of(index: Tensor | None, d: int) -> int:
    """Return how many columns a sketch keeps of an axis of `d`; no index keeps them all."""
    return d if index is None else index.shape[1]


def samples_of(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return how many samples `x` holds, or how many documents."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@dataclass(frozen=True)
class Lookup:
    """Entries of a table sorted by the vocabulary row they read."""

    keys: Tensor  # sorted vocabulary rows
    entry: Tensor  # where each came from in the flattened table

    @classmethod
    def build(cls, rows: Tensor) -> Lookup:
        keys, entry = torch.sort(rows.flatten().long(), stable=True)
        return cls(keys, entry)

    def matches(self, ids: Tensor, skip: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (token, entry) for each pair of an id and an entry that reads it, `limit` pairs at a time."""
        ids = ids.long()
        first = torch.searchsorted(self.keys, ids)
        count = torch.searchsorted(self.keys, ids, right=True) - first
        count.masked_fill_(ids == skip, 0)
        ends = count.cumsum(0)
        total, limit = int(ends[-1]) if ends.numel() else 0, max(1, limit)
        for start in range(0, total, limit):
            pair = torch.arange(start, min(start + limit, total), device=ids.device)
            token = torch.searchsorted(ends, pair, right=True)
            yield token, self.entry[first[token] + pair - (ends - count)[token]]


def add_at(out: Tensor, where: Tensor, values: Tensor) -> None:
    """Add `values` to `out` at `where`, in an order that does not change from run to run."""
    if out.is_cuda:
        # index_add_ would use atomics there, whose order changes.
        out.index_put_((where,), values, accumulate=True)
    else:
        out.index_add_(0, where, values)


def sample_bounds(ids: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Return where each sample, or document, starts in the flattened ids, and their end."""
    if cu_seqlens is not None:
        return document_bounds(cu_seqlens, ids.numel())
    return [n * ids.shape[1] for n in range(ids.shape[0] + 1)]


def sample_of_row(bounds: list[int], device: torch.device) -> Tensor:
    """Return the sample that each row belongs to."""
    edges = torch.tensor(bounds, device=device)
    return torch.repeat_interleave(torch.arange(len(bounds) - 1, device=device), edges.diff())
