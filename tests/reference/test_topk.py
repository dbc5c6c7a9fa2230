from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dropinf_kernels as kernels
from tests.reference.helpers import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 5, 40, 99])
def test_topk_equals_torch(dtype, k, monkeypatch):
    monkeypatch.setattr("dropinf_kernels.ops.topk.BUFFER_BYTES", 16 * 8 * 7)
    q, c = torch.randn(4, 16).to(dtype), torch.randn(40, 16).to(dtype)
    values, indices = kernels.score_topk(q, c, k)
    want = torch.topk(q.double() @ c.double().T, min(k, 40))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert indices.dtype == torch.int64
    torch.testing.assert_close(values.double(), want.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(indices, want.indices)


@settings(max_examples=40, deadline=None)
@given(
    q=st.integers(1, 3),
    n=st.integers(0, 30),
    k=st.integers(0, 12),
    block=st.integers(1, 40),
    high=st.integers(0, 3),
)
def test_ties_go_to_the_lowest_index(q, n, k, block, high):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dropinf_kernels.ops.topk.BUFFER_BYTES", 3 * 4 * block)
        query = torch.randint(-1, 2, (q, 3)).float()
        c = torch.randint(-high, high + 1, (n, 3)).float()
        values, indices = kernels.score_topk(query, c, k, offset=100)
    order = torch.sort(query @ c.T, dim=1, descending=True, stable=True)
    assert torch.equal(values, order.values[:, :k])
    assert torch.equal(indices, order.indices[:, :k] + 100)


def test_topk_of_int8_rows():
    q, c = torch.randn(3, 16), torch.randn(50, 16)
    rows, scale = kernels.quantize_rows(c)
    values, indices = kernels.score_topk(q, rows, 7, scale)
    want = torch.topk(q.double() @ kernels.dequantize_rows(rows, scale, torch.float64).T, 7)
    torch.testing.assert_close(values.double(), want.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(indices, want.indices)


def test_topk_strides_and_no_queries():
    q, c = torch.randn(16, 3).T, torch.randn(16, 9).T
    values, _ = kernels.score_topk(q, c, 4)
    torch.testing.assert_close(values, torch.topk(q @ c.T, 4).values)
    assert kernels.score_topk(q[:0], c, 4)[0].shape == (0, 4)
    assert kernels.score_topk(q, c[:0], 4)[1].shape == (3, 0)


ONES = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.score_topk(ONES, ONES[:, :2], 1), ValueError, "c has 2 columns and q has 4"),
        (lambda: kernels.score_topk(ONES, ONES, -1), ValueError, "k is -1"),
        (lambda: kernels.score_topk(ONES, ONES.to(torch.int8), 1), ValueError, "c_scale is missing"),
        (lambda: kernels.score_topk(ONES, ONES, 1, ONES[0]), ValueError, r"c_scale is .*N = 3"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
