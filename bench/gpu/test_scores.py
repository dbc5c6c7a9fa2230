"""gram_update against torch.addmm, and score_topk against a matrix product and torch.topk."""

from __future__ import annotations

import pytest
import torch

import dropinf_kernels as ops
from bench.gpu.clock import CLOCK, compare

pytestmark = pytest.mark.benchmark(timer=CLOCK)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS = 4096


@pytest.mark.parametrize("k", [256, 1024, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_update(benchmark, dtype, k):
    benchmark.group = f"gram_update, {ROWS} rows of {k}, {dtype}"
    C = torch.randn(ROWS, k, dtype=DTYPES[dtype], device="cuda")
    F, other = torch.zeros(k, k, device="cuda"), torch.zeros(k, k, device="cuda")
    ops.gram_update(F, C)
    want = C.double().T @ C.double()
    assert (F - want).abs().max() <= 2e-5 * want.abs().max()

    def addmm() -> None:
        wide = C.float()
        other.addmm_(wide.T, wide)

    compare(benchmark, lambda: ops.gram_update(F, C), "torch.addmm in float32", addmm)


@pytest.mark.parametrize("top", [10, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_topk(benchmark, dtype, top):
    queries, rows, k = 64, 1 << 16, 2048
    benchmark.group = f"score_topk, the best {top} of {rows} rows of {k} for {queries} queries, {dtype}"
    q, c = (torch.randn(n, k, dtype=DTYPES[dtype], device="cuda") for n in (queries, rows))
    values, _ = ops.score_topk(q, c, top)
    want = torch.topk(q.double() @ c.double().T, top).values
    assert (values - want).abs().max() <= 2e-5 * want.abs().max()
    compare(benchmark, lambda: ops.score_topk(q, c, top), "matmul and topk", lambda: torch.topk(q @ c.T, top))
