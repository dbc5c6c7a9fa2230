"""Calls of compress_norm and compress_flat."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import entries
from tests.cases.common import Case
from tests.reference.helpers import make_table


def _calls(dtype: torch.dtype, n: int, t: int, d: int, ks: tuple[int, ...]) -> Iterator[Case]:
    make = torch.randn if t < 100 else torch.empty
    a, g = make(n, t, d, dtype=dtype), make(n, t, d, dtype=dtype)
    ids = torch.randint(0, d, (n, t))
    cu_seqlens = torch.tensor([0, t // 2, n * t])
    for k in ks:
        for kind, fan_in, group in (("scattered", 1, 1), ("runs", 1, 8), ("fold", 3, 8)):
            table = make_table(d, k, fan_in, fan_in > 1, group)
            yield Case(f"norm-{k}-{kind}", lambda i=table, m=group: entries.compress_norm(a, g, *i, m))
        rows, cols = make_table(d, k)[0][0], make_table(d, k)[0][0]
        yield Case(f"flat-{k}", lambda r=rows, c=cols: entries.compress_flat(a, g, r, c))
        yield Case(f"flat-ids-{k}", lambda r=rows, c=cols: entries.compress_flat(ids, g, r, c))
    yield Case("norm-int8", lambda: entries.compress_norm_int8(a, g, *table, 8))
    yield Case("flat-int8", lambda: entries.compress_flat_int8(a, g, rows, cols))
    yield Case("norm-packed", lambda: entries.compress_norm(a, g, cu_seqlens=cu_seqlens))
    yield Case("bias", lambda: entries.compress_norm(None, g))
    yield Case("bias-split", lambda: entries.compress_norm(None, g[:1]))


def large(dtype: torch.dtype) -> Iterator[Case]:
    yield from _calls(dtype, 512, 512, 1024, (64, 1024))
    # The tiles of few columns, and of few samples, whose positions are cut fine.
    a, g = torch.empty(512, 4096, 1024, dtype=dtype), torch.empty(512, 4096, 1024, dtype=dtype)
    for n, k in ((512, 16), (512, 128), (1, 16), (1, 64), (2, 128), (4, 256)):
        rows = make_table(1024, k)[0][0]
        yield Case(f"{n}-samples-{k}", lambda n=n, r=rows: entries.compress_flat(a[:n], g[:n], r, r))


def small(dtype: torch.dtype) -> Iterator[Case]:
    yield from _calls(dtype, 2, 21, 24, (16,))
