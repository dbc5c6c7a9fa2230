"""int8 rows on a GPU: a scale per row, half-to-even rounding."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..op import launches
from ..ops.checks import check_float
from ..ops.quantize import check_quantized, dequantize_rows, quantize_rows
from .launch import check_device, launch
from .replay import allocate, replayed
from .tiling import cdiv, power_of_two


@triton.jit
def quantize_rows_kernel(p_x, p_q, p_scale, K, stride_n, stride_k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p_x += row * stride_n
    most = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(p_x + at.to(tl.int64) * stride_k, mask=at < K, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
        bad += tl.where(x - x != 0.0, 1, 0)
    finite = tl.sum(bad, 0) == 0
    scale = tl.div_rn(tl.max(most, 0), 127.0)
    tl.store(p_scale + row, tl.where(finite, scale, float("nan")))
    divisor = tl.where(scale > 0, scale, 1.0) + tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(p_x + at.to(tl.int64) * stride_k, mask=at < K, other=0.0).to(tl.float32)
        # Adding and taking away 1.5 * 2^23 rounds half to even in the adder.
        ratio = (tl.where(finite, tl.div_rn(x, divisor), 0.0) + 12582912.0) - 12582912.0
        tl.store(p_q + row * K + at, tl.clamp(ratio, -127.0, 127.0).to(tl.int8), mask=at < K)


@triton.jit
def dequantize_rows_kernel(p_q, p_scale, p_out, K, stride_n, stride_k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(p_q + row * stride_n + at.to(tl.int64) * stride_k, mask=at < K, other=0)
    # The product has 31 bits: exact in float64 alone.
    WIDE: tl.constexpr = tl.float64 if p_out.dtype.element_ty == tl.float64 else tl.float32
    value = q.to(WIDE) * tl.load(p_scale + row).to(WIDE)
    tl.store(p_out + row * K + at, value.to(p_out.dtype.element_ty), mask=at < K)


@launches(quantize_rows)
@replayed
def launch_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `quantize_rows` on x's device; a row that is not finite gets scale NaN and q 0, as nothing waits here."""
    check_float("x", x, 2)
    q = allocate(x.shape, torch.int8, x.device)
    scale = allocate(x.shape[:1], torch.float32, x.device)
    block = power_of_two(x.shape[1], 128, 2048)
    launch(
        quantize_rows_kernel, (x.shape[0],), x.device, x, q, scale, x.shape[1], *x.stride(),
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return q, scale


@launches(dequantize_rows)
def launch_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Launch `dequantize_rows` on q's device."""
    check_quantized(q, scale)
    check_device(q=q, scale=scale)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    block = power_of_two(q.shape[1], 128, 2048)
    launch(
        dequantize_rows_kernel, (q.shape[0], cdiv(q.shape[1], block)), q.device, q, scale.contiguous(), out,
        q.shape[1], *q.stride(), BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def _warps(block: int) -> int:
    """Return the warps that load a block in 16 bytes a thread of 16-bit values, twice over."""
    return max(1, block // 512)
