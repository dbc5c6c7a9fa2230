from __future__ import annotations

import pytest
import torch

import dropinf_kernels as kernels
from tests.reference.helpers import DTYPES


@pytest.mark.parametrize("f_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c_dtype", DTYPES)
def test_gram_update_adds_in_place(f_dtype, c_dtype, monkeypatch):
    monkeypatch.setattr("dropinf_kernels.ops.gram._GRAM_WIDE", 5)
    monkeypatch.setattr("dropinf_kernels.ops.gram._GRAM_NARROW", 2)
    monkeypatch.setattr("dropinf_kernels.ops.gram.BUFFER_BYTES", 3 * 13 * 8)
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


@pytest.mark.parametrize("f_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c_dtype", [torch.int8, torch.float16, torch.float32])
def test_gram_update_of_scaled_rows(f_dtype, c_dtype, monkeypatch):
    monkeypatch.setattr("dropinf_kernels.ops.gram._GRAM_WIDE", 5)
    monkeypatch.setattr("dropinf_kernels.ops.gram._GRAM_NARROW", 2)
    monkeypatch.setattr("dropinf_kernels.ops.gram.BUFFER_BYTES", 3 * 13 * 8)
    C, c_scale = torch.randint(-127, 128, (20, 13)).to(c_dtype), torch.rand(20)
    F = torch.eye(13, dtype=f_dtype)
    kernels.gram_update(F, C, c_scale)
    rows = C.double() * c_scale.double()[:, None]
    want = torch.eye(13, dtype=torch.float64) + rows.T @ rows
    torch.testing.assert_close(F.double(), want, rtol=0, atol=32 * torch.finfo(f_dtype).eps * want.max().item())
    assert torch.equal(F, F.T)


ONES = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.gram_update(torch.zeros(4, 4).half(), ONES), TypeError, "F has dtype torch.float16"),
        (lambda: kernels.gram_update(torch.zeros(3, 3), ONES), ValueError, r"F has shape \[3, 3\].*K = 4"),
        (lambda: kernels.gram_update(torch.zeros(4, 4), ONES.int()), TypeError, "C has dtype"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


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
