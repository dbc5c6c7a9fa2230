"""Calls of compress_embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import compress_embedding, compress_embedding_int8
from tests.cases.common import Case
from tests.reference.helpers import make_table


def _calls(ids: torch.Tensor, g: torch.Tensor, rows: int, ks: tuple[int, ...]) -> Iterator[Case]:
    d, (n, t) = g.shape[-1], ids.shape
    cu_seqlens = torch.tensor([0, t // 2, n * t])
    kernel = "compress_embedding_kernel"
    for k in ks:
        for kind, fan_in, group in (("scattered", 1, 1), ("runs", 1, 8), ("fold", 3, 8)):
            args = (rows, *make_table(rows, k, fan_in, fan_in > 1, group), *make_table(d, k, fan_in, fan_in > 1, group))
            yield Case(f"{k}-{kind}", lambda a=args, m=group: compress_embedding.triton(ids, g, *a, -1, m), kernel)
    yield Case("packed", lambda: compress_embedding.triton(ids, g, *args, 0, 8, cu_seqlens), kernel)
    yield Case("int8", lambda: compress_embedding_int8.triton(ids, g, *args, 0, 8), kernel)


def large(dtype: torch.dtype) -> Iterator[Case]:
    ids, g = torch.zeros(512, 512, dtype=torch.int64), torch.empty(512, 512, 1024, dtype=dtype)
    yield from _calls(ids, g, 50304, (64, 256))
    # The tiles of few columns, and of few samples.
    for n, k in ((512, 16), (8, 64), (4, 16)):
        args = (50304, *make_table(50304, k, 1, False, 8), *make_table(1024, k, 1, False, 8))
        yield Case(
            f"{n}-samples-{k}",
            lambda n=n, a=args: compress_embedding.triton(ids[:n], g[:n], *a, -1, 8),
            "compress_embedding_kernel",
        )


def small(dtype: torch.dtype) -> Iterator[Case]:
    yield from _calls(torch.randint(0, 40, (2, 21)), torch.randn(2, 21, 24).to(dtype), 40, (8,))
