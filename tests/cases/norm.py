"""Calls of compress_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import compress_norm, compress_norm_int8
from tests.cases.common import Case
from tests.reference.helpers import make_table


def _calls(dtype: torch.dtype, n: int, t: int, d: int, ks: tuple[int, ...]) -> Iterator[Case]:
    make = torch.randn if t < 100 else torch.empty
    a, g = make(n, t, d, dtype=dtype), make(n, t, d, dtype=dtype)
    cu_seqlens = torch.tensor([0, t // 2, n * t])
    for k in ks:
        for kind, fan_in, group in (("scattered", 1, 1), ("runs", 1, 8), ("fold", 3, 8)):
            table = make_table(d, k, fan_in, fan_in > 1, group)
            yield Case(f"norm-{k}-{kind}", lambda i=table, m=group: compress_norm.triton(a, g, *i, m))
    yield Case("norm-int8", lambda: compress_norm_int8.triton(a, g, *table, 8))
    yield Case("norm-packed", lambda: compress_norm.triton(a, g, cu_seqlens=cu_seqlens))
    yield Case("bias", lambda: compress_norm.triton(None, g))
    yield Case("bias-split", lambda: compress_norm.triton(None, g[:1]))


def large(dtype: torch.dtype) -> Iterator[Case]:
    yield from _calls(dtype, 512, 512, 1024, (64, 1024))


def small(dtype: torch.dtype) -> Iterator[Case]:
    yield from _calls(dtype, 2, 21, 24, (16,))
