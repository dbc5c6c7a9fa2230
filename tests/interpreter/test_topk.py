from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import score_topk
from dropinf_kernels.gpu import topk
from tests.interpreter.helpers import DTYPES, ON_GPU, assert_close
from tests.interpreter.sorting import fast_sort
from tests.reference.helpers import layouts

pytestmark = pytest.mark.usefixtures("poisoned", "_fast_sort")


@pytest.fixture(scope="module")
def _fast_sort():
    with contextlib.nullcontext() if ON_GPU else fast_sort():
        yield


def check(q, c, k, c_scale=None, offset=0):
    values, indices = (out.cpu() for out in score_topk.triton(q, c, k, c_scale, offset))
    # The rest on the CPU, where an index out of range is an error and no more.
    q, c, c_scale = q.cpu(), c.cpu(), None if c_scale is None else c_scale.cpu()
    exact, where = score_topk.plain(q.double(), c if c.dtype == torch.int8 else c.double(), k, c_scale, offset)
    assert_close(values, exact)
    # Scores nearer than float32 resolves may swap; every index must still carry its own score.
    rows = c.double() if c_scale is None else c.double() * c_scale.double()[:, None]
    if values.numel():
        scores = (q.double() @ rows.T).gather(1, indices - offset)
        assert_close(scores, exact)
        assert all(row.unique().numel() == row.numel() for row in indices)
    assert indices.shape == where.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "rows", "width", "k"), [(1, 70, 20, 1), (2, 300, 70, 17), (65, 10, 3, 4)])
def test_equals_the_reference(dtype, queries, rows, width, k):
    check(torch.randn(queries, width).to(dtype), torch.randn(rows, width).to(dtype), k, offset=9)


def test_same_bits_again():
    q, c = torch.randn(2, 8), torch.randn(100, 8)
    for one, other in zip(score_topk.triton(q, c, 5), score_topk.triton(q, c, 5), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows(dtype):
    check(torch.randn(3, 20).to(dtype), torch.randint(-127, 128, (90, 20), dtype=torch.int8), 7, torch.rand(180)[::2])


@pytest.mark.parametrize("extra", [0, 1])
def test_the_most_it_keeps_and_a_longer_list(extra, monkeypatch):
    launched = []
    launch = topk.launch
    monkeypatch.setattr(topk, "launch", lambda *args, **meta: launched.append(args[0]) or launch(*args, **meta))
    check(torch.randn(2, 4), torch.randn(600, 4), topk.MAX_TOP + extra)
    assert bool(launched) == (extra == 0)


@pytest.mark.parametrize(("k", "rows"), [(5, 300), (30, 400), (60, 400), (100, 600), (200, 1100)])
def test_ties_go_to_the_lowest_row_across_blocks_and_splits(k, rows):
    q, c = torch.randint(-2, 3, (3, 4)).float(), torch.randint(-2, 3, (rows, 4)).float()
    splits = []
    launch = topk.launch
    topk.launch = lambda kernel, grid, *args, **meta: splits.append(grid) or launch(kernel, grid, *args, **meta)
    try:
        values, indices = score_topk.triton(q, c, k, offset=2**40)
    finally:
        topk.launch = launch
    assert splits[0][1] > 1
    exact, where = score_topk.plain(q, c, k, offset=2**40)
    assert torch.equal(values, exact)
    assert torch.equal(indices, where)


def test_a_block_that_beats_no_list_changes_nothing():
    q, c = torch.ones(2, 1), torch.arange(200.0, 0, -1)[:, None]
    values, indices = score_topk.triton(q, c, 3)
    assert values.tolist() == [[200, 199, 198]] * 2
    assert indices.tolist() == [[0, 1, 2]] * 2


def test_order_of_ties_signed_zeros_nans_and_infinities():
    q = torch.ones(2, 1)
    c = torch.tensor([[0.0], [-0.0], [4.0], [float("nan")], [4.0], [-1.0], [float("inf")], [-float("inf")]])
    values, indices = score_topk.triton(q, c, 8)
    exact, where = score_topk.plain(q, c, 8)
    assert torch.equal(indices, where)
    assert indices[0].tolist() == [3, 6, 2, 4, 0, 1, 5, 7]
    torch.testing.assert_close(values, exact, rtol=0, atol=0, equal_nan=True)


def test_sign_of_a_scale_does_not_order_zeros_or_nans():
    nan = torch.tensor(0x7FC00000, dtype=torch.int32)
    c_scale = torch.stack([torch.tensor(1.0), nan.view(torch.float32), (nan | -(2**31)).view(torch.float32)])
    c_scale = torch.cat([c_scale, torch.tensor([-1.0, 1.0])])
    c = torch.tensor([[5], [1], [1], [0], [0]], dtype=torch.int8)
    values, indices = score_topk.triton(torch.ones(1, 1), c, 5, c_scale)
    assert indices.tolist() == [[1, 2, 0, 3, 4]]
    assert values[0, :2].isnan().all()
    assert values[0, 2:].tolist() == [5, 0, 0]
    assert not values[0, 3:].signbit().any()


@pytest.mark.parametrize(("queries", "rows", "k"), [(0, 5, 2), (3, 0, 2), (3, 5, 0), (2, 3, 10)])
def test_empty_shapes_and_more_than_there_are(queries, rows, k):
    check(torch.randn(queries, 4), torch.randn(rows, 4), k)


@pytest.mark.parametrize("layout", ["sliced", "turned", "outer"])
def test_strides(layout):
    check(layouts(torch.randn(3, 8))[layout], layouts(torch.randn(30, 8))[layout], 4)
    check(torch.randn(1, 8).expand(3, 8), torch.randn(30, 8), 4)


def test_bad_input():
    q, c = torch.zeros(2, 4), torch.zeros(600, 4)
    with pytest.raises(ValueError, match="k is -1"):
        score_topk.triton(q, c, -1)
    with pytest.raises(ValueError, match="c has 3 columns and q has 4"):
        score_topk.triton(q, c[:, :3], 3)
    with pytest.raises(ValueError, match="c is int8 and c_scale is missing"):
        score_topk.triton(q, c.to(torch.int8), 3)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(queries=st.integers(1, 6), rows=st.integers(1, 100), width=st.integers(1, 40), k=st.integers(1, 20))
def test_random_shapes(queries, rows, width, k):
    check(torch.randn(queries, width), torch.randn(rows, width), k)
