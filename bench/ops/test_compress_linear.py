"""compress_linear by every dropout variant against Gaussian and PCA factors and SJLT, at equal stored size.

Each method does what the capture does for it: gather, rotate, outer product. Compare medians within one run: the
group names the problem, the test the method. ``calibrate`` is what one pass adds to a method's second moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import dropinf
import dropinf_kernels as ops
from dropinf.sketch import Place
from dropinf.sketch.axis import Axis

N, T = 8, 512
SHAPES = [(768, 3072), (4096, 4096)]
METHODS: dict[str, Callable[[int], dropinf.Sketch]] = {
    "gaussian factors": lambda k: dropinf.Gaussian(k),
    "pca factors": lambda k: dropinf.PCA(k),
    "dropout": lambda k: dropinf.Dropout(k),
    "dropout, runs of 8": lambda k: dropinf.Dropout(k, group=8),
    "dropout, runs of 16": lambda k: dropinf.Dropout(k, group=16),
    "dropout, whitened": lambda k: dropinf.Dropout(k, whiten=True),
    "dropout, energy": lambda k: dropinf.Dropout(k, sampling="energy"),
    "dropout, fold of a quarter": lambda k: dropinf.Dropout(k, keep=0.25),
    "dropout, rotated": lambda k: dropinf.Dropout(k, rank=4 * k),
    "dropout, rotated, runs of 16": lambda k: dropinf.Dropout(k, rank=4 * k, group=16),
    "dropout, rotated, whitened": lambda k: dropinf.Dropout(k, rank=4 * k, whiten=True),
    "dropout, flat": lambda k: dropinf.Dropout(k * k, mode="flat"),
    "sjlt": lambda k: dropinf.SJLT(k),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads wait for each other whenever anything else runs, which is 20 times the shortest of these calls."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(size: int, side: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, T, size, generator=torch.Generator().manual_seed(len(side))).to(dtype)


def survivors(sketch: dropinf.Sketch, size: int, k: int, side: str) -> Axis | None:
    wanted = sketch.statistics_of(size, k, Place("bench", side))
    return sketch.survivors(size, k, Place("bench", side)) if wanted == "survivors" else None


def moments(sketch: dropinf.Sketch, x: Tensor, k: int, side: str) -> Tensor | None:
    """What a calibration batch adds to the statistics of one side."""
    wanted = sketch.statistics_of(x.shape[-1], k, Place("bench", side))
    if wanted is None:
        return None
    kept = survivors(sketch, x.shape[-1], k, side)
    flat = (x if kept is None else kept.apply(x)).flatten(0, -2)
    return flat.square().sum(0) if wanted == "energy" else flat.T @ flat


def axis(sketch: dropinf.Sketch, x: Tensor, k: int, side: str) -> Axis:
    """The sketch of one side; where it is calibrated, on fewer values than are sketched, which is as fast to apply."""
    found = moments(sketch, x[:1], k, side)
    return sketch.make(x.shape[-1], k, Place("bench", side), None if found is None else found.double())


def factorized(sketch: dropinf.Sketch, a: Tensor, g: Tensor, k: int) -> Callable[[Tensor, Tensor], Tensor]:
    inner, outer = axis(sketch, a, k, "in"), axis(sketch, g, k, "out")
    if inner.matrix is not None:
        return lambda a, g: ops.compress_linear(inner.apply(a), outer.apply(g))
    group = min(inner.group, outer.group)
    return lambda a, g: ops.compress_linear(a, g, *inner.table, *outer.table, group)


def flat(sketch: dropinf.Sketch, a: Tensor, g: Tensor, k: int) -> Callable[[Tensor, Tensor], Tensor]:
    index = sketch.make(a.shape[-1] * g.shape[-1], k * k, Place("bench", "flat")).index
    assert index is not None
    pairs = index.flatten() // a.shape[-1], index.flatten() % a.shape[-1]
    return lambda a, g: ops.compress_flat(a, g, *pairs)


@pytest.mark.parametrize("method", METHODS)  # first: what is compared runs one after the other
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [64, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_compress_linear(benchmark, method: str, shape: tuple[int, int], k: int, dtype: str) -> None:
    benchmark.group = f"{shape[0]}x{shape[1]}, k {k}, {dtype}"
    a, g = (rows(size, side, getattr(torch, dtype)) for size, side in zip(shape, ("in", "out"), strict=True))
    sketch = METHODS[method](k)
    call = (flat if sketch.mode == "flat" else factorized)(sketch, a, g, k)
    assert call(a, g).numel() == N * k * k
    start = time.process_time()
    call(a, g)
    took = time.process_time() - start
    rounds = round(min(max(1 / took, 25), 250))  # a second of the fast ones: what is short is disturbed as a whole
    benchmark.pedantic(call, (a, g), rounds=3 if took > 0.3 else rounds, warmup_rounds=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_whole_gradient(benchmark, shape: tuple[int, int], dtype: str) -> None:
    """What compression spares: every sample's gradient, formed."""
    benchmark.group = f"{shape[0]}x{shape[1]}, {dtype}"
    a, g = (rows(size, side, getattr(torch, dtype)) for size, side in zip(shape, ("in", "out"), strict=True))
    benchmark.pedantic(lambda: torch.bmm(g.mT, a), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("k", [64, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("method", ["pca factors", "dropout, whitened", "dropout, rotated, whitened"])
def test_calibrate(benchmark, method: str, shape: tuple[int, int], k: int) -> None:
    benchmark.group = f"calibrate {shape[0]}x{shape[1]}, k {k}"
    a, g, sketch = rows(shape[0], "in"), rows(shape[1], "out"), METHODS[method](k)

    def both() -> None:
        for side, x in (("in", a), ("out", g)):
            moments(sketch, x, k, side)

    benchmark.pedantic(both, rounds=5, warmup_rounds=1)
