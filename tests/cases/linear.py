"""Calls of compress_linear: every tile that tiling.py can choose, for each kind of side; and small ones that run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import compress_linear, compress_linear_int8, compress_linear_into
from tests.cases.common import Case
from tests.reference.helpers import make_table

BLOCKS = {"32x32": (16, 32), "64x64": (64, 64), "64x128": (64, 256), "128x64": (256, 64), "128x128": (256, 256)}


def large(dtype: torch.dtype) -> Iterator[Case]:
    """Problems of a transformer layer; the tensors are never read, so their memory is never committed."""
    n, t, d = 512, 512, 4096
    a, g = torch.empty(n, t, d, dtype=dtype), torch.empty(n, t, d, dtype=dtype)
    for block, (k_out, k_in) in BLOCKS.items():
        kept = torch.empty(n, t, k_in, dtype=dtype)
        for kind, group, fan_in in (("scattered", 1, 1), ("runs", 8, 1), ("fold", 1, 4)):
            left = make_table(d, k_out, fan_in, fan_in > 1, group)
            right = make_table(d, k_in, fan_in, fan_in > 1, group)

            def both(left=left, right=right, group=group):
                return compress_linear.triton(a, g, *right, *left, group, dtype=dtype)

            def kept_input(left=left, kept=kept, group=group):
                return compress_linear.triton(kept, g, None, None, *left, group)

            kernel = "compress_linear_kernel"
            vector = kernel if group >= 8 else ""
            yield Case(f"{block}-{kind}", both, kernel, vector)
            yield Case(f"{block}-{kind}-kept-input", kept_input, kernel, vector)
    left, right = make_table(d, 64, 1, False, 8), make_table(d, 64, 1, False, 8)
    cu_seqlens = torch.tensor([0, 4096], dtype=torch.int32)
    one_a, one_g = torch.empty(1, 4096, d, dtype=dtype), torch.empty(1, 4096, d, dtype=dtype)
    for kind, group, fan_in in (("scattered", 1, 1), ("runs", 8, 1), ("fold", 1, 4)):
        tables = (*make_table(d, 64, fan_in, fan_in > 1, group), *make_table(d, 64, fan_in, fan_in > 1, group))
        for length in (4096, 2048, 1024):  # on sm_90, steps of 64, 32 and 16 positions in blocks of 32 x 32

            def few(t=length, tables=tables, group=group):
                return compress_linear.triton(one_a[:, :t], one_g[:, :t], *tables, group)

            kernel = "compress_linear_kernel"
            yield Case(f"one-sample-{length}-{kind}", few, kernel, kernel if group >= 8 else "")
    yield Case(
        "packed",
        lambda: compress_linear.triton(a[:8].view(-1, d), g[:8].view(-1, d), *right, *left, 8, cu_seqlens),
        "compress_linear_kernel",
    )
    room = torch.empty(n, 3 * 64 * 64)[:, 64 * 64 :][:, : 64 * 64].unflatten(1, (64, 64))
    yield Case("into", lambda: compress_linear_into.triton(room, a, g, *right, *left, 8), "compress_linear_kernel")
    yield Case("int8", lambda: compress_linear_int8.triton(a, g, *right, *left, 8), "compress_linear_kernel")
    yield Case(
        "int8-split", lambda: compress_linear_int8.triton(a[:2], g[:2], *right, *left, 8), "compress_linear_kernel"
    )


def small(dtype: torch.dtype) -> Iterator[Case]:
    """Odd shapes that a numpy interpreter runs in a moment."""
    a, g = torch.randn(2, 37, 40).to(dtype), torch.randn(2, 37, 24).to(dtype)
    cu_seqlens = torch.tensor([0, 5, 5, 74])
    for kind, group, fan_in in (("scattered", 1, 1), ("runs", 8, 1), ("fold", 4, 3)):
        right, left = make_table(40, 24, fan_in, fan_in > 1, group), make_table(24, 8, fan_in, fan_in > 1, group)
        yield Case(kind, lambda i=right, o=left, n=group: compress_linear.triton(a, g, *i, *o, n))
        yield Case(
            f"{kind}-packed", lambda i=right, o=left, n=group: compress_linear.triton(a, g, *i, *o, n, cu_seqlens)
        )
        yield Case(f"{kind}-int8", lambda i=right, o=left, n=group: compress_linear_int8.triton(a, g, *i, *o, n))
    room = torch.empty(2, 1000)[:, 20:980].unflatten(1, (24, 40))
    yield Case("into", lambda: compress_linear_into.triton(room, a, g))
    yield Case("whole", lambda: compress_linear.triton(a.transpose(0, 1), g.transpose(0, 1)))
