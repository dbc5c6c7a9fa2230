"""Compressed gradients of linear maps on a GPU: gather or fold both sides and multiply them, in one kernel.

A program owns one block of one sample's C_n = sum_t (S_out g_t)(S_in a_t)^T and a range of positions. Each kept
value is read once per block of the other side; nothing of size T x k is written.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import ARCHS, arch_of
from ..op import launches
from ..ops.linear import (
    check_into,
    check_linear,
    check_output_dtype,
    compress_linear,
    compress_linear_int8,
    compress_linear_into,
)
from .launch import check_device, check_index, choose, launch
from .replay import replayed
from .tiles import (
    Samples,
    Side,
    finish,
    load_left,
    load_side,
    operand_dtype,
    outputs,
    range_of,
    sample_and_block,
    store_block,
)
from .tiling import OuterTile, cdiv, outer_candidates


@triton.jit
def compress_linear_kernel(
    p_a, p_g, p_out, p_scale, p_cu,
    p_in_index, p_in_weight, p_out_index, p_out_weight,
    T, k_in, k_out, chunk,
    stride_an, stride_at, stride_ad, stride_gn, stride_gt, stride_gd, stride_row, stride_split,
    FAN_IN: tl.constexpr, FAN_OUT: tl.constexpr, IN_GROUP: tl.constexpr, OUT_GROUP: tl.constexpr,
    IN_WEIGHTED: tl.constexpr, OUT_WEIGHTED: tl.constexpr, PACKED: tl.constexpr, QUANTIZE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n, offs_o, offs_i = sample_and_block(k_out, k_in, BLOCK_O, BLOCK_I)
    split = tl.program_id(1)
    sample, row, start, stop = range_of(n, split, p_cu, T, chunk, BLOCK_T, PACKED)
    p_a += sample * stride_an + row * stride_at
    p_g += sample * stride_gn + row * stride_gt
    acc = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for t in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        rows = t + tl.arange(0, BLOCK_T)
        live = rows < stop
        left = load_left(
            p_g + rows.to(tl.int64) * stride_gt, live, offs_o, k_out, stride_gd,
            p_out_index, p_out_weight, FAN_OUT, OUT_GROUP, OUT_WEIGHTED, DTYPE,
        )  # fmt: skip
        right = load_side(
            p_a + rows.to(tl.int64)[:, None] * stride_at, live[:, None], offs_i, k_in, stride_ad,
            p_in_index, p_in_weight, FAN_IN, IN_GROUP, IN_WEIGHTED, DTYPE, TURNED=False,
        )  # fmt: skip
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    where = n * stride_row + offs_o[:, None].to(tl.int64) * k_in + offs_i[None, :]
    keep = (offs_o < k_out)[:, None] & (offs_i // IN_GROUP < k_in // IN_GROUP)[None, :]
    store_block(p_out, p_scale, n, split, stride_split, acc, where, keep, QUANTIZE)


@launches(compress_linear_into)
@replayed
def launch_linear_into(
    out: Tensor,
    a: Tensor,
    g: Tensor,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Launch `compress_linear_into` on g's device."""
    check_into(out, a, g, in_index, out_index, cu_seqlens)
    check_device(g=g, out=out)
    launch_linear(a, g, in_index, in_weight, out_index, out_weight, group, cu_seqlens, out.dtype, out=out)


@launches(compress_linear, compress_linear_int8)
@replayed
def launch_linear(
    a: Tensor,
    g: Tensor,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    quantize: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch `compress_linear` on g's device."""
    check_output_dtype(dtype)
    check_linear(a, g, in_index, in_weight, out_index, out_weight, group, cu_seqlens)
    check_device(g=g, a=a, in_index=in_index, in_weight=in_weight, out_index=out_index, out_weight=out_weight)
    check_index("in_index", in_index, a.shape[-1], group)
    check_index("out_index", out_index, g.shape[-1], group)
    arch = arch_of(g.device) or ARCHS["sm_80"]
    left = Side.of(g, g.shape[-1], out_index, out_weight, group)
    right = Side.of(a, a.shape[-1], in_index, in_weight, group)
    samples, (a, g) = Samples.of(cu_seqlens, a=a, g=g)
    stored = torch.int8 if quantize else dtype or torch.float32
    operand = operand_dtype(a, g)
    itemsize = 4 if operand == tl.float32 else 2
    summed = left.is_summed or right.is_summed
    problem = (samples.number, samples.mean, left.k, right.k, itemsize, left.is_narrow or right.is_narrow, arch)

    def launch_tile(tile: OuterTile) -> tuple[Tensor, Tensor | None]:
        blocks = cdiv(left.k, tile.block_o) * cdiv(right.k, tile.block_i)
        shape = (samples.number, left.k, right.k)
        made, scale, partial = outputs(shape, stored, g.device, tile.splits, whole=blocks == 1, out=out)
        launch(
            compress_linear_kernel, (samples.number * blocks, tile.splits), g.device,
            a, g, made if partial is None else partial, made if scale is None else scale,
            g if samples.cu_seqlens is None else samples.cu_seqlens,
            right.index, right.weight, left.index, left.weight,
            samples.length, right.k, left.k, samples.chunk(tile.block_t, tile.splits),
            *a.stride(), *g.stride(), made.stride(0) if partial is None else left.k * right.k, made.numel(),
            FAN_IN=right.fan_in, FAN_OUT=left.fan_in, IN_GROUP=right.group, OUT_GROUP=left.group,
            IN_WEIGHTED=right.weighted, OUT_WEIGHTED=left.weighted, PACKED=samples.cu_seqlens is not None,
            QUANTIZE=scale is not None and partial is None, DTYPE=operand, PRECISION=arch.precision,
            BLOCK_O=tile.block_o, BLOCK_I=tile.block_i, BLOCK_T=tile.block_t, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages, resident=1 if summed or itemsize == 4 else tile.resident,
        )  # fmt: skip
        if partial is not None:
            finish(partial, made, scale)
        return made, scale

    return launch_tile(choose("compress_linear", problem, outer_candidates(*problem), launch_tile))
