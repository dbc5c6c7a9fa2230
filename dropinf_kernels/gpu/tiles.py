"""What kernels and launchers share: loading one sketched side of a product, and finishing split sums."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_cu_seqlens, copied, launch
from .replay import allocate
from .tiling import cdiv, power_of_two


@triton.jit
def run_columns(offsets, p_index, GROUP: tl.constexpr, keep):
    """Return the coordinates of output columns: each run's start is read once, so that runs load as vectors."""
    start = tl.load(p_index + (offsets // GROUP) * GROUP, mask=keep, other=0)
    return tl.max_contiguous(tl.multiple_of(start + offsets % GROUP, GROUP), GROUP)


@triton.jit
def below(offsets, k, GROUP: tl.constexpr):
    """Return `offsets < k` for a k that GROUP divides, in a form that is constant over each run."""
    return offsets // GROUP < k // GROUP


@triton.jit
def spread(x, TURNED: tl.constexpr):
    """Lay columns along the last axis of a tile, or along the first of a turned one."""
    return x[:, None] if TURNED else x[None, :]


@triton.jit
def sample_and_block(k_out, k_in, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """Return this program's sample, and its rows and columns of the sample's [k_out, k_in].

    All lie on the first axis of the grid, which alone may be longer than 65,535; blocks of a sample run side by side,
    as they read the same rows.
    """
    blocks_i = tl.cdiv(k_in, BLOCK_I)
    blocks = tl.cdiv(k_out, BLOCK_O) * blocks_i
    n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    offs_o = (block // blocks_i) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = (block % blocks_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    return n.to(tl.int64), offs_o, offs_i


@triton.jit
def range_of(n, split, p_cu, T, chunk, BLOCK_T: tl.constexpr, PACKED: tl.constexpr):
    """Return (sample, row, start, stop): where sample n begins, and the positions of it that are this split's.

    `chunk` is the length of a range, or, where documents are packed in one sample, the number of splits.
    """
    zero = tl.full([], 0, tl.int64)
    if PACKED:
        sample = zero
        row = tl.load(p_cu + n).to(tl.int64)
        length = (tl.load(p_cu + n + 1).to(tl.int64) - row).to(tl.int32)
        share = tl.cdiv(tl.cdiv(length, BLOCK_T), chunk) * BLOCK_T
    else:
        sample, row, length, share = n, zero, T, chunk
    start = split * share
    return sample, row, start, tl.minimum(length, start + share)


@triton.jit
def store_block(p_out, p_scale, n, split, stride_split, values, where, keep, QUANTIZE: tl.constexpr):
    """Store one block of sample n's result (or partial result), or all of it as int8 with its scale."""
    if QUANTIZE:
        rounded, scale = quantized(values, keep)
        tl.store(p_out + where, rounded, mask=keep)
        tl.store(p_scale + n, scale)
    else:
        p_out += split.to(tl.int64) * stride_split
        tl.store(p_out + where, values.to(p_out.dtype.element_ty), mask=keep)


@triton.jit
def load_left(
    p_rows, keep_rows, offsets, k, stride, p_index, p_weight,
    FAN_IN: tl.constexpr, GROUP: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Load a sketched side whose rows are contiguous as [columns, rows], the left of a product.

    What loads asynchronously is loaded so. Else lanes lie along a row, as lanes along a column would each ask for a
    cache line of their own; the tile is turned in registers.
    """
    SINGLE: tl.constexpr = GROUP == 1 and p_rows.dtype.element_ty.primitive_bitwidth < 32  # no asynchronous load
    if FAN_IN == 1 and SINGLE and not WEIGHTED:
        tile = tl.trans(
            load_side(
                p_rows[:, None], keep_rows[:, None], offsets, k, stride, p_index, p_weight,
                FAN_IN, GROUP, WEIGHTED, DTYPE, TURNED=False,
            )
        )  # fmt: skip
    else:
        tile = load_side(
            p_rows[None, :], keep_rows[None, :], offsets, k, stride, p_index, p_weight,
            FAN_IN, GROUP, WEIGHTED, DTYPE, TURNED=True,
        )  # fmt: skip
    return tile


@triton.jit
def load_side(
    p_rows, keep_rows, offsets, k, stride, p_index, p_weight,
    FAN_IN: tl.constexpr, GROUP: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Load a sketched side as [rows, columns], or turned as [columns, rows]; FAN_IN 0 is a side without a table.

    `p_rows` and `keep_rows` are [rows, 1], turned [1, rows]. Turned tiles are loaded so, not transposed: a
    transposed one does not load asynchronously on sm_80.
    """
    keep = below(offsets, k, GROUP)
    mask = keep_rows & spread(keep, TURNED)
    if FAN_IN == 0:
        tile = tl.load(p_rows + spread(offsets.to(tl.int64) * stride, TURNED), mask=mask, other=0.0).to(DTYPE)
    elif FAN_IN == 1 and not WEIGHTED:
        columns = run_columns(offsets, p_index, GROUP, keep).to(tl.int64)
        tile = tl.load(p_rows + spread(columns * stride, TURNED), mask=mask, other=0.0).to(DTYPE)
    else:
        total = tl.zeros(mask.shape, dtype=tl.float32)
        # A loop, not unrolled: a fold holds one gathered tile in registers at a time.
        for f in range(FAN_IN):
            columns = run_columns(offsets, p_index + f * k, GROUP, keep).to(tl.int64)
            part = tl.load(p_rows + spread(columns * stride, TURNED), mask=mask, other=0.0).to(tl.float32)
            if WEIGHTED:
                part *= spread(tl.load(p_weight + f * k + offsets, mask=keep, other=0.0), TURNED)
            total += part
        tile = total.to(DTYPE)
    return tile


@triton.jit
def quantized(values, mask):
    """Return int8 values and the scale max|row| / 127 of one row; a row that is not finite gets scale NaN."""
    # Flat, as reducing one axis of an accumulator in tensor memory does not compile for sm_100.
    flat = tl.reshape(tl.where(mask, values, 0.0), [values.numel], can_reorder=True)
    most = tl.max(tl.abs(flat), 0)
    finite = tl.sum(tl.where(flat - flat != 0.0, 1, 0), 0) == 0
    scale = tl.div_rn(most, 127.0)
    divisor = tl.where(scale > 0, scale, 1.0)
    ratio = tl.where(finite, tl.div_rn(values, divisor + tl.zeros(values.shape, tl.float32)), 0.0)
    # Half to even, as torch.round: adding and taking away 1.5 * 2^23 rounds in the adder.
    rounded = (ratio + 12582912.0) - 12582912.0
    return tl.clamp(rounded, -127.0, 127.0).to(tl.int8), tl.where(finite, scale, float("nan"))


@triton.jit
def sum_splits(p_split, stride_split, SPLITS, keep, AT_ONCE: tl.constexpr):
    """Sum each column's SPLITS partial results: many loads at a time, in an order that their number alone decides."""
    total = tl.zeros(keep.shape, tl.float32)
    for first in range(0, SPLITS, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        p_part = p_split[None, :] + split.to(tl.int64)[:, None] * stride_split
        total += tl.sum(tl.load(p_part, mask=(split < SPLITS)[:, None] & keep[None, :], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["SPLITS"])
def finish_kernel(
    p_partial, p_out, p_scale, width, stride_row, stride_split, SPLITS,
    QUANTIZE: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the partial results of (a block of) one row, and store it in the output's dtype or as int8 with a scale."""
    if QUANTIZE:
        row = tl.program_id(0).to(tl.int64)
        most = tl.zeros([BLOCK], tl.float32)
        bad = tl.zeros([BLOCK], tl.int32)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total = sum_splits(p_partial + row * width + at, stride_split, SPLITS, at < width, AT_ONCE)
            most = tl.maximum(most, tl.abs(total))
            bad += tl.where(total - total != 0.0, 1, 0)
        finite = tl.sum(bad, 0) == 0
        scale = tl.div_rn(tl.max(most, 0), 127.0)
        tl.store(p_scale + row, tl.where(finite, scale, float("nan")))
        divisor = tl.where(scale > 0, scale, 1.0) + tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total = sum_splits(p_partial + row * width + at, stride_split, SPLITS, at < width, AT_ONCE)
            ratio = (tl.where(finite, tl.div_rn(total, divisor), 0.0) + 12582912.0) - 12582912.0
            tl.store(p_out + row * stride_row + at, tl.clamp(ratio, -127.0, 127.0).to(tl.int8), mask=at < width)
    else:
        blocks = tl.cdiv(width, BLOCK)
        row = (tl.program_id(0) // blocks).to(tl.int64)
        at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        total = sum_splits(p_partial + row * width + at, stride_split, SPLITS, at < width, AT_ONCE)
        tl.store(p_out + row * stride_row + at, total.to(p_out.dtype.element_ty), mask=at < width)


def finish(partial: Tensor, out: Tensor, scale: Tensor | None) -> None:
    """Sum `partial` [S, N, ...] float32 over S, in order, into `out` [N, ...], or int8 rows with `scale` [N]."""
    rows, width = out.shape[0], out[0].numel() if out.shape[0] else 0
    at_once = power_of_two(partial.shape[0], 1, 16)
    block = 2048 // at_once
    launch(
        finish_kernel, (rows if scale is not None else rows * cdiv(width, block),), out.device,
        partial, out, out if scale is None else scale, width, out.stride(0), rows * width, partial.shape[0],
        QUANTIZE=scale is not None, AT_ONCE=at_once, BLOCK=block, num_warps=4,
    )  # fmt: skip


def outputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    splits: int,
    whole: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Allocate (out, scale, partial): `partial` [splits, *shape] where a second stage is needed, `scale` for int8.

    `whole` says that one program holds a whole row, so that int8 needs no second stage.
    """
    out = allocate(shape, dtype, device) if out is None else out
    quantize = dtype == torch.int8
    scale = allocate(shape[:1], torch.float32, device) if quantize else None
    two_stage = splits > 1 or (quantize and not whole)
    partial = allocate((splits, *shape), torch.float32, device) if two_stage else None
    return out, scale, partial


@dataclass(frozen=True)
class Side:
    """One sketched side as the kernels take it; a missing table passes the tensor itself, which is never read."""

    index: Tensor
    weight: Tensor
    k: int
    fan_in: int  # 0: no table
    weighted: bool
    group: int  # columns come in aligned runs of this power of two

    @property
    def is_narrow(self) -> bool:
        """Return whether values load one by one, or are summed before they are multiplied."""
        return self.is_summed or (self.fan_in == 1 and self.group < 4)

    @property
    def is_summed(self) -> bool:
        """Return whether values are computed with, in registers, before they are multiplied."""
        return self.fan_in > 1 or self.weighted

    @classmethod
    def of(cls, x: Tensor, d: int, index: Tensor | None, weight: Tensor | None, group: int) -> Side:
        if index is None:
            return cls(x, x, d, 0, False, min(16, d & -d) if d else 1)
        index = index.contiguous()
        weight = None if weight is None else weight.contiguous()
        run = min(16, group & -group)
        return cls(index, index if weight is None else weight, index.shape[1], index.shape[0], weight is not None, run)


def packed_rows(name: str, x: Tensor) -> Tensor:
    """Return [B, T, d] as [B * T, d]: a view, or a copy where its rows are not evenly spaced."""
    if x.dim() == 2:
        return x
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return copied(name, x, "packed rows").view(-1, x.shape[-1])


def operand_dtype(a: Tensor, g: Tensor) -> tl.dtype:
    """Return what the matrix units multiply: the common 16-bit dtype, or float32 where the two differ."""
    if a.dtype == g.dtype and a.dtype in (torch.float16, torch.bfloat16):
        return tl.float16 if a.dtype == torch.float16 else tl.bfloat16
    return tl.float32


class Samples(NamedTuple):
    """The samples of a launch; documents that are packed in one sample count as samples."""

    number: int
    length: int  # of each, or of the one that holds all documents
    mean: int
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, cu_seqlens: Tensor | None, **inputs: Tensor) -> tuple[Samples, list[Tensor]]:
        """Return the samples of inputs [N, T, d], or of documents in [B, T, d] or [rows, d], and inputs [N, T, d]."""
        tensors = list(inputs.values())
        if cu_seqlens is None:
            number, length = tensors[0].shape[:2]
            return cls(number, length, length, None), tensors
        rows = [packed_rows(name, x) for name, x in inputs.items()]
        length = rows[0].shape[0]
        cu_seqlens = check_cu_seqlens(cu_seqlens, length, rows[0].device)
        number = cu_seqlens.shape[0] - 1
        return cls(number, length, cdiv(length, max(1, number)), cu_seqlens), [x.unsqueeze(0) for x in rows]

    def chunk(self, block: int, splits: int) -> int:
        """Return what `range_of` takes: the length of a range, or, where documents are packed, the number of splits."""
        return splits if self.cu_seqlens is not None else cdiv(cdiv(self.length, block), splits) * block
