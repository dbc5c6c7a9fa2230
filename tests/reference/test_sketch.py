from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dropinf_kernels as kernels
from tests.reference.helpers import DTYPES, dense, layouts, make_table


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def _threads(request):
    """Columns are gathered by other calls where PyTorch has one thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("fan_in", "weighted"), [(1, False), (1, True), (3, False), (4, True)])
def test_sketch_equals_the_dense_matrix(dtype, group, fan_in, weighted):
    x = torch.randn(3, 5, 64).to(dtype)
    index, weight = make_table(64, 32, fan_in, weighted, group)
    got = kernels.sketch(x, index, weight, group)
    assert got.dtype == dtype
    want = x.double() @ dense(index, weight, 64).T
    # Accumulated above the dtype, so one rounding to it is the whole error.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=4 * eps if dtype.itemsize > 2 else 1e-6)


def test_plain_dropout_is_an_exact_gather():
    x = torch.randn(2, 3, 10).bfloat16()
    index = torch.tensor([[9, 0, 4]], dtype=torch.int32)
    assert torch.equal(kernels.sketch(x, index), x[..., [9, 0, 4]])


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides_do_not_matter(group, dtype):
    x = torch.randn(4, 3, 32).to(dtype)
    index, weight = make_table(32, 16, 2, True, group)
    want = kernels.sketch(x, index, weight, group)
    for name, y in layouts(x).items():
        assert torch.equal(kernels.sketch(y, index, weight, group), want), name
    row = torch.randn(1, 1, 32).to(dtype)
    wide = kernels.sketch(row.expand(4, 3, 32), index, weight, group)
    assert torch.equal(wide, kernels.sketch(row.repeat(4, 3, 1), index, weight, group))


def test_a_run_at_an_odd_offset_is_not_widened():
    base = torch.randn(3 * 16 + 1)
    x = base[1:].view(3, 16)
    index, _ = make_table(16, 8, group=4)
    assert torch.equal(kernels.sketch(x, index, group=4), x[:, index[0].long()])


def test_odd_row_strides_are_not_widened():
    x = torch.randn(3, 17)[:, :16]
    index, _ = make_table(16, 8, group=4)
    assert torch.equal(kernels.sketch(x, index, group=4), x[:, index[0].long()])


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (1, 1, 8), (2, 3, 4, 8)])
def test_leading_shapes(shape):
    index, _ = make_table(8, 4, group=2)
    for group in (1, 2):
        got = kernels.sketch(torch.randn(shape), index, group=group)
        assert got.shape == (*shape[:-1], 4)


@settings(max_examples=30, deadline=None)
@given(
    d_runs=st.integers(1, 9),
    k_runs=st.integers(0, 5),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    fan_in=st.integers(1, 4),
    lead=st.lists(st.integers(0, 3), max_size=3),
)
def test_random_shapes(d_runs, k_runs, group, fan_in, lead):
    d = d_runs * group
    index, weight = make_table(d, k_runs * group, fan_in, True, group)
    x = torch.randn(*lead, d, dtype=torch.float64)
    want = x @ dense(index, weight, d).T
    torch.testing.assert_close(kernels.sketch(x, index, weight, group), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x has no dimension"),
        (
            {"index": torch.zeros(1, 4, dtype=torch.int64)},
            TypeError,
            "index has dtype torch.int64.*index.int",
        ),
        ({"index": torch.zeros(4, dtype=torch.int32)}, ValueError, r"index has shape \[4\].*\[fan_in, k\]"),
        ({"weight": torch.ones(1, 4).double()}, TypeError, "weight has dtype torch.float64"),
        ({"weight": torch.ones(2, 4)}, ValueError, r"weight has shape \[2, 4\].*\[1, 4\]"),
        ({"group": 3}, ValueError, "group is 3; it must divide"),
        ({"group": 0}, ValueError, "group is 0"),
        ({"index": torch.full((1, 4), 8, dtype=torch.int32)}, (IndexError, RuntimeError), "out of"),
        ({"index": torch.full((1, 4), -1, dtype=torch.int32)}, (IndexError, RuntimeError), "out of"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    good = {"x": torch.ones(2, 8), "index": torch.zeros(1, 4, dtype=torch.int32)}
    with pytest.raises(error, match=message):
        kernels.sketch(**{**good, **change})
