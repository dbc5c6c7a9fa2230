"""Compressed gradients of elementwise scales and biases on a GPU.

Their kernel sums products of single columns, so it gathers entries of a flattened gradient as well (`flat.py`).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import ARCHS, arch_of
from ..op import launches
from ..ops.norm import check_norm, compress_norm, compress_norm_int8
from .launch import check_device, check_index, launch
from .replay import replayed
from .tiles import Samples, Side, below, finish, outputs, range_of, run_columns, sample_and_block, store_block
from .tiling import cdiv, row_tile


@triton.jit
def entries_kernel(
    p_a, p_g, p_out, p_scale, p_cu, p_a_index, p_g_index, p_weight,
    T, k, chunk, stride_an, stride_at, stride_ad, stride_gn, stride_gt, stride_gd, stride_split,
    INPUT: tl.constexpr, FAN_IN: tl.constexpr, GROUP: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr,
    QUANTIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute out[n, j] = sum_f weight sum_t g[t, g_index] * a[t, a_index].

    INPUT says what a is: "ones", "dense", or the one-hot vectors of "ids".
    """
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


@launches(compress_norm, compress_norm_int8)
@replayed
def launch_norm(
    a: Tensor | None,
    g: Tensor,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
    *,
    quantize: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch `compress_norm` on g's device."""
    check_norm(a, g, index, weight, group, cu_seqlens)
    check_device(g=g, a=a, index=index, weight=weight)
    check_index("index", index, g.shape[-1], group)
    side = Side.of(g, g.shape[-1], index, weight, group)
    if a is None:
        return launch_entries("ones", g, g, side, side.index, cu_seqlens, quantize)
    return launch_entries("dense", a, g, side, side.index, cu_seqlens, quantize)


def launch_entries(
    kind: str, a: Tensor, g: Tensor, side: Side, a_index: Tensor, cu_seqlens: Tensor | None, quantize: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch `entries_kernel` with INPUT `kind`: the entries that `side` names of g, and `a_index` of a."""
    if kind == "ones":
        samples, (g,) = Samples.of(cu_seqlens, g=g)
        a = g
    else:
        samples, (g, a) = Samples.of(cu_seqlens, g=g, a=a)
    arch = arch_of(g.device) or ARCHS["sm_80"]
    tile = row_tile(samples.number, samples.mean, side.k, g.element_size(), arch)
    blocks = cdiv(side.k, tile.block_k)
    shape, stored = (samples.number, side.k), torch.int8 if quantize else torch.float32
    out, scale, partial = outputs(shape, stored, g.device, tile.splits, whole=blocks == 1)
    launch(
        entries_kernel, (samples.number * blocks, tile.splits), g.device,
        a, g, out if partial is None else partial, out if scale is None else scale,
        g if samples.cu_seqlens is None else samples.cu_seqlens, a_index, side.index, side.weight,
        samples.length, side.k, samples.chunk(tile.block_r, tile.splits), *a.stride(), *g.stride(), out.numel(),
        INPUT=kind, FAN_IN=side.fan_in, GROUP=side.group, WEIGHTED=side.weighted,
        PACKED=samples.cu_seqlens is not None, QUANTIZE=scale is not None and partial is None,
        BLOCK_T=tile.block_r, BLOCK_K=tile.block_k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if partial is not None:
        finish(partial, out, scale)
    return out, scale
