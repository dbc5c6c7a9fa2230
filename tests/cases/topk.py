"""Calls of score_topk: a tile for every length of list; and small ones that run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import score_topk
from tests.cases.common import Case

KERNEL = "score_topk_kernel"


def large(dtype: torch.dtype) -> Iterator[Case]:
    """A million rows, never read. A sort takes seconds to compile, so each tile is compiled once."""
    q, c = torch.empty(256, 1024, dtype=dtype), torch.empty(1 << 20, 1024, dtype=dtype)
    for k in (10, 20, 64, 100, 256):
        yield Case(f"top-{k}", lambda k=k: score_topk.triton(q, c, k), KERNEL, KERNEL if k <= 64 else "")
    if dtype != torch.float32:
        yield Case("few-queries", lambda: score_topk.triton(q[:3], c, 10), KERNEL, KERNEL)
    int8, scale = torch.empty(1 << 20, 1024, dtype=torch.int8), torch.empty(1 << 20)
    yield Case("int8", lambda: score_topk.triton(q, int8, 10, scale), KERNEL)


def small(dtype: torch.dtype) -> Iterator[Case]:
    q, c = torch.randn(5, 24).to(dtype), torch.randn(70, 24).to(dtype)
    int8, scale = torch.randint(-127, 128, (70, 24), dtype=torch.int8), torch.rand(70)
    for k in (3, 20):
        yield Case(f"top-{k}", lambda k=k: score_topk.triton(q, c, k))
        yield Case(f"top-{k}-int8", lambda k=k: score_topk.triton(q, int8, k, scale))
    yield Case("few-queries", lambda: score_topk.triton(q[:3], c, 3))
