"""Rows of few bits on a GPU: a byte is loaded once for all of its coordinates."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import ARCHS, arch_of
from ..op import launches
from ..ops.bits import (
    STEPS,
    check_codes,
    check_few_bits,
    check_topk_bits,
    dequantize_bits,
    quantize_bits,
    score_topk_bits,
)
from .launch import check_device, launch
from .tiling import MAX_TOP, TopkTile, cdiv, power_of_two, topk_bits_tile
from .topk import best_rows, keep_best, operand_of, store_lists


@triton.jit
def value_of(packed, f: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Return the values of field f of bytes, before they are scaled: exact in 16 bits."""
    LOW: tl.constexpr = (1 << BITS) - 1
    # In float32 first, for 16 bits: interpreters have no constant in bfloat16.
    WIDE: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    return (((packed >> (f * BITS)) & LOW).to(WIDE) - LOW / 2).to(DTYPE)


@triton.jit
def quantize_bits_kernel(
    p_x, p_codes, p_scale, K, width, stride_n, stride_k, step, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    HALF: tl.constexpr = 1 << (BITS - 1)
    row = tl.program_id(0).to(tl.int64)
    p_x += row * stride_n
    most = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(p_x + at.to(tl.int64) * stride_k, mask=at < K, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
        bad += tl.where(x - x != 0.0, 1, 0)
    largest = tl.max(most, 0)
    finite = tl.sum(bad, 0) == 0
    divisor = tl.where(finite & (largest > 0), largest, 1.0) + tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(p_x + at.to(tl.int64) * stride_k, mask=at < K, other=0.0).to(tl.float32)
        unit = tl.where(finite, tl.div_rn(x, divisor), 0.0)
        squares += unit * unit
    square = tl.sum(squares, 0)
    edge = tl.sqrt_rn(tl.div_rn(square, K.to(tl.float32))) * step
    edges = tl.where(edge > 0, edge, 1.0) + tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        packed = tl.zeros([BLOCK], tl.int32)
        for f in tl.static_range(8 // BITS):
            columns = (f * width + at).to(tl.int64)
            x = tl.load(p_x + columns * stride_k, mask=at < width, other=0.0).to(tl.float32)
            unit = tl.where(finite, tl.div_rn(x, divisor), 0.0)
            code = tl.clamp(tl.floor(tl.div_rn(unit, edges)) + HALF, 0.0, 2.0 * HALF - 1.0)
            products += (code - (HALF - 0.5)) * unit
            packed |= code.to(tl.int32) << (f * BITS)
        tl.store(p_codes + row * width + at, packed.to(tl.uint8), mask=at < width)
    product = tl.sum(products, 0)
    scale = largest * tl.div_rn(square, tl.where(product > 0, product, 1.0))
    tl.store(p_scale + row, tl.where(finite & (scale - scale == 0.0), scale, float("nan")))


@triton.jit
def dequantize_bits_kernel(
    p_codes, p_scale, p_out, width, stride_n, stride_j, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.load(p_codes + row * stride_n + at.to(tl.int64) * stride_j, mask=at < width, other=0)
    # A product of 28 bits: exact in float64 alone.
    WIDE: tl.constexpr = tl.float64 if p_out.dtype.element_ty == tl.float64 else tl.float32
    scale = tl.load(p_scale + row).to(WIDE)
    for f in tl.static_range(8 // BITS):
        value = value_of(packed, f, BITS, WIDE) * scale
        p_value = p_out + row * width * (8 // BITS) + f * width + at
        tl.store(p_value, value.to(p_out.dtype.element_ty), mask=at < width)


@triton.jit
def score_topk_bits_kernel(
    p_q, p_codes, p_scale, p_keys, Q, N, width, share, stride_qn, stride_qk, stride_cn, stride_cj,
    BITS: tl.constexpr, FIELDS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    TOP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = 8 // BITS // FIELDS
    offs_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    split = tl.program_id(1)
    start = split * share
    # Counted from the start: a row just below 2^31, plus a block, is no int32.
    length = tl.minimum(N - start, share)
    p_query = p_q + offs_q.to(tl.int64)[:, None] * stride_qn
    best = tl.full([BLOCK_Q, TOP], -(2**63), tl.int64)
    for n in range(0, length, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        live = offs_n < length
        rows = start + offs_n
        p_row = p_codes + rows.to(tl.int64)[None, :] * stride_cn
        scores = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        for step in tl.range(0, tl.cdiv(width, BLOCK_K) * GROUPS, num_stages=STAGES):
            at = step // GROUPS * BLOCK_K + tl.arange(0, BLOCK_K)
            first = step % GROUPS * FIELDS
            mask_q = (offs_q < Q)[:, None] & (at < width)[None, :]
            mask_c = (at < width)[:, None] & live[None, :]
            packed = tl.load(p_row + at.to(tl.int64)[:, None] * stride_cj, mask=mask_c, other=0) >> (first * BITS)
            for f in tl.static_range(FIELDS):
                columns = ((first + f) * width + at).to(tl.int64)[None, :]
                q = tl.load(p_query + columns * stride_qk, mask=mask_q, other=0.0).to(DTYPE)
                scores = tl.dot(q, value_of(packed, f, BITS, DTYPE), scores, input_precision=PRECISION)
        scores *= tl.load(p_scale + rows, mask=live, other=0.0)[None, :]
        best = keep_best(best, scores, rows, live, TOP, BLOCK_Q, BLOCK_N)
    store_lists(p_keys, best, split, offs_q, Q, TOP)


@launches(quantize_bits)
def launch_quantize_bits(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Launch `quantize_bits` on x's device; a row that is not finite gets scale NaN, as nothing waits here."""
    check_few_bits(x, bits)
    width = x.shape[1] // (8 // bits)
    codes = torch.empty((x.shape[0], width), dtype=torch.uint8, device=x.device)
    scale = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
    block = power_of_two(width, 128, 1024)
    launch(
        quantize_bits_kernel, (x.shape[0],), x.device, x, codes, scale, x.shape[1], width, *x.stride(), STEPS[bits],
        BITS=bits, BLOCK=block, num_warps=block // 128,
    )  # fmt: skip
    return codes, scale


@launches(dequantize_bits)
def launch_dequantize_bits(codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Launch `dequantize_bits` on codes' device."""
    check_codes(codes, scale, bits)
    check_device(codes=codes, scale=scale)
    rows, width = codes.shape
    out = torch.empty((rows, width * (8 // bits)), dtype=dtype, device=codes.device)
    block = power_of_two(width, 128, 1024)
    launch(
        dequantize_bits_kernel, (rows, cdiv(width, block)), codes.device, codes, scale.contiguous(), out,
        width, *codes.stride(), BITS=bits, BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
    return out


@launches(score_topk_bits)
def launch_topk_bits(
    q: Tensor, codes: Tensor, scale: Tensor, bits: int, k: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Launch `score_topk_bits` on q's device. Longer lists than the kernel keeps on chip take the plain body."""
    if k > MAX_TOP:
        return score_topk_bits.plain(q, codes, scale, bits, k, offset)
    check_topk_bits(q, codes, scale, bits, k)
    check_device(q=q, codes=codes, scale=scale)
    arch, operand = arch_of(q.device) or ARCHS["sm_80"], operand_of(q, codes)

    def launch_scores(keys: Tensor, tile: TopkTile, share: int) -> None:
        launch(
            score_topk_bits_kernel, (cdiv(len(q), tile.block_q), tile.splits), q.device,
            q, codes, scale.contiguous(), keys, len(q), len(codes), codes.shape[1],
            share, *q.stride(), *codes.stride(),
            BITS=bits, FIELDS=min(8 // bits, tile.fields), DTYPE=operand, PRECISION=arch.precision, TOP=keys.shape[2],
            BLOCK_Q=tile.block_q, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    return best_rows(launch_scores, topk_bits_tile, q, len(codes), k, offset, operand, arch)
