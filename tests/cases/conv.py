"""Calls of compress_conv and sketch_patches: every tile, 1 to 3 axes, grouped and depthwise; and small ones that run."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from dropinf_kernels import conv, conv_output_size
from tests.cases.common import Case
from tests.reference.helpers import make_table

BLOCKS = {"32x32": (16, 32), "64x64": (64, 64), "64x128": (64, 256), "128x64": (256, 64), "128x128": (256, 256)}
MATRIX = "compress_conv_kernel"


def window(axes: int, kernel: int, stride: int = 1, padding: int = 0) -> tuple[list[int], ...]:
    return [kernel] * axes, [stride] * axes, [padding] * axes, [1] * axes


def large(dtype: torch.dtype) -> Iterator[Case]:
    """Convolutions of a residual network and of patch embeddings; the tensors are never read."""
    x, g = torch.empty(256, 256, 28, 28, dtype=dtype), torch.empty(256, 512, 28, 28, dtype=dtype)
    same = window(2, 3, 1, 1)
    for block, (k_out, k_in) in BLOCKS.items():
        for kind, fan_in in (("scattered", 1), ("fold", 4)):
            left, right = make_table(512, k_out, fan_in, fan_in > 1), make_table(256 * 9, k_in, fan_in, fan_in > 1)

            def call(left=left, right=right):
                return conv.compress_conv(x, g, *same, 1, *right, *left)

            yield Case(f"{block}-{kind}", call, MATRIX)
    pixels, patches = torch.empty(256, 3, 224, 224, dtype=dtype), torch.empty(256, 768, 14, 14, dtype=dtype)
    yield Case("whole", lambda: conv.compress_conv(pixels, patches, *window(2, 16, 16), 1), MATRIX)
    left, right = make_table(512, 64), make_table(256 * 9, 64)
    yield Case("split", lambda: conv.compress_conv(x[:1], g[:1], *same, 1, *right, *left), MATRIX)
    last = {"memory_format": torch.channels_last}
    y, h = torch.empty(x.shape, dtype=dtype, **last), torch.empty(g.shape, dtype=dtype, **last)
    yield Case("channels-last", lambda: conv.compress_conv(y, h, *same, 1, *right, *left), MATRIX)
    part = g[:, :, :27, :27]
    yield Case("sliced", lambda: conv.compress_conv(x[:, :, :27, :27], part, *same, 1, *right, *left), MATRIX)
    yield from _axes(dtype)
    yield from _grouped(dtype, x, g)
    for fan_in in (1, 4):
        table = make_table(256 * 9, 256, fan_in, fan_in > 1)
        yield Case(f"patches-{fan_in}", lambda table=table: conv.sketch_patches(x, *same, *table))


def _axes(dtype: torch.dtype) -> Iterator[Case]:
    for axes, size in ((1, 1024), (3, 16)):
        args = window(axes, 3, 2, 1)
        x, g = torch.empty(256, 64, *[size] * axes, dtype=dtype), torch.empty(256, 64, *[size // 2] * axes, dtype=dtype)
        left, right = make_table(64, 64), make_table(64 * 3**axes, 64)
        yield Case(f"{axes}d", lambda x=x, g=g, t=(*right, *left), a=args: conv.compress_conv(x, g, *a, 1, *t), MATRIX)


def _grouped(dtype: torch.dtype, x: torch.Tensor, g: torch.Tensor) -> Iterator[Case]:
    same = window(2, 3, 1, 1)
    depth = g[:, :256]
    yield Case("depthwise", lambda: conv.compress_conv(x, depth, *same, 256))
    yield Case("depthwise-split", lambda: conv.compress_conv(x[:1, :16], depth[:1, :16], *same, 16))
    for kind, fan_in in (("scattered", 1), ("fold", 4)):
        left, right = make_table(512, 64, fan_in, fan_in > 1), make_table(64 * 9, 64, fan_in, fan_in > 1)
        yield Case(f"grouped-{kind}", lambda t=(*right, *left): conv.compress_conv(x, g, *same, 4, *t))
    mixed = make_table(256, 64, 4, True)
    yield Case("depthwise-fold", lambda: conv.compress_conv(x, depth, *same, 256, None, None, *mixed))


def small(dtype: torch.dtype) -> Iterator[Case]:
    """Odd shapes that a numpy interpreter runs in a moment."""
    for axes, size in ((1, [37]), (2, [7, 9]), (3, [5, 4, 6])):
        args = [[3, 2, 2][:axes], [2, 1, 1][:axes], [1, 0, 1][:axes], [1, 2, 1][:axes]]
        out = conv_output_size(size, *args)
        for groups in (1, 4):
            x, g = torch.randn(2, 8, *size).to(dtype), torch.randn(2, 12, *out).to(dtype)
            taps = 8 // groups * math.prod(args[0])
            for kind, fan_in in (("scattered", 1), ("fold", 3)):
                tables = (*make_table(taps, 5, fan_in, fan_in > 1), *make_table(12, 7, fan_in, fan_in > 1))
                yield Case(
                    f"{axes}d-{groups}-{kind}",
                    lambda x=x, g=g, a=args, m=groups, t=tables: conv.compress_conv(x, g, *a, m, *t),
                )
                if groups == 1:
                    yield Case(
                        f"{axes}d-patches-{kind}", lambda x=x, a=args, t=tables: conv.sketch_patches(x, *a, *t[:2])
                    )
            yield Case(f"{axes}d-{groups}-whole", lambda x=x, g=g, a=args, m=groups: conv.compress_conv(x, g, *a, m))
