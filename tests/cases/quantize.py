"""Calls of quantize_rows and dequantize_rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import dequantize_rows, quantize_rows
from tests.cases.common import Case


def large(dtype: torch.dtype) -> Iterator[Case]:
    x = torch.empty(1 << 14, 4096, dtype=dtype)
    q, scale = torch.empty(1 << 14, 4096, dtype=torch.int8), torch.empty(1 << 14)
    yield Case("quantize", lambda: quantize_rows.triton(x))
    yield Case("dequantize", lambda: dequantize_rows.triton(q, scale, dtype))


def small(dtype: torch.dtype) -> Iterator[Case]:
    x = torch.randn(5, 300).to(dtype)
    q, scale = torch.ones(5, 300, dtype=torch.int8), torch.ones(5)
    yield Case("quantize", lambda: quantize_rows.triton(x))
    yield Case("dequantize", lambda: dequantize_rows.triton(q, scale, dtype))
