"""Calls of sketch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import sketch
from tests.cases.common import Case
from tests.reference.helpers import make_table


def large(dtype: torch.dtype) -> Iterator[Case]:
    x = torch.empty(32, 512, 4096, dtype=dtype)
    for kind, k, fan_in, group in (
        ("scattered", 64, 1, 1), ("scattered-streamed", 2048, 1, 1), ("fold", 64, 4, 1), ("fold-streamed", 1024, 4, 1),
        ("runs", 64, 1, 8), ("runs-wide", 256, 1, 8), ("scattered-few", 16, 1, 1), ("scattered-128", 128, 1, 1),
    ):  # fmt: skip
        table = make_table(4096, k, fan_in, fan_in > 1, group)
        vector = "sketch_gather_kernel" if group >= 8 else ""
        yield Case(kind, lambda t=table, n=group: sketch.triton(x, *t, n), vector=vector, asynchronous=False)
    heads = torch.empty(32, 512, 8, 512, dtype=dtype).transpose(1, 2)
    for kind, k, group in (("heads-runs", 64, 8), ("heads-streamed", 448, 1)):
        vector, table = "sketch_gather_kernel" if group >= 8 else "", make_table(512, k, 1, False, group)
        yield Case(kind, lambda t=table, n=group: sketch.triton(heads, *t, n), vector=vector, asynchronous=False)
    wide, table = torch.empty(32, 512, 16384, dtype=dtype), make_table(16384, 8192)
    yield Case("wide-streamed", lambda: sketch.triton(wide, *table))


def small(dtype: torch.dtype) -> Iterator[Case]:
    x = torch.randn(2, 5, 40).to(dtype)
    for kind, k, fan_in, group in (
        ("scattered", 8, 1, 1),
        ("streamed", 40, 2, 1),
        ("runs", 16, 1, 8),
        ("fold", 8, 3, 8),
    ):
        table = make_table(40, k, fan_in, fan_in > 1, group)
        yield Case(kind, lambda t=table, n=group: sketch.triton(x, *t, n))
    heads, table = torch.randn(2, 5, 3, 40).to(dtype).transpose(1, 2), make_table(40, 16, 1, False, 8)
    yield Case("heads", lambda: sketch.triton(heads, *table, 8))
    yield Case("heads-streamed", lambda: sketch.triton(heads, *make_table(40, 39)))
