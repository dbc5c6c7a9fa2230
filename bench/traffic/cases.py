"""The calls whose traffic is counted: small enough to interpret, with the blocks of the real problem.

Values are zeros, as only ids decide what is read. The interpreter has no bfloat16; float16 is of the same size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import dropinf_kernels as ops
from dropinf_kernels.device import ARCHS, arch_of
from dropinf_kernels.gpu.tiling import cdiv, gram_tile

from . import minimum
from .predict import Side, Work, gaussian
from .recorder import Launch

LIMIT, GRAM_LIMIT, GRAM_FLOPS = 1.10, 1.02, 0.55
# An H100 with one sample a multiprocessor, scaled down by 11: launchers split a sum where multiprocessors would idle.
FULL = ARCHS["sm_90"].multiprocessors
WAVE = FULL // 11
TABLES = ("index", "weight", "cu")
HALF = torch.float16

Table = tuple[Tensor | None, Tensor | None]
WHOLE: Table = (None, None)


@dataclass(frozen=True)
class Check:
    """A ratio and its limit; without a limit it is only reported."""

    name: str
    value: float
    limit: float | None


@dataclass(frozen=True)
class Problem:
    """A call, the bytes it cannot do without (no tables, no intermediate results), and its limits."""

    call: Callable[[], object]
    minimum: int
    sectors: int = 0  # the minimum in whole sectors, where it is another
    limit: float | None = LIMIT
    checks: Callable[[list[Launch]], list[Check]] = lambda launches: []  # noqa: ARG005
    gaussian: list[Work] | None = None


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], Problem]
    multiprocessors: int = WAVE


@contextlib.contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """Let launchers choose tiles for an H100 with this many multiprocessors."""
    whole = ARCHS["sm_90"]
    ARCHS["sm_90"] = replace(whole, multiprocessors=count)
    arch_of.cache_clear()
    try:
        yield
    finally:
        ARCHS["sm_90"] = whole
        arch_of.cache_clear()


def dropout(d: int, k: int, group: int = 1, seed: int = 0) -> Table:
    """Return k survivors of d in sorted aligned runs of `group`."""
    generator = torch.Generator().manual_seed(seed)
    runs = torch.randperm(d // group, generator=generator)[: k // group].sort().values
    return (runs[:, None] * group + torch.arange(group)).view(1, -1).int(), None


def fold(d: int, k: int, seed: int = 0) -> Table:  # noqa: ARG001
    """Return all d coordinates in k signed sums: row f of the table is the f-th of d/k contiguous chunks."""
    fan_in = d // k
    return torch.arange(d, dtype=torch.int32).view(fan_in, k), torch.ones(fan_in, k)


def shuffled_fold(d: int, k: int, seed: int = 0) -> Table:
    """Return a fold that lays coordinates out in random order, as dropinf.Dropout's does."""
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed)).int()
    return order.view(d // k, k), torch.ones(d // k, k)


def read(group: int, *sides: tuple[Tensor, Table]) -> tuple[int, int]:
    """Return (minimum, sectors) of inputs [..., d]: what must be read, and the sectors that it lies in.

    The minimum is touched sectors where survivors are scattered, used values in runs, folds and whole axes.
    """
    least = sectors = 0
    for x, (index, _) in sides:
        touched = minimum.touched_columns(x, index)
        scattered = index is not None and index.shape[0] == 1 and group == 1
        least += touched if scattered else minimum.used_columns(x, index)
        sectors += touched
    return least, sectors


def linear_case(
    n: int,
    t: int,
    d: int,
    k: int,
    make: Callable[..., Table],
    group: int = 1,
    kept_input: bool = False,
    dtype: torch.dtype = HALF,
    limit: float | None = LIMIT,
) -> Problem:
    a, g = torch.zeros(n, t, k if kept_input else d, dtype=dtype), torch.zeros(n, t, d, dtype=dtype)
    left = make(d, k)
    right = WHOLE if kept_input else make(d, k, seed=1)
    outputs = n * k * k * 4
    sides = Side(minimum.all_bytes(g), d, k), Side(minimum.all_bytes(a), a.shape[-1], k)
    least, sectors = read(group, (a, right), (g, left))
    return Problem(
        lambda: ops.compress_linear.triton(a, g, *right, *left, group),
        least + outputs,
        sectors + outputs,
        limit,
        gaussian=gaussian(n * t, *sides, outputs, dtype.itemsize),
    )


def sketch_case(rows: int, d: int, k: int, make: Callable[..., Table], group: int = 1) -> Problem:
    table = make(d, k)
    x = torch.zeros(rows, d, dtype=HALF)
    out = rows * k * x.element_size()
    least, sectors = read(group, (x, table))
    return Problem(lambda: ops.sketch.triton(x, *table, group), least + out, sectors + out)


def norm_case(n: int, t: int, d: int, k: int, make: Callable[..., Table], group: int = 1) -> Problem:
    table = make(d, k)
    a, g = torch.zeros(n, t, d, dtype=HALF), torch.zeros(n, t, d, dtype=HALF)
    least, sectors = read(group, (a, table), (g, table))
    return Problem(lambda: ops.compress_norm.triton(a, g, *table, group), least + n * k * 4, sectors + n * k * 4)


def bias_case(n: int, t: int, d: int) -> Problem:
    g = torch.zeros(n, t, d, dtype=HALF)
    return Problem(lambda: ops.compress_norm.triton(None, g), minimum.all_bytes(g) + n * d * 4)


def flat_case(n: int, t: int, d: int, k: int) -> Problem:
    a, g = torch.zeros(n, t, d, dtype=HALF), torch.zeros(n, t, d, dtype=HALF)
    rows, cols = (torch.randint(0, d, (k,), generator=torch.Generator().manual_seed(s)).int() for s in (0, 1))
    least = minimum.touched_columns(g, rows) + minimum.touched_columns(a, cols) + n * k * 4
    return Problem(lambda: ops.compress_flat.triton(a, g, rows, cols), least)


def flat_ids_case(n: int, t: int, vocabulary: int, d: int, k: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    g = torch.zeros(n, t, d, dtype=HALF)
    ids = torch.randint(0, vocabulary, (n, t), generator=generator)
    rows = torch.randint(0, d, (k,), generator=generator).int()
    cols = torch.randint(0, vocabulary, (k,), generator=generator).int()
    least = minimum.matched_entries(g, ids, rows, cols) + minimum.all_bytes(ids) + n * k * 4
    return Problem(lambda: ops.compress_flat.triton(ids, g, rows, cols), least)


def conv_case(n: int, channels: int, size: int, k_in: int, k_out: int, make: Callable[..., Table]) -> Problem:
    x, g = (torch.zeros(n, channels, size, size, dtype=HALF) for _ in range(2))
    window = ([3, 3], [1, 1], [1, 1], [1, 1])
    taps, rows = channels * 9, n * size * size
    right, left = make(taps, k_in), make(channels, k_out, seed=1)
    outputs = n * k_in * k_out * 4
    least = minimum.used_patches(x, right[0], [3, 3], [1, 1]) + minimum.used_planes(g, left[0])
    # Gaussian factors as a convolution to k channels: x is read once and no patch is written.
    sides = (Side(minimum.all_bytes(g), channels, k_out), Side(minimum.all_bytes(x), taps, k_in))
    return Problem(
        lambda: ops.compress_conv.triton(x, g, *window, 1, *right, *left),
        least + outputs,
        gaussian=gaussian(rows, *sides, outputs, x.element_size()),
    )


def embedding_case(n: int, t: int, vocabulary: int, d: int, k: int, group: int) -> Problem:
    g = torch.zeros(n, t, d, dtype=HALF)
    ids = torch.randint(0, vocabulary, (n, t), generator=torch.Generator().manual_seed(0))
    right, left = dropout(vocabulary, k, group), dropout(d, k, group, seed=1)
    least = minimum.named_rows(g, ids, right[0], left[0]) + minimum.all_bytes(ids) + n * k * k * 4
    return Problem(lambda: ops.compress_embedding.triton(ids, g, vocabulary, *right, *left, -1, group), least)


def gram_case(rows: int, k: int) -> Problem:
    F, C = torch.zeros(k, k), torch.zeros(rows, k, dtype=HALF)
    block = gram_tile(rows, k, C.element_size(), False, ARCHS["sm_90"]).block
    side = cdiv(k, block)
    blocks = side * (side + 1) // 2

    def checks(launches: list[Launch]) -> list[Check]:
        reads = launches[0].counts["p_C", "load"].l2 / (blocks * 2 * block * rows * C.element_size())
        flops = sum(sum(launch.flops.values()) for launch in launches) / (2 * k * k * rows)
        return [Check("L2 reads of C / tiles' minimum", reads, GRAM_LIMIT), Check("flops / full", flops, GRAM_FLOPS)]

    lower = k * (k + 1) // 2 * 4
    # The lower triangle is read, all of F is written. A split leaves partial results, which have no limit here.
    return Problem(lambda: ops.gram_update.triton(F, C), minimum.all_bytes(C, F) + lower, limit=None, checks=checks)


def topk_case(queries: int, rows: int, width: int, top: int) -> Problem:
    q, c, scale = torch.zeros(queries, width, dtype=HALF), torch.zeros(rows, width, dtype=torch.int8), torch.ones(rows)
    least = minimum.all_bytes(q, c, scale) + queries * top * (4 + 8)
    return Problem(lambda: ops.score_topk.triton(q, c, top, scale), least)


def topk_bits_case(queries: int, rows: int, width: int, top: int, bits: int) -> Problem:
    q, scale = torch.zeros(queries, width, dtype=HALF), torch.ones(rows)
    codes = torch.zeros(rows, width * bits // 8, dtype=torch.uint8)
    least = minimum.all_bytes(q, codes, scale) + queries * top * (4 + 8)
    return Problem(lambda: ops.score_topk_bits.triton(q, codes, scale, bits, top), least)


def quantize_bits_case(rows: int, k: int, bits: int) -> Problem:
    x = torch.zeros(rows, k, dtype=HALF)
    return Problem(lambda: ops.quantize_bits.triton(x, bits), minimum.all_bytes(x) + rows * (k * bits // 8 + 4))


def quantize_case(rows: int, k: int) -> Problem:
    x = torch.zeros(rows, k, dtype=HALF)
    return Problem(lambda: ops.quantize_rows.triton(x), minimum.all_bytes(x) + rows * (k + 4))


def runs(group: int) -> Callable[..., Table]:
    return partial(dropout, group=group)


# With 64x64 outputs a sample is one program, with 256x256 it is four. Folds are slow to interpret.
ONE, FOUR = (WAVE, 256, 1024, 64), (WAVE // 4, 256, 1024, 256)
ONE_FOLD, FOUR_FOLD = (WAVE, 64, 1024, 64), (WAVE // 4, 64, 1024, 256)
CASES = [
    Case("compress_linear 64x64, scattered", partial(linear_case, *ONE, dropout)),
    Case("compress_linear 64x64, runs of 8", partial(linear_case, *ONE, runs(8), 8)),
    Case("compress_linear 64x64, runs of 8, float32", partial(linear_case, *ONE, runs(8), 8, dtype=torch.float32)),
    Case("compress_linear 64x64, runs of 16", partial(linear_case, *ONE, runs(16), 16)),
    Case("compress_linear 64x64, runs of 16, kept input", partial(linear_case, *ONE, runs(16), 16, kept_input=True)),
    Case("compress_linear 64x64, fold", partial(linear_case, *ONE_FOLD, fold)),
    Case("compress_linear 256x256, scattered", partial(linear_case, *FOUR, dropout)),
    Case("compress_linear 256x256, runs of 16", partial(linear_case, *FOUR, runs(16), 16)),
    Case("compress_linear 256x256, fold", partial(linear_case, *FOUR_FOLD, fold)),
    Case("compress_linear 256x256, shuffled fold", partial(linear_case, *FOUR_FOLD, shuffled_fold)),
    Case(
        "compress_linear 64x64, runs of 16, 2 samples",
        partial(linear_case, 2, 256, 1024, 64, runs(16), 16, limit=None),
        FULL,
    ),
    Case("sketch 64, scattered", partial(sketch_case, 512, 1024, 64, dropout)),
    Case("sketch 512, scattered, rows streamed", partial(sketch_case, 128, 1024, 512, dropout)),
    Case("sketch 64, runs of 8", partial(sketch_case, 512, 1024, 64, runs(8), 8)),
    Case("sketch 64, runs of 16", partial(sketch_case, 512, 1024, 64, runs(16), 16)),
    Case("sketch 64, fold", partial(sketch_case, 64, 1024, 64, fold)),
    Case("compress_norm 64, scattered", partial(norm_case, *ONE, dropout)),
    Case("compress_norm 64, runs of 16", partial(norm_case, *ONE, runs(16), 16)),
    Case("compress_norm 64, fold", partial(norm_case, *ONE_FOLD, fold)),
    Case("compress_norm, bias whole", partial(bias_case, WAVE // 4, 256, 1024)),
    Case("compress_flat 64", partial(flat_case, *ONE)),
    Case("compress_flat 64, ids", partial(flat_ids_case, WAVE, 256, 64, 1024, 64)),
    Case("compress_conv 3x3 64x16, dropout", partial(conv_case, WAVE, 32, 16, 64, 16, dropout)),
    Case("compress_conv 3x3 72x16, fold", partial(conv_case, WAVE // 4, 32, 16, 72, 16, fold), WAVE // 4),
    Case("compress_embedding 64x64, runs of 16", partial(embedding_case, WAVE, 256, 512, 1024, 64, 16)),
    Case("gram_update 1280", partial(gram_case, 128, 1280)),
    Case("gram_update 1280, split", partial(gram_case, 128, 1280), FULL),
    Case("score_topk 10, int8", partial(topk_case, 32, 2048, 1024, 10), WAVE // 3),
    Case("score_topk_bits 10, 1 bit", partial(topk_bits_case, 32, 2048, 4096, 10, 1), WAVE // 3),
    Case("score_topk_bits 10, 2 bits", partial(topk_bits_case, 32, 2048, 4096, 10, 2), WAVE // 3),
    Case("quantize_rows 4096", partial(quantize_case, 64, 4096)),
    Case("quantize_bits 4096, 1 bit", partial(quantize_bits_case, 64, 4096, 1)),
]
