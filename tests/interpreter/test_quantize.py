from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import dequantize_rows, quantize_rows
from tests.interpreter.helpers import DTYPES
from tests.reference.helpers import layouts

pytestmark = pytest.mark.usefixtures("poisoned")


def check(x):
    q, scale = quantize_rows.triton(x)
    # On the CPU, as PyTorch divides by a number on a GPU by multiplying with its reciprocal.
    exact, exact_scale = quantize_rows.plain(x.cpu())
    assert torch.equal(q.cpu(), exact)
    assert torch.equal(scale.cpu(), exact_scale)
    for dtype in (*DTYPES, torch.float64):
        back = dequantize_rows.triton(q, scale, dtype)
        assert torch.equal(back, dequantize_rows.plain(q, scale, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (3, 5000), (0, 4), (4, 0)])
def test_equals_the_reference_bit_for_bit(dtype, shape):
    check(torch.randn(shape).to(dtype))


def test_halves_round_to_even_and_zero_rows_stay_zero():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6])
    check(x)
    assert quantize_rows.triton(x)[0].tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_marked(bad):
    x = torch.randn(3, 40)
    x[1, 7] = bad
    q, scale = quantize_rows.triton(x)
    assert torch.isnan(scale).tolist() == [False, True, False]
    assert (q[1] == 0).all()


@pytest.mark.parametrize("layout", ["sliced", "turned", "outer"])
def test_strides(layout):
    check(layouts(torch.randn(4, 30))[layout])
    check(torch.randn(1, 30).expand(4, 30))


def test_strides_of_int8():
    q, scale = torch.randint(-127, 128, (9, 30), dtype=torch.int8)[::2, ::3], torch.rand(10)[::2]
    for rows in (q, q.contiguous().T.contiguous().T):
        assert torch.equal(dequantize_rows.triton(rows, scale), dequantize_rows.plain(q, scale))


def test_bad_input():
    with pytest.raises(TypeError, match=r"x has dtype torch\.int32"):
        quantize_rows.triton(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"scale is torch\.float32"):
        dequantize_rows.triton(torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 5), k=st.integers(1, 300))
def test_random_shapes(n, k):
    check(torch.randn(n, k))
