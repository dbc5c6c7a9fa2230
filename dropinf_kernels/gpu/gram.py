"""Fisher accumulation on a GPU: F += C^T C, where only the lower triangle's blocks are computed."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import ARCHS, arch_of
from ..op import launches
from ..ops.gram import check_gram, gram_update
from .launch import check_device, launch
from .tiles import operand_dtype, sum_splits
from .tiling import cdiv, gram_tile

_PART = 16  # side of what one program of the second stage sums
_REGISTER_SUMS = ("sm_8", "sm_9")  # later parts have them in memory of their own, and two programs would spill


@triton.jit
def triangle(p):
    """Return (i, j), i >= j, of the p-th block of a lower triangle, counted along its rows."""
    i = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: one step either way makes it exact.
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    return i, p - i * (i + 1) // 2


@triton.jit
def add_below(p_F, acc, rows, cols, K, stride_r, stride_c):
    """Add a tile below the diagonal to F, and write its mirror image."""
    mask = (rows < K)[:, None] & (cols < K)[None, :]
    p_lower = p_F + rows.to(tl.int64)[:, None] * stride_r + cols.to(tl.int64)[None, :] * stride_c
    total = tl.load(p_lower, mask=mask, other=0.0) + acc
    tl.store(p_lower, total, mask=mask)
    p_upper = p_F + cols.to(tl.int64)[:, None] * stride_r + rows.to(tl.int64)[None, :] * stride_c
    tl.store(p_upper, tl.trans(total), mask=(cols < K)[:, None] & (rows < K)[None, :])


@triton.jit
def add_across(p_F, acc, rows, K, stride_r, stride_c):
    """Add a square on the diagonal to F: its upper half is its lower half."""
    mask = (rows < K)[:, None] & (rows < K)[None, :]
    p_square = p_F + rows.to(tl.int64)[:, None] * stride_r + rows.to(tl.int64)[None, :] * stride_c
    total = tl.load(p_square, mask=mask, other=0.0) + acc
    tl.store(p_square, tl.where(rows[:, None] >= rows[None, :], total, tl.trans(total)), mask=mask)


@triton.jit
def halves(x):
    """Return the upper and the lower rows of a tile."""
    return tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), [1, 2, 0]))


@triton.jit
def add_block(p_F, acc, first, column, K, stride_r, stride_c, BLOCK: tl.constexpr):
    """Add a block to F, part by part: all its addresses and sums at once would leave no room for a second program."""
    HALF: tl.constexpr = BLOCK // 2
    upper, lower = halves(acc)
    if first == column:
        near = first + tl.arange(0, HALF)
        left, _ = halves(tl.trans(upper))
        add_across(p_F, tl.trans(left), near, K, stride_r, stride_c)
        left, right = halves(tl.trans(lower))
        add_below(p_F, tl.trans(left), near + HALF, near, K, stride_r, stride_c)
        add_across(p_F, tl.trans(right), near + HALF, K, stride_r, stride_c)
    else:
        rows, cols = first + tl.arange(0, HALF // 2), column + tl.arange(0, BLOCK)
        one, two = halves(upper)
        add_below(p_F, one, rows, cols, K, stride_r, stride_c)
        add_below(p_F, two, rows + HALF // 2, cols, K, stride_r, stride_c)
        three, four = halves(lower)
        add_below(p_F, three, rows + HALF, cols, K, stride_r, stride_c)
        add_below(p_F, four, rows + HALF + HALF // 2, cols, K, stride_r, stride_c)


@triton.jit
def gram_kernel(
    p_C, p_scale, p_F, p_partial, N, K, share, stride_cn, stride_ck, stride_r, stride_c,
    SCALED: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    i, j = triangle(block)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    start = split * share
    # Counted from the start: a row just below 2^31, plus a block, is no int32.
    length = tl.minimum(N - start, share)
    p_left = p_C + rows.to(tl.int64)[:, None] * stride_ck
    p_right = p_C + cols.to(tl.int64)[None, :] * stride_ck
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for n in tl.range(0, length, BLOCK_N, num_stages=STAGES):
        offs_n = n + tl.arange(0, BLOCK_N)
        live = offs_n < length
        at = start + offs_n
        step = at.to(tl.int64) * stride_cn
        left = tl.load(p_left + step[None, :], mask=(rows < K)[:, None] & live[None, :], other=0).to(DTYPE)
        right = tl.load(p_right + step[:, None], mask=live[:, None] & (cols < K)[None, :], other=0).to(DTYPE)
        if SCALED:
            # One side carries both scales, so that int8 stays exact on the other.
            scale = tl.load(p_scale + at, mask=live, other=0.0)
            right = right * (scale * scale)[:, None]
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    if SPLIT:
        at = tl.arange(0, BLOCK)
        p_mine = p_partial + (split.to(tl.int64) * tl.num_programs(0) + block) * (BLOCK * BLOCK)
        tl.store(p_mine + at[:, None] * BLOCK + at[None, :], acc)
    else:
        add_block(p_F, acc, i * BLOCK, j * BLOCK, K, stride_r, stride_c, BLOCK)


@triton.jit(do_not_specialize=["SPLITS"])
def gram_finish_kernel(p_F, p_partial, K, stride_r, stride_c, SPLITS, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Sum one [PART, PART] of a partial block in order, and add it to F; blocks are few, so many programs share one."""
    block = tl.program_id(0)
    i, j = triangle(block)
    PARTS: tl.constexpr = BLOCK // PART
    part_i, part_j = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    if (i > j) | (part_i >= part_j):
        at = tl.arange(0, PART * PART)
        offsets = (part_i * PART + at // PART) * BLOCK + part_j * PART + at % PART
        blocks = tl.num_programs(0).to(tl.int64)
        total = sum_splits(
            p_partial + block.to(tl.int64) * (BLOCK * BLOCK) + offsets, blocks * (BLOCK * BLOCK), SPLITS, at >= 0, 16
        )
        values = tl.reshape(total, [PART, PART])
        rows, cols = (i * PARTS + part_i) * PART + tl.arange(0, PART), (j * PARTS + part_j) * PART + tl.arange(0, PART)
        if (i == j) & (part_i == part_j):
            add_across(p_F, values, rows, K, stride_r, stride_c)
        else:
            add_below(p_F, values, rows, cols, K, stride_r, stride_c)


@launches(gram_update)
def launch_gram(F: Tensor, C: Tensor, c_scale: Tensor | None = None) -> None:
    """Launch `gram_update` on F's device."""
    check_gram(F, C, c_scale)
    check_device(F=F, C=C, c_scale=c_scale)
    rows, k = C.shape
    arch = arch_of(F.device) or ARCHS["sm_80"]
    operand = tl.float32 if c_scale is not None else operand_dtype(C, C)
    tile = gram_tile(rows, k, 4 if operand == tl.float32 else 2, c_scale is not None, arch)
    side = cdiv(k, tile.block)
    blocks = side * (side + 1) // 2
    if rows == 0 or k == 0:
        return
    split = tile.splits > 1
    shape = (tile.splits, blocks, tile.block, tile.block)
    partial = torch.empty(shape, dtype=torch.float32, device=F.device) if split else F
    launch(
        gram_kernel, (blocks, tile.splits), F.device, C, C if c_scale is None else c_scale.contiguous(), F, partial,
        rows, k, min(rows, cdiv(cdiv(rows, tile.block_n), tile.splits) * tile.block_n), *C.stride(), *F.stride(),
        SCALED=c_scale is not None, SPLIT=split, DTYPE=operand, PRECISION=arch.precision,
        BLOCK=tile.block, BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        resident=2 if operand != tl.float32 and tile.warps == 8 and arch.name.startswith(_REGISTER_SUMS) else 1,
    )  # fmt: skip
    if split:
        launch(
            gram_finish_kernel, (blocks, (tile.block // _PART) ** 2), F.device, F, partial, k, *F.stride(), tile.splits,
            BLOCK=tile.block, PART=_PART, num_warps=4,
        )  # fmt: skip
