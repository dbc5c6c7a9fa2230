"""Gather or fold the last axis on a GPU: straight from memory, or from whole rows streamed at full width."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import ARCHS, arch_of
from ..op import launches
from ..ops.sketch import check_sketch, sketch
from .launch import check_device, check_index, launch
from .tiles import Side, below, load_side
from .tiling import cdiv, sketch_tile

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def sketch_gather_kernel(
    p_x, p_out, p_index, p_weight, rows, T, k, stride_n, stride_t, stride_d,
    FAN_IN: tl.constexpr, GROUP: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Column blocks of the same rows run side by side, so that a sector that several of them touch is read once.
    blocks_k = tl.cdiv(k, BLOCK_K)
    row = (tl.program_id(0) // blocks_k).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = (tl.program_id(0) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = (row < rows)[:, None]
    p_rows = p_x + ((row // T) * stride_n + (row % T) * stride_t)[:, None]
    tile = load_side(p_rows, live, offs_k, k, stride_d, p_index, p_weight, FAN_IN, GROUP, WEIGHTED, DTYPE, TURNED=False)
    keep = live & below(offs_k, k, GROUP)[None, :]
    tl.store(p_out + row[:, None] * k + offs_k[None, :], tile, mask=keep)


@triton.jit
def sketch_stream_kernel(
    p_x, p_out, p_index, p_weight, T, d, k, stride_n, stride_t, stride_d,
    FAN_IN: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    p_row = p_x + (row // T) * stride_n + (row % T) * stride_t
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


def merged_rows(name: str, x: Tensor) -> tuple[int, int, int, int]:
    """Return (N, T, stride_n, stride_t) that address every row of x [..., d] as row n * T + t, without a copy."""
    axes = [(size, step) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    while True:
        mergeable = [i for i, (a, b) in enumerate(pairwise(axes)) if a[1] == b[0] * b[1]]
        if not mergeable:
            break
        i = mergeable[-1]
        axes[i : i + 2] = [(axes[i][0] * axes[i + 1][0], axes[i + 1][1])]
    if len(axes) > 2:
        raise ValueError(
            f"{name} has shape {list(x.shape)} and strides {list(x.stride())}; its leading dimensions must merge into "
            f"two: pass {name}.contiguous()"
        )
    (n, stride_n), (t, stride_t) = ([(1, 0)] * (2 - len(axes))) + axes
    return n, t, stride_n, stride_t


@launches(sketch)
def launch_sketch(x: Tensor, index: Tensor, weight: Tensor | None = None, group: int = 1) -> Tensor:
    """Launch `sketch` on x's device."""
    check_sketch(x, index, weight, group)
    check_device(x=x, index=index, weight=weight)
    check_index("index", index, x.shape[-1], group)
    out = torch.empty((*x.shape[:-1], index.shape[1]), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    n, t, stride_n, stride_t = merged_rows("x", x)
    d, side = x.shape[-1], Side.of(x, x.shape[-1], index, weight, group)
    arch = arch_of(x.device) or ARCHS["sm_80"]
    tile = sketch_tile(d, side.k, side.fan_in, side.group, x.element_size(), arch)
    if tile.stream and x.stride(-1) == 1:
        launch(
            sketch_stream_kernel, (n * t,), x.device, x, out, side.index, side.weight, t, d, side.k,
            stride_n, stride_t, x.stride(-1), FAN_IN=side.fan_in, WEIGHTED=side.weighted,
            BLOCK_D=tile.block_d, BLOCK_K=tile.block_k, num_warps=tile.warps,
        )  # fmt: skip
        return out
    grid = (cdiv(n * t, tile.block_r) * cdiv(side.k, tile.block_k),)
    launch(
        sketch_gather_kernel, grid, x.device, x, out, side.index, side.weight, n * t, t, side.k,
        stride_n, stride_t, x.stride(-1), FAN_IN=side.fan_in, GROUP=side.group, WEIGHTED=side.weighted,
        DTYPE=DTYPES[x.dtype], BLOCK_R=tile.block_r, BLOCK_K=tile.block_k, num_warps=tile.warps,
    )  # fmt: skip
    return out
