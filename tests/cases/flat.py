"""Calls of compress_flat."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import compress_flat, compress_flat_int8
from tests.cases.common import Case
from tests.reference.helpers import make_table


def _calls(dtype: torch.dtype, n: int, t: int, d: int, ks: tuple[int, ...]) -> Iterator[Case]:
    make = torch.randn if t < 100 else torch.empty
    a, g = make(n, t, d, dtype=dtype), make(n, t, d, dtype=dtype)
    ids = torch.randint(0, d, (n, t))
    for k in ks:
        rows, cols = make_table(d, k)[0][0], make_table(d, k)[0][0]
        yield Case(f"flat-{k}", lambda r=rows, c=cols: compress_flat.triton(a, g, r, c))
        yield Case(f"flat-ids-{k}", lambda r=rows, c=cols: compress_flat.triton(ids, g, r, c))
    yield Case("flat-int8", lambda: compress_flat_int8.triton(a, g, rows, cols))


def large(dtype: torch.dtype) -> Iterator[Case]:
    yield from _calls(dtype, 512, 512, 1024, (64, 1024))
    # The tiles of few columns, and of few samples, whose positions are cut fine.
    a, g = torch.empty(512, 4096, 1024, dtype=dtype), torch.empty(512, 4096, 1024, dtype=dtype)
    for n, k in ((512, 16), (512, 128), (1, 16), (1, 64), (2, 128), (4, 256)):
        rows = make_table(1024, k)[0][0]
        yield Case(f"{n}-samples-{k}", lambda n=n, r=rows: compress_flat.triton(a[:n], g[:n], r, r))


def small(dtype: torch.dtype) -> Iterator[Case]:
    yield from _calls(dtype, 2, 21, 24, (16,))
