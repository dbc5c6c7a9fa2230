"""Single entries of per-sample gradients on a GPU: norms and biases (one axis), and pairs of coordinates."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._checks import ID_DTYPES, check_flat, check_norm
from .launch import arch_of, check_cu_seqlens, check_device, check_index, launch
from .linear import packed_rows
from .tiles import Side, below, finish, outputs, range_of, run_columns, sample_and_block, store_block
from .tiling import ARCHS, cdiv, row_tile


@triton.jit
def entries_kernel(
    p_a, p_g, p_out, p_scale, p_cu, p_a_index, p_g_index, p_weight,
    T, k, chunk, stride_an, stride_at, stride_ad, stride_gn, stride_gt, stride_gd, stride_split,
    INPUT: tl.constexpr, FAN_IN: tl.constexpr, GROUP: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr,
    QUANTIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n, j] = sum_f weight sum_t g[t, g_index] * a[t, a_index]; INPUT is "ones", "dense" or "ids" (one-hot)."""
    n, _, offs_k = sample_and_block(1, k, 1, BLOCK_K)
    split = tl.program_id(1)
    keep = below(offs_k, k, GROUP)
    sample, row, start, stop = range_of(n, split, p_cu, T, chunk, BLOCK_T, PACKED)
    p_a += sample * stride_an + row * stride_at
    p_g += sample * stride_gn + row * stride_gt
    total = tl.zeros([BLOCK_K], tl.float32)
    # A side without a table keeps the axis whole: FAN_IN 0, one pass.
    for f in range(FAN_IN if FAN_IN > 0 else 1):
        if FAN_IN == 0:
            g_columns = offs_k.to(tl.int64)
            a_columns = g_columns
        else:
            g_columns = run_columns(offs_k, p_g_index + f * k, GROUP, keep).to(tl.int64)
            if INPUT != "ones":
                a_columns = run_columns(offs_k, p_a_index + f * k, GROUP, keep).to(tl.int64)
        acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for t in range(start, stop, BLOCK_T):
            rows = t + tl.arange(0, BLOCK_T)
            at = rows.to(tl.int64)[:, None]
            mask = (rows < stop)[:, None] & keep[None, :]
            if INPUT == "ids":
                # Entries that the token does not name are masked out, so they touch no memory.
                ids = tl.load(p_a + rows.to(tl.int64) * stride_at, mask=rows < stop, other=-1)
                mask = mask & ((ids >= 0)[:, None] & (ids[:, None] == a_columns[None, :]))
            value = tl.load(p_g + at * stride_gt + g_columns[None, :] * stride_gd, mask=mask, other=0.0).to(tl.float32)
            if INPUT == "dense":
                p_at = p_a + at * stride_at + a_columns[None, :] * stride_ad
                value *= tl.load(p_at, mask=mask, other=0.0).to(tl.float32)
            acc += value
        part = tl.sum(acc, 0)
        if WEIGHTED:
            part *= tl.load(p_weight + f * k + offs_k, mask=keep, other=0.0)
        total += part
    store_block(p_out, p_scale, n, split, stride_split, total, n * k + offs_k, keep, QUANTIZE)


def compress_norm(*args: Any, **kwargs: Any) -> Tensor:
    """Launch `compress_norm` on g's device; see `functional.compress_norm`."""
    return _norm(torch.float32, *args, **kwargs)[0]


def compress_norm_int8(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Launch `compress_norm_int8`: int8 rows, and the scale of each."""
    return _norm(torch.int8, *args, **kwargs)


def compress_flat(*args: Any, **kwargs: Any) -> Tensor:
    """Launch `compress_flat` on g's device; see `functional.compress_flat`."""
    return _flat(torch.float32, *args, **kwargs)[0]


def compress_flat_int8(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Launch `compress_flat_int8`: int8 rows, and the scale of each."""
    return _flat(torch.int8, *args, **kwargs)


def _norm(
    dtype: torch.dtype,
    a: Tensor | None,
    g: Tensor,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    check_norm(a, g, index, weight, group, cu_seqlens)
    check_device(g=g, a=a, index=index, weight=weight)
    check_index("index", index, g.shape[-1], group)
    side = Side.of(g, g.shape[-1], index, weight, group)
    return _entries(dtype, "ones" if a is None else "dense", g if a is None else a, g, side, side.index, cu_seqlens)


def _flat(
    dtype: torch.dtype, a: Tensor, g: Tensor, rows: Tensor, cols: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    check_flat(a, g, rows, cols, cu_seqlens)
    check_device(g=g, a=a, rows=rows, cols=cols)
    check_index("rows", rows, g.shape[-1])
    side = Side.of(g, g.shape[-1], rows.unsqueeze(0), None, 1)
    if a.dtype in ID_DTYPES:
        # Ids look like rows of width 1, so that both kinds of input have the same strides.
        return _entries(dtype, "ids", a.unsqueeze(-1), g, side, cols.contiguous(), cu_seqlens)
    check_index("cols", cols, a.shape[-1])
    return _entries(dtype, "dense", a, g, side, cols.contiguous(), cu_seqlens)


def _entries(
    dtype: torch.dtype, kind: str, a: Tensor, g: Tensor, side: Side, a_index: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if cu_seqlens is None:
        samples, length = g.shape[:2]
        mean = length
    else:
        g = packed_rows("g", g)
        a = g if kind == "ones" else packed_rows("a", a)
        cu_seqlens = check_cu_seqlens(cu_seqlens, g.shape[0], g.device)
        samples, length = cu_seqlens.shape[0] - 1, g.shape[0]
        mean = cdiv(length, max(1, samples))
        a, g = a.unsqueeze(0), g.unsqueeze(0)
    arch = arch_of(g.device) or ARCHS["sm_80"]
    tile = row_tile(samples, mean, side.k, g.element_size(), arch)
    blocks = cdiv(side.k, tile.block_k)
    out, scale, partial = outputs((samples, side.k), dtype, g.device, tile.splits, whole=blocks == 1)
    share = cdiv(cdiv(length, tile.block_r), tile.splits) * tile.block_r
    launch(
        entries_kernel, (samples * blocks, tile.splits), g.device,
        a, g, out if partial is None else partial, out if scale is None else scale,
        g if cu_seqlens is None else cu_seqlens, a_index, side.index, side.weight,
        length, side.k, share if cu_seqlens is None else tile.splits,
        *a.stride(), *g.stride(), out.numel(),
        INPUT=kind, FAN_IN=side.fan_in, GROUP=side.group, WEIGHTED=side.weighted, PACKED=cu_seqlens is not None,
        QUANTIZE=scale is not None and partial is None,
        BLOCK_T=tile.block_r, BLOCK_K=tile.block_k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if partial is not None:
        finish(partial, out, scale)
    return out, scale
