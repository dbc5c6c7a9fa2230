"""Calls of gram_update."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import gram_update
from tests.cases.common import Case


def large(dtype: torch.dtype) -> Iterator[Case]:
    for k in (64, 256, 4096):
        F, C = torch.empty(k, k), torch.empty(1 << 14, k, dtype=dtype)
        vector = "gram_kernel"
        yield Case(f"{k}", lambda F=F, C=C: gram_update.triton(F, C), "gram_kernel", vector)
    if dtype == torch.float32:
        F, C = torch.empty(4096, 4096), torch.empty(1 << 14, 4096, dtype=torch.int8)
        yield Case("int8", lambda: gram_update.triton(F, C, torch.empty(1 << 14)), "gram_kernel")


def small(dtype: torch.dtype) -> Iterator[Case]:
    for n, k in ((20, 30), (5, 150)):
        F, C = torch.zeros(k, k), torch.randn(n, k).to(dtype)
        yield Case(f"{n}x{k}", lambda F=F, C=C: gram_update.triton(F, C))
    C = torch.randint(-127, 127, (9, 20), dtype=torch.int8)
    yield Case("int8", lambda: gram_update.triton(torch.zeros(20, 20), C, torch.rand(9)))
