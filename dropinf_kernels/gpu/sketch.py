"""Gather or fold the last axis on a GPU: straight from memory, or from whole rows streamed at full width."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import ARCHS, arch_of
from ..op import launches
from ..ops.sketch import check_sketch, sketch
from .launch import check_device, check_index, copied, launch
from .replay import allocate, replayed
from .tiles import Side, below, load_side
from .tiling import cdiv, sketch_tile

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def row_offsets(row, N, T, stride_m, stride_n, stride_t, OUTER: tl.constexpr):
    """Return where rows begin, of x [M, N, T, d] where OUTER, else of x [N, T, d]."""
    if OUTER:
        return (row // T // N) * stride_m + (row // T % N) * stride_n + (row % T) * stride_t
    return (row // T) * stride_n + (row % T) * stride_t


@triton.jit
def sketch_gather_kernel(
    p_x, p_out, p_index, p_weight, rows, N, T, k, stride_m, stride_n, stride_t, stride_d, OUTER: tl.constexpr,
    FAN_IN: tl.constexpr, GROUP: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Column blocks of the same rows run side by side, so that a sector that several of them touch is read once.
    blocks_k = tl.cdiv(k, BLOCK_K)
    row = (tl.program_id(0) // blocks_k).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = (tl.program_id(0) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = (row < rows)[:, None]
    p_rows = p_x + row_offsets(row, N, T, stride_m, stride_n, stride_t, OUTER)[:, None]
    tile = load_side(p_rows, live, offs_k, k, stride_d, p_index, p_weight, FAN_IN, GROUP, WEIGHTED, DTYPE, TURNED=False)
    keep = live & below(offs_k, k, GROUP)[None, :]
    tl.store(p_out + row[:, None] * k + offs_k[None, :], tile, mask=keep)


@triton.jit
def sketch_stream_kernel(
    p_x, p_out, p_index, p_weight, N, T, d, k, stride_m, stride_n, stride_t, stride_d, OUTER: tl.constexpr,
    FAN_IN: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    p_row = p_x + row_offsets(row, N, T, stride_m, stride_n, stride_t, OUTER)
    whole = tl.load(p_row + offs_d.to(tl.int64) * stride_d, mask=offs_d < d, other=0.0)
    for start in range(0, k, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        keep = offs_k < k
        total = tl.zeros([BLOCK_K], tl.float32)
        for f in range(FAN_IN):
            columns = tl.load(p_index + f * k + offs_k, mask=keep, other=0)
            part = tl.gather(whole, columns, 0).to(tl.float32)
            if WEIGHTED:
                part *= tl.load(p_weight + f * k + offs_k, mask=keep, other=0.0)
            total += part
        tl.store(p_out + row * k + offs_k, total.to(p_out.dtype.element_ty), mask=keep)


class Rows(NamedTuple):
    """The rows of x [..., d], as the rows of a view [M, N, T, d] with these strides."""

    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, x: Tensor) -> Rows | None:
        """Return the rows of x, in order and without a copy; None where no three strides address them."""
        axes = [(size, step) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
        while True:
            mergeable = [i for i, (a, b) in enumerate(pairwise(axes)) if a[1] == b[0] * b[1]]
            if not mergeable:
                break
            i = mergeable[-1]
            axes[i : i + 2] = [(axes[i][0] * axes[i + 1][0], axes[i + 1][1])]
        if len(axes) > 3:
            return None
        m, n, t = ([(1, 0)] * (3 - len(axes))) + axes
        return cls((m[0], n[0], t[0]), (m[1], n[1], t[1]))


@launches(sketch)
@replayed
def launch_sketch(x: Tensor, index: Tensor, weight: Tensor | None = None, group: int = 1) -> Tensor:
    """Launch `sketch` on x's device."""
    check_sketch(x, index, weight, group)
    check_device(x=x, index=index, weight=weight)
    check_index("index", index, x.shape[-1], group)
    out = allocate((*x.shape[:-1], index.shape[1]), x.dtype, x.device)
    if out.numel() == 0:
        return out
    found = Rows.of(x)
    if found is None:
        x = copied("x", x, "sketch")
        found = Rows.of(x)
        assert found is not None
    (m, n, t), strides = found
    d, side = x.shape[-1], Side.of(x, x.shape[-1], index, weight, group)
    arch = arch_of(x.device) or ARCHS["sm_80"]
    tile = sketch_tile(d, side.k, side.fan_in, side.group, x.element_size(), arch)
    if tile.stream and x.stride(-1) == 1:
        launch(
            sketch_stream_kernel, (m * n * t,), x.device, x, out, side.index, side.weight, n, t, d, side.k,
            *strides, x.stride(-1), OUTER=m > 1, FAN_IN=side.fan_in, WEIGHTED=side.weighted,
            BLOCK_D=tile.block_d, BLOCK_K=tile.block_k, num_warps=tile.warps,
        )  # fmt: skip
        return out
    grid = (cdiv(m * n * t, tile.block_r) * cdiv(side.k, tile.block_k),)
    launch(
        sketch_gather_kernel, grid, x.device, x, out, side.index, side.weight, m * n * t, n, t, side.k,
        *strides, x.stride(-1), OUTER=m > 1, FAN_IN=side.fan_in, GROUP=side.group, WEIGHTED=side.weighted,
        DTYPE=DTYPES[x.dtype], BLOCK_R=tile.block_r, BLOCK_K=tile.block_k, num_warps=tile.warps,
    )  # fmt: skip
    return out
