"""Sketches, and the compressed gradients of linear maps and norms, in plain PyTorch.

Every body gathers before it multiplies, accumulates in float32 (float64 for float64 inputs), ignores
autocast and records no autograd graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ._checks import check_linear, check_norm, check_output_dtype, check_sketch, document_bounds

P = ParamSpec("P")
R = TypeVar("R")

# What a body may hold beyond its inputs and its output.
BUFFER_BYTES = 16 << 20
# One element of this dtype moves one run of that many bytes.
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@contextlib.contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    available = torch.amp.is_autocast_available(device)
    with torch.no_grad(), torch.autocast(device, enabled=False) if available else contextlib.nullcontext():
        yield


def exact(fn: Callable[P, R]) -> Callable[P, R]:
    """Run `fn` without autograd, and without the autocast of its first tensor's device."""

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # Leaving either costs ten times what asking for it does.
        autocast = torch._C._is_any_autocast_enabled()
        if not autocast and not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        tensors = [v for v in chain(args, kwargs.values()) if isinstance(v, Tensor)]
        if not autocast and not any(v.requires_grad for v in tensors):
            return fn(*args, **kwargs)
        with _without_autocast(tensors[0].device.type) if autocast else torch.no_grad():
            return fn(*args, **kwargs)

    return run


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


@exact
def sketch(x: Tensor, index: Tensor, weight: Tensor | None = None, group: int = 1) -> Tensor:
    check_sketch(x, index, weight, group)
    return cast(sketch_columns(x, index, weight, group, accumulator(x)), x.dtype)


@exact
def compress_linear(
    a: Tensor,
    g: Tensor,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    check_linear(a, g, in_index, in_weight, out_index, out_weight, group, cu_seqlens)
    check_output_dtype(dtype)
    wide = accumulator(a, g)
    k_in, k_out = (x.shape[-1] if index is None else index.shape[1] for x, index in ((a, in_index), (g, out_index)))
    samples = g.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # Weights of one survivor per output commute with the product: they scale it where it has fewer values.
    smaller = samples * k_in * k_out < math.prod(g.shape[:-1]) * (k_in + k_out)
    (in_weight, in_scale), (out_weight, out_scale) = (
        (None, w) if smaller and w is not None and w.shape[0] == 1 else (w, None) for w in (in_weight, out_weight)
    )
    kept_a = sketch_columns(a, in_index, in_weight, group, wide)
    kept_g = sketch_columns(g, out_index, out_weight, group, wide)
    out = outer_products(kept_a, kept_g, cu_seqlens)
    if in_scale is not None:
        out.mul_(in_scale.to(wide))
    if out_scale is not None:
        out.mul_(out_scale.to(wide).mT)
    return cast(out, dtype or wide)


def outer_products(a: Tensor, g: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return each sample's sum over its rows of g a^T, in the dtype that it accumulates in."""
    wide = accumulator(a, g)
    a, g = cast(a, wide), cast(g, wide)
    if cu_seqlens is None:
        return torch.bmm(g.transpose(1, 2), a)
    a, g = a.flatten(0, -2), g.flatten(0, -2)
    bounds = document_bounds(cu_seqlens, g.shape[0])
    out = g.new_empty(len(bounds) - 1, g.shape[1], a.shape[1])
    for n in range(len(bounds) - 1):
        rows = slice(bounds[n], bounds[n + 1])
        torch.mm(g[rows].t(), a[rows], out=out[n])
    return out


@exact
def compress_norm(
    a: Tensor | None,
    g: Tensor,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    check_norm(a, g, index, weight, group, cu_seqlens)
    dtype = accumulator(a, g)
    if index is not None and index.shape[0] == 1:
        # One survivor per output: the sum needs the kept columns alone.
        a, g = None if a is None else gather_columns(a, index[0], group), gather_columns(g, index[0], group)
        total = _sum_products(a, g, cu_seqlens, dtype)
        return total if weight is None else total.mul_(weight[0].to(dtype))
    # The sketch is linear: applied to the sum, it sees N rows instead of N * T.
    return sketch_columns(_sum_products(a, g, cu_seqlens, dtype), index, weight, group, dtype)


def _sum_products(a: Tensor | None, g: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return sum_t a_nt * g_nt per sample, or per document, in `dtype`; no `a` means ones."""
    if cu_seqlens is not None:
        g = g.flatten(0, -2)
        a = None if a is None else a.flatten(0, -2)
        bounds = document_bounds(cu_seqlens, g.shape[0])
        out = g.new_empty(len(bounds) - 1, g.shape[1], dtype=dtype)
        for n in range(len(bounds) - 1):
            rows = slice(bounds[n], bounds[n + 1])
            product = g[rows] if a is None else g[rows].to(dtype) * a[rows]
            torch.sum(product, 0, dtype=dtype, out=out[n])
        return out
    samples = max(1, BUFFER_BYTES // max(1, g.shape[1] * g.shape[2] * dtype.itemsize))
    out = g.new_empty(g.shape[0], g.shape[2], dtype=dtype)
    for n in range(0, g.shape[0], samples):
        block = slice(n, n + samples)
        product = g[block] if a is None else g[block].to(dtype) * a[block]
        torch.sum(product, 1, dtype=dtype, out=out[block])
    return out
