"""Compressed gradients of embeddings on a GPU: the one-hot input is built from ids on chip, so nothing is scattered."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import ARCHS, arch_of
from ..op import launches
from ..ops.embedding import check_embedding, compress_embedding, compress_embedding_int8
from .launch import check_device, check_index, launch
from .replay import replayed
from .tiles import Samples, Side, finish, load_left, operand_dtype, outputs, range_of, sample_and_block, store_block
from .tiling import cdiv, computed_tile


@triton.jit
def one_hot(ids, offsets, k, p_index, p_weight, FAN_IN: tl.constexpr, WEIGHTED: tl.constexpr):
    """Return [positions, columns] of the sketched one-hot vectors of `ids`, float32."""
    keep = offsets < k
    if FAN_IN == 0:
        return tl.where((ids[:, None] == offsets[None, :]) & keep[None, :], 1.0, 0.0)
    total = tl.zeros([ids.shape[0], offsets.shape[0]], tl.float32)
    for f in range(FAN_IN):
        row = tl.load(p_index + f * k + offsets, mask=keep, other=-2)
        hit = ids[:, None] == row[None, :]
        if WEIGHTED:
            weight = tl.load(p_weight + f * k + offsets, mask=keep, other=0.0)
            total += tl.where(hit, weight[None, :], 0.0)
        else:
            total += tl.where(hit, 1.0, 0.0)
    return total


@triton.jit
def compress_embedding_kernel(
    p_ids, p_g, p_out, p_scale, p_cu, p_in_index, p_in_weight, p_out_index, p_out_weight,
    T, k_in, k_out, chunk, num_embeddings, padding_idx,
    stride_in, stride_it, stride_gn, stride_gt, stride_gd, stride_split,
    FAN_IN: tl.constexpr, FAN_OUT: tl.constexpr, OUT_GROUP: tl.constexpr,
    IN_WEIGHTED: tl.constexpr, OUT_WEIGHTED: tl.constexpr, PACKED: tl.constexpr, QUANTIZE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    n, offs_o, offs_i = sample_and_block(k_out, k_in, BLOCK_O, BLOCK_I)
    split = tl.program_id(1)
    sample, row, start, stop = range_of(n, split, p_cu, T, chunk, BLOCK_T, PACKED)
    p_ids += sample * stride_in + row * stride_it
    p_g += sample * stride_gn + row * stride_gt
    acc = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for t in range(start, stop, BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T)
        ids = tl.load(p_ids + rows.to(tl.int64) * stride_it, mask=rows < stop, other=-1)
        # Before they are cut to 32 bits, where a wide id would come back as a row of the table.
        ids = tl.where((ids < 0) | (ids >= num_embeddings) | (ids == padding_idx), -1, ids).to(tl.int32)
        right = one_hot(ids, offs_i, k_in, p_in_index, p_in_weight, FAN_IN, IN_WEIGHTED)
        # Positions whose id no column names are masked out of the load: they touch no memory.
        named = tl.max(tl.abs(right), 1) > 0.0
        left = load_left(
            p_g + rows.to(tl.int64) * stride_gt, named, offs_o, k_out, stride_gd,
            p_out_index, p_out_weight, FAN_OUT, OUT_GROUP, OUT_WEIGHTED, DTYPE,
        )  # fmt: skip
        acc = tl.dot(left, right.to(DTYPE), acc, input_precision=PRECISION)
    where = n * k_out * k_in + offs_o[:, None].to(tl.int64) * k_in + offs_i[None, :]
    keep = (offs_o < k_out)[:, None] & (offs_i < k_in)[None, :]
    store_block(p_out, p_scale, n, split, stride_split, acc, where, keep, QUANTIZE)


@launches(compress_embedding, compress_embedding_int8)
@replayed
def launch_embedding(
    ids: Tensor,
    g: Tensor,
    num_embeddings: int,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    padding_idx: int = -1,
    group: int = 1,
    cu_seqlens: Tensor | None = None,
    *,
    quantize: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch `compress_embedding` on g's device. An id outside [0, num_embeddings) contributes 0, as nothing waits."""
    check_embedding(ids, g, num_embeddings, in_index, in_weight, out_index, out_weight, group, cu_seqlens)
    check_device(g=g, ids=ids, in_index=in_index, in_weight=in_weight, out_index=out_index, out_weight=out_weight)
    check_index("in_index", in_index, num_embeddings, group)
    check_index("out_index", out_index, g.shape[-1], group)
    arch = arch_of(g.device) or ARCHS["sm_80"]
    left = Side.of(g, g.shape[-1], out_index, out_weight, group)
    right = Side.of(ids, num_embeddings, in_index, in_weight, 1)
    # Ids look like rows of width 1, so that they have a dense input's strides.
    samples, (ids, g) = Samples.of(cu_seqlens, ids=ids.unsqueeze(-1), g=g)
    # A weight, or a row named twice in a column, need not be exact in 16 bits.
    operand = tl.float32 if right.weighted or right.fan_in > 1 else operand_dtype(g, g)
    tile = computed_tile(samples.number, samples.mean, left.k, right.k, 4 if operand == tl.float32 else 2, arch)
    blocks = cdiv(left.k, tile.block_o) * cdiv(right.k, tile.block_i)
    shape, stored = (samples.number, left.k, right.k), torch.int8 if quantize else torch.float32
    out, scale, partial = outputs(shape, stored, g.device, tile.splits, whole=blocks == 1)
    launch(
        compress_embedding_kernel, (samples.number * blocks, tile.splits), g.device,
        ids, g, out if partial is None else partial, out if scale is None else scale,
        g if samples.cu_seqlens is None else samples.cu_seqlens, right.index, right.weight, left.index, left.weight,
        samples.length, right.k, left.k, samples.chunk(tile.block_t, tile.splits), num_embeddings, padding_idx,
        *ids.stride()[:2], *g.stride(), out.numel(),
        FAN_IN=right.fan_in, FAN_OUT=left.fan_in, OUT_GROUP=left.group, IN_WEIGHTED=right.weighted,
        OUT_WEIGHTED=left.weighted, PACKED=samples.cu_seqlens is not None,
        QUANTIZE=scale is not None and partial is None, DTYPE=operand, PRECISION=arch.precision,
        BLOCK_O=tile.block_o, BLOCK_I=tile.block_i, BLOCK_T=tile.block_t, num_warps=tile.warps, num_stages=2,
    )  # fmt: skip
    if partial is not None:
        finish(partial, out, scale)
    return out, scale
