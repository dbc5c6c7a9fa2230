"""Fisher accumulation, streaming top-k, int8 rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dropinf_kernels as kernels


@pytest.mark.parametrize("f_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gram_update_adds_in_place(f_dtype, c_dtype, monkeypatch):
    monkeypatch.setattr("dropinf_kernels.reference_score._GRAM_WIDE", 5)
    monkeypatch.setattr("dropinf_kernels.reference_score._GRAM_NARROW", 2)
    monkeypatch.setattr("dropinf_kernels.reference_score.BUFFER_BYTES", 3 * 13 * 8)
    F = torch.eye(13, dtype=f_dtype)
    want = torch.eye(13, dtype=torch.float64)
    for _ in range(2):
        C = torch.randn(20, 13).to(c_dtype)
        assert kernels.gram_update(F, C) is None
        want += C.double().T @ C.double()
    eps = torch.finfo(f_dtype).eps
    torch.testing.assert_close(F.double(), want, rtol=0, atol=32 * eps * want.max().item())
    assert torch.equal(F, F.T)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)])
def test_gram_update_empty_and_single(shape):
    F, C = torch.zeros(shape[1], shape[1]), torch.ones(shape)
    kernels.gram_update(F, C)
    torch.testing.assert_close(F, C.T @ C)


def test_gram_update_of_strided_views():
    C = torch.randn(6, 2 * 8)[:, ::2]
    F = torch.zeros(16, 16)[::2, ::2]
    kernels.gram_update(F, C.T.contiguous().T)
    torch.testing.assert_close(F, C.T @ C)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0, 1, 5, 40, 99])
def test_topk_equals_torch(dtype, k, monkeypatch):
    monkeypatch.setattr("dropinf_kernels.reference_score.BUFFER_BYTES", 16 * 8 * 7)
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
        patch.setattr("dropinf_kernels.reference_score.BUFFER_BYTES", 3 * 4 * block)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quantized_rows_come_back_within_half_a_step(dtype):
    x = torch.randn(6, 33).to(dtype) * torch.logspace(-2, 2, 6).unsqueeze(1).to(dtype)
    x[2] = 0
    q, scale = kernels.quantize_rows(x)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert q.abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127]
    assert scale[2] == 0
    error = (kernels.dequantize_rows(q, scale, torch.float64) - x.double()).abs()
    assert (error <= scale.double().unsqueeze(1) * (0.5 + 1e-4)).all()
    assert kernels.dequantize_rows(q, scale, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)])
def test_quantize_empty_and_single(shape):
    q, scale = kernels.quantize_rows(torch.ones(shape))
    assert kernels.dequantize_rows(q, scale).shape == shape


def test_quantize_strides_and_tiny_rows():
    x = torch.randn(7, 2 * 5)[:, ::2]
    torch.testing.assert_close(kernels.quantize_rows(x), kernels.quantize_rows(x.contiguous()))
    q, scale = kernels.quantize_rows(torch.full((1, 3), 1e-45))
    assert kernels.dequantize_rows(q, scale).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_quantize_names_the_row_that_is_not_finite(bad):
    x = torch.ones(5, 4)
    x[3, 1] = bad
    with pytest.raises(ValueError, match=r"x is not finite.* in row 3"):
        kernels.quantize_rows(x)


ONES = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.gram_update(torch.zeros(4, 4).half(), ONES), TypeError, "F has dtype torch.float16"),
        (lambda: kernels.gram_update(torch.zeros(3, 3), ONES), ValueError, r"F has shape \[3, 3\].*K = 4"),
        (lambda: kernels.gram_update(torch.zeros(4, 4), ONES.int()), TypeError, "C has dtype"),
        (lambda: kernels.score_topk(ONES, ONES[:, :2], 1), ValueError, "c has 2 columns and q has 4"),
        (lambda: kernels.score_topk(ONES, ONES, -1), ValueError, "k is -1"),
        (lambda: kernels.score_topk(ONES, ONES.to(torch.int8), 1), ValueError, "c_scale is missing"),
        (lambda: kernels.score_topk(ONES, ONES, 1, ONES[0]), ValueError, r"c_scale is .*N = 3"),
        (lambda: kernels.quantize_rows(ONES[0]), ValueError, "x has shape"),
        (lambda: kernels.dequantize_rows(ONES, ONES[:, 0]), TypeError, "q is torch.float32"),
        (lambda: kernels.dequantize_rows(ONES.to(torch.int8), ONES[0]), ValueError, "scale is .*N = 3"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("f_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c_dtype", [torch.int8, torch.float16, torch.float32])
def test_gram_update_of_scaled_rows(f_dtype, c_dtype, monkeypatch):
    monkeypatch.setattr("dropinf_kernels.reference_score._GRAM_WIDE", 5)
    monkeypatch.setattr("dropinf_kernels.reference_score._GRAM_NARROW", 2)
    monkeypatch.setattr("dropinf_kernels.reference_score.BUFFER_BYTES", 3 * 13 * 8)
    C, c_scale = torch.randint(-127, 128, (20, 13)).to(c_dtype), torch.rand(20)
    F = torch.eye(13, dtype=f_dtype)
    kernels.gram_update(F, C, c_scale)
    rows = C.double() * c_scale.double()[:, None]
    want = torch.eye(13, dtype=torch.float64) + rows.T @ rows
    torch.testing.assert_close(F.double(), want, rtol=0, atol=32 * torch.finfo(f_dtype).eps * want.max().item())
    assert torch.equal(F, F.T)


@pytest.mark.parametrize(
    ("c_dtype", "c_scale", "message"),
    [
        (torch.int8, None, "C is int8 and c_scale is missing"),
        (torch.int8, torch.ones(4), r"c_scale is torch.float32 \[4\]; .* C's N = 3"),
        (torch.float32, torch.ones(3).double(), r"c_scale is torch.float64 \[3\]"),
    ],
)
def test_gram_update_needs_the_scale_of_each_row(c_dtype, c_scale, message):
    with pytest.raises(ValueError, match=message):
        kernels.gram_update(torch.zeros(4, 4), torch.ones(3, 4).to(c_dtype), c_scale)
