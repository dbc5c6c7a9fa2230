"""compress_linear by dropout against Gaussian factors and the whole per-sample gradient, at equal stored size.

Compare medians within one run: the group names the problem, the test the method.
"""

from __future__ import annotations

import pytest
import torch

import dropinf
import dropinf_kernels as ops

N, T = 8, 512
SHAPES = [(768, 3072), (4096, 4096)]


def inputs(d_in: int, d_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, T, d_in, generator=generator), torch.randn(N, T, d_out, generator=generator)


def by_table(sketch: dropinf.Sketch, d_in: int, d_out: int, k: int):
    inner, outer = sketch.make(d_in, k, "bench/in"), sketch.make(d_out, k, "bench/out")
    group = min(inner.group, outer.group)
    return lambda a, g: ops.compress_linear(a, g, *inner.table, *outer.table, group)


def by_matrix(sketch: dropinf.Sketch, d_in: int, d_out: int, k: int):
    inner, outer = sketch.make(d_in, k, "bench/in"), sketch.make(d_out, k, "bench/out")
    return lambda a, g: ops.compress_linear(inner.apply(a), outer.apply(g))


METHODS = {
    "gaussian factors": lambda k, *d: by_matrix(dropinf.Gaussian(k), *d, k),
    "dropout": lambda k, *d: by_table(dropinf.Dropout(k), *d, k),
    "dropout, runs of 16": lambda k, *d: by_table(dropinf.Dropout(k, group=16), *d, k),
    "sjlt": lambda k, *d: by_table(dropinf.SJLT(k), *d, k),
}


@pytest.mark.parametrize("k", [64, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("method", METHODS)
def test_compress_linear(benchmark, method: str, shape: tuple[int, int], k: int) -> None:
    benchmark.group = f"{shape[0]}x{shape[1]}, k {k}"
    a, g = inputs(*shape)
    call = METHODS[method](k, *shape)
    assert call(a, g).shape == (N, k, k)
    benchmark.pedantic(call, (a, g), rounds=15, warmup_rounds=2)
