"""The ops beside compress_linear, each against what one would write with PyTorch, SciPy or FAISS. One CPU thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg.blas import ssyrk
from threadpoolctl import threadpool_limits
from torch import Tensor

import dropinf
import dropinf_kernels as ops
from dropinf.sketch import Place

K, SEARCHED = 4096, 16_384  # numbers of a compressed gradient; rows that are searched
QUERIES, TOP = 16, 10


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grams(c: Tensor) -> dict[str, Callable[[], object]]:
    """F += C^T C. SciPy's wants Fortran order, which C^T is, and gives one triangle."""
    full, whole, own = (torch.zeros(K, K) for _ in range(3))
    triangle = own.numpy().T

    def syrk() -> np.ndarray:
        found: np.ndarray = ssyrk(1.0, c.numpy().T, beta=1.0, c=triangle, overwrite_c=True)
        return found

    return {
        "gram_update": lambda: ops.gram_update(full, c),
        "torch.mm": lambda: whole.addmm_(c.t(), c),
        "scipy ssyrk, one triangle": syrk,
        "scipy ssyrk, mirrored": lambda: own.copy_(torch.from_numpy(syrk()).T.tril().add_(own.tril(-1).T)),
    }


@pytest.mark.parametrize("method", grams(torch.zeros(1, K)))  # first: what is compared runs one after the other
@pytest.mark.parametrize("rows", [2048, 10_000])
def test_gram(benchmark, method: str, rows: int) -> None:
    benchmark.group = f"gram of {rows} rows of {K}"
    benchmark.pedantic(grams(random(rows, K))[method], rounds=11, warmup_rounds=1)


def searches(q: Tensor, c: Tensor) -> dict[str, Callable[[], object]]:
    flat = faiss.IndexFlatIP(K)
    flat.add(c.numpy())
    rows, scale = ops.quantize_rows(c)
    return {
        "score_topk": lambda: ops.score_topk(q, c, TOP),
        "score_topk, int8": lambda: ops.score_topk(q, rows, TOP, scale),
        "matmul, then topk": lambda: torch.topk(q @ c.t(), TOP),
        "FAISS flat": lambda: flat.search(q.numpy(), TOP),
    }


@pytest.mark.parametrize("method", ["score_topk", "score_topk, int8", "matmul, then topk", "FAISS flat"])
def test_score(benchmark, method: str) -> None:
    benchmark.group = f"top {TOP} of {SEARCHED} rows of {K}, {QUERIES} queries"
    benchmark.pedantic(searches(random(QUERIES, K, seed=1), random(SEARCHED, K))[method], rounds=7, warmup_rounds=1)


def few_bits(q: Tensor, c: Tensor) -> dict[str, Callable[[], object]]:
    rows, scale = ops.quantize_rows(c)
    found: dict[str, Callable[[], object]] = {
        "float32": lambda: ops.score_topk(q, c, TOP),
        "int8": lambda: ops.score_topk(q, rows, TOP, scale),
    }
    for bits in (1, 2, 4):
        found[f"bits={bits}"] = partial(ops.score_topk_bits, q, *ops.quantize_bits(c, bits), bits, TOP)
    return found


@pytest.mark.parametrize("rows", ["float32", "int8", "bits=1", "bits=2", "bits=4"])
def test_score_few_bits(benchmark, rows: str) -> None:
    benchmark.group = f"top {TOP} of {SEARCHED} rows of {K}, {QUERIES} queries, by dtype of the rows"
    benchmark.pedantic(few_bits(random(QUERIES, K, seed=1), random(SEARCHED, K))[rows], rounds=7, warmup_rounds=1)


def convolutions(x: Tensor, g: Tensor, k: int) -> dict[str, Callable[[], Tensor]]:
    """3 x 3, padding 1: k of the taps and k of the channels. unfold makes every patch first."""
    window = ((3, 3), (1, 1), (1, 1), (1, 1))
    taps, outs = (dropinf.Dropout(k).make(d, k, Place("bench", str(d))).index for d in (9 * x.shape[1], g.shape[1]))
    assert taps is not None
    assert outs is not None
    places = taps[0].long(), outs[0].long()
    return {
        "compress_conv": lambda: ops.compress_conv(x, g, *window, 1, taps, None, outs),
        "unfold, gather, bmm": lambda: torch.bmm(
            g.flatten(2)[:, places[1]], F.unfold(x, 3, padding=1)[:, places[0]].mT
        ),
    }


@pytest.mark.parametrize("method", ["compress_conv", "unfold, gather, bmm"])
@pytest.mark.parametrize(("channels", "side"), [(64, 32), (256, 8)])
def test_conv(benchmark, method: str, channels: int, side: int) -> None:
    benchmark.group = f"convolution, {channels} channels, {side} x {side}, 32 samples, k 16"
    x, g = (random(32, channels, side, side, seed=seed) for seed in (0, 1))
    calls = convolutions(x, g, 16)
    torch.testing.assert_close(*(call() for call in calls.values()), rtol=1e-4, atol=1e-4)
    benchmark.pedantic(calls[method], rounds=15, warmup_rounds=2)


def embeddings(ids: Tensor, g: Tensor, vocabulary: int, k: int) -> dict[str, Callable[[], Tensor]]:
    rows, columns = (dropinf.Dropout(k).make(d, k, Place("bench", str(d))).index for d in (vocabulary, g.shape[2]))
    assert rows is not None
    assert columns is not None
    kept = rows[0].long(), columns[0].long()
    return {
        "compress_embedding": lambda: ops.compress_embedding(ids, g, vocabulary, rows, None, columns),
        "one-hot, gather, bmm": lambda: torch.bmm(
            g[:, :, kept[1]].mT, F.one_hot(ids, vocabulary)[:, :, kept[0]].to(g.dtype)
        ),
    }


@pytest.mark.parametrize("method", ["compress_embedding", "one-hot, gather, bmm"])
def test_embedding(benchmark, method: str) -> None:
    vocabulary, width, k = 50_257, 768, 64
    benchmark.group = f"embedding {vocabulary} x {width}, 4 samples of 128, k {k}"
    ids = torch.randint(vocabulary, (4, 128), generator=torch.Generator().manual_seed(0))
    ids[:, ::4] = dropinf.Dropout(k).make(vocabulary, k, Place("bench", str(vocabulary))).index[0, : 128 // 4].long()
    calls = embeddings(ids, random(4, 128, width), vocabulary, k)
    found, wanted = (call() for call in calls.values())
    assert wanted.abs().sum() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    benchmark.pedantic(calls[method], rounds=9, warmup_rounds=1)
