from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import reference_score, topk
from tests.interpreter.helpers import assert_close
from tests.reference.helpers import layouts

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.timeout(1200)]
DTYPES = [torch.float32, torch.float16]


def check(q, c, k, c_scale=None, offset=0):
    values, indices = topk.score_topk(q, c, k, c_scale, offset)
    exact, where = reference_score.score_topk(
        q.double(), c if c.dtype == torch.int8 else c.double(), k, c_scale, offset
    )
    assert_close(values, exact)
    # Scores nearer than float32 resolves may swap; every index must still carry its own score.
    rows = c.double() if c_scale is None else c.double() * c_scale.double()[:, None]
    if values.numel():
        scores = (q.double() @ rows.T).gather(1, indices - offset)
        assert_close(scores, exact)
        assert all(row.unique().numel() == row.numel() for row in indices)
    assert indices.shape == where.shape


# Sorting costs the interpreter seconds a list, so the problems are few and small.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "rows", "width", "k"), [(1, 70, 20, 1), (2, 70, 70, 17), (33, 10, 3, 4)])
def test_equals_the_reference(dtype, queries, rows, width, k):
    check(torch.randn(queries, width).to(dtype), torch.randn(rows, width).to(dtype), k, offset=9)


def test_same_bits_again():
    q, c = torch.randn(2, 8), torch.randn(100, 8)
    for one, other in zip(topk.score_topk(q, c, 5), topk.score_topk(q, c, 5), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows(dtype):
    check(torch.randn(3, 20).to(dtype), torch.randint(-127, 128, (90, 20), dtype=torch.int8), 7, torch.rand(90))


def test_the_most_it_keeps():
    check(torch.randn(2, 4), torch.randn(80, 4), topk.MAX_TOP)


def test_order_of_ties_signed_zeros_nans_and_infinities():
    q = torch.ones(2, 1)
    c = torch.tensor([[0.0], [-0.0], [4.0], [float("nan")], [4.0], [-1.0], [float("inf")], [-float("inf")]])
    values, indices = topk.score_topk(q, c, 8)
    exact, where = reference_score.score_topk(q, c, 8)
    assert torch.equal(indices, where)
    assert indices[0].tolist() == [3, 6, 2, 4, 0, 1, 5, 7]
    torch.testing.assert_close(values, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("queries", "rows", "k"), [(0, 5, 2), (3, 0, 2), (3, 5, 0), (2, 3, 10)])
def test_empty_shapes_and_more_than_there_are(queries, rows, k):
    check(torch.randn(queries, 4), torch.randn(rows, 4), k)


@pytest.mark.parametrize("layout", ["sliced", "turned"])
def test_strides(layout):
    check(layouts(torch.randn(3, 8))[layout], layouts(torch.randn(30, 8))[layout], 4)
    check(torch.randn(1, 8).expand(3, 8), torch.randn(30, 8), 4)


def test_bad_input():
    q, c = torch.zeros(2, 4), torch.zeros(600, 4)
    with pytest.raises(ValueError, match="k is 65; the kernel keeps at most 64"):
        topk.score_topk(q, c, 65)
    with pytest.raises(ValueError, match="k is -1"):
        topk.score_topk(q, c, -1)
    with pytest.raises(ValueError, match="c is int8 and c_scale is missing"):
        topk.score_topk(q, c.to(torch.int8), 3)


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(queries=st.integers(1, 6), rows=st.integers(1, 100), width=st.integers(1, 40), k=st.integers(1, 20))
def test_random_shapes(queries, rows, width, k):
    check(torch.randn(queries, width), torch.randn(rows, width), k)
