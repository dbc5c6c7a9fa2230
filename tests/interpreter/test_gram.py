from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import gram_update
from dropinf_kernels.gpu import gram
from tests.interpreter.helpers import DTYPES, assert_close
from tests.reference.helpers import layouts

pytestmark = pytest.mark.usefixtures("poisoned")


def check(F, C, c_scale=None):
    start, exact = F.clone(), F.double()
    gram_update.triton(F, C, c_scale)
    gram_update.plain(exact, C if C.dtype == torch.int8 else C.double(), c_scale)
    assert_close(F, exact)
    assert torch.equal(F, F.T)
    again = start.clone()
    gram_update.triton(again, C, c_scale)
    assert torch.equal(again, F)


def symmetric(k):
    F = torch.randn(k, k)
    return F + F.T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (37, 20), (200, 64), (70, 300), (0, 9), (3, 0)])
def test_equals_the_reference(dtype, n, k):
    check(symmetric(k), torch.randn(n, k).to(dtype))


@pytest.mark.parametrize(("n", "k"), [(30, 20), (100, 150), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.int8, *DTYPES])
def test_scaled_rows(n, k, dtype):
    check(symmetric(k), torch.randint(-127, 128, (n, k)).to(dtype), torch.rand(n))


@pytest.mark.parametrize("layout", ["sliced", "turned", "outer"])
def test_strides(layout):
    check(layouts(symmetric(20))[layout], layouts(torch.randn(30, 20))[layout])
    check(symmetric(20), torch.randn(1, 20).expand(30, 20))


def test_scale_with_a_stride_and_a_row_that_is_not_finite():
    C, c_scale = torch.randint(-127, 128, (9, 20), dtype=torch.int8), torch.rand(18)[::2]
    check(symmetric(20), C, c_scale)
    c_scale[4] = float("nan")
    F = torch.zeros(20, 20)
    gram_update.triton(F, C, c_scale)
    assert F.isnan().all()


def test_split_sums_are_finished_in_parts():
    F, C = symmetric(70), torch.randn(300, 70)
    shapes = []
    launch = gram.launch
    gram.launch = lambda kernel, grid, *args, **meta: shapes.append(grid) or launch(kernel, grid, *args, **meta)
    try:
        check(F, C)
    finally:
        gram.launch = launch
    (blocks, splits), (finished, parts) = shapes[:2]
    assert splits > 1
    assert (blocks, finished, parts) == (1, 1, 64)


def test_only_one_triangle_is_computed():
    F, C = torch.zeros(1280, 1280), torch.randn(2, 1280)
    grids = []
    launch = gram.launch
    gram.launch = lambda kernel, grid, *args, **meta: grids.append(grid) or launch(kernel, grid, *args, **meta)
    try:
        gram_update.triton(F, C)
    finally:
        gram.launch = launch
    assert grids[0][0] == 55  # of 100 blocks
    assert_close(F, C.double().T @ C.double())


def test_triangle_is_exact_for_many_blocks():
    import triton
    import triton.language as tl

    @triton.jit
    def decode(p_p, p_i, p_j):
        at = tl.arange(0, 1024)
        i, j = gram.triangle(tl.load(p_p + at))
        tl.store(p_i + at, i)
        tl.store(p_j + at, j)

    decode.fn.__globals__["gram"] = gram
    rows = torch.cat([torch.arange(1, 257), torch.randint(1, 30000, (256,))]).int()
    edges = torch.cat([rows * (rows + 1) // 2, rows * (rows + 1) // 2 - 1]).int()
    i, j = torch.zeros(1024, dtype=torch.int32), torch.zeros(1024, dtype=torch.int32)
    decode[(1,)](edges, i, j)
    assert torch.equal(i, torch.cat([rows, rows - 1]))
    assert torch.equal(j, torch.cat([torch.zeros_like(rows), rows - 1]))


def test_bad_input():
    with pytest.raises(ValueError, match="C is int8 and c_scale is missing"):
        gram_update.triton(torch.zeros(4, 4), torch.zeros(2, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"c_scale is torch\.float32 \[3\]; it must be float32 \[N\] with C's N = 2"):
        gram_update.triton(torch.zeros(4, 4), torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"F has shape \[4, 5\]"):
        gram_update.triton(torch.zeros(4, 5), torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"F has dtype torch\.float16"):
        gram_update.triton(torch.zeros(4, 4).half(), torch.zeros(2, 4))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 80), k=st.integers(1, 140))
def test_random_shapes(n, k):
    check(symmetric(k), torch.randn(n, k))
