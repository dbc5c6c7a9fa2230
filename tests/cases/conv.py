"""Calls of compress_conv and sketch_patches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dropinf_kernels import compress_conv, compress_conv_int8, sketch_patches
from tests.cases.common import Case
from tests.reference.helpers import make_table

WINDOW = ([3, 3], [1, 1], [1, 1], [1, 1])


def _calls(x: torch.Tensor, g: torch.Tensor, ks: tuple[int, ...]) -> Iterator[Case]:
    channels, outputs = x.shape[1], g.shape[1]
    for k in ks:
        for kind, fan_in in (("dropout", 1), ("fold", 2)):
            right, left = make_table(channels * 9, k, fan_in, fan_in > 1), make_table(outputs, k, fan_in, fan_in > 1)
            yield Case(
                f"{k}-{kind}",
                lambda r=right, m=left: compress_conv.triton(x, g, *WINDOW, 1, *r, *m),
                "compress_conv_kernel",
            )
            yield Case(f"patches-{k}-{kind}", lambda r=right: sketch_patches.triton(x, *WINDOW, *r))
    yield Case("int8", lambda: compress_conv_int8.triton(x, g, *WINDOW, 1, *right, *left), "compress_conv_kernel")
    for groups in (2, channels):
        right = make_table(channels // groups * 9, 9)
        yield Case(f"groups-{groups}", lambda r=right, n=groups: compress_conv.triton(x, g, *WINDOW, n, *r))
    yield Case("groups-int8", lambda: compress_conv_int8.triton(x, g, *WINDOW, groups, *right))


def large(dtype: torch.dtype) -> Iterator[Case]:
    x, g = torch.empty(256, 128, 32, 32, dtype=dtype), torch.empty(256, 256, 32, 32, dtype=dtype)
    yield from _calls(x, g, (64, 256))
    # The tiles of few columns, and of few samples.
    for n, k in ((256, 16), (2, 64), (1, 16)):
        right, left = make_table(128 * 9, k), make_table(256, k)
        yield Case(
            f"{n}-samples-{k}",
            lambda n=n, r=right, m=left: compress_conv.triton(x[:n], g[:n], *WINDOW, 1, *r, *m),
            "compress_conv_kernel",
        )


def small(dtype: torch.dtype) -> Iterator[Case]:
    yield from _calls(torch.randn(2, 4, 5, 6).to(dtype), torch.randn(2, 8, 5, 6).to(dtype), (6,))
