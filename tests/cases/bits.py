"""Calls of the ops on rows of few bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import dequantize_bits, quantize_bits, score_topk_bits
from tests.cases.common import Case

KERNEL = "score_topk_bits_kernel"


def large(dtype: torch.dtype) -> Iterator[Case]:
    """A million rows to score, never read. A sort takes seconds to compile, so there are few lists."""
    x, q, scale = torch.empty(1 << 14, 4096, dtype=dtype), torch.empty(256, 4096, dtype=dtype), torch.empty(1 << 20)
    for bits in (1, 2, 4):
        codes = torch.empty(1 << 20, 512 * bits, dtype=torch.uint8)
        few, few_scale = codes[: 1 << 14], scale[: 1 << 14]
        yield Case(f"quantize-{bits}", lambda bits=bits: quantize_bits.triton(x, bits))
        yield Case(
            f"dequantize-{bits}",
            lambda few=few, few_scale=few_scale, bits=bits: dequantize_bits.triton(few, few_scale, bits, dtype),
        )
        for k in (10, 100) if bits == 1 else (10,):
            yield Case(
                f"top-{k}-{bits}",
                lambda codes=codes, bits=bits, k=k: score_topk_bits.triton(q, codes, scale, bits, k),
                KERNEL,
            )


def small(dtype: torch.dtype) -> Iterator[Case]:
    x, q, scale = torch.randn(5, 24).to(dtype), torch.randn(5, 24).to(dtype), torch.rand(70)
    for bits in (1, 2, 4):
        codes = torch.randint(0, 256, (70, 3 * bits), dtype=torch.uint8)
        yield Case(f"quantize-{bits}", lambda bits=bits: quantize_bits.triton(x, bits))
        yield Case(
            f"dequantize-{bits}", lambda codes=codes, bits=bits: dequantize_bits.triton(codes, scale, bits, dtype)
        )
        yield Case(f"top-{bits}", lambda codes=codes, bits=bits: score_topk_bits.triton(q[:3], codes, scale, bits, 3))
