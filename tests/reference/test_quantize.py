from __future__ import annotations

import pytest
import torch

import dropinf_kernels as kernels
from tests.reference.helpers import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
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
        (lambda: kernels.quantize_rows(ONES[0]), ValueError, "x has shape"),
        (lambda: kernels.dequantize_rows(ONES, ONES[:, 0]), TypeError, "q is torch.float32"),
        (lambda: kernels.dequantize_rows(ONES.to(torch.int8), ONES[0]), ValueError, "scale is .*N = 3"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
