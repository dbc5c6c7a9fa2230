from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import sketch
from dropinf_kernels.device import ARCHS
from dropinf_kernels.gpu.launch import copies
from dropinf_kernels.gpu.tiling import sketch_tile
from tests.interpreter.helpers import DTYPES, assert_close
from tests.reference.helpers import layouts, make_table

pytestmark = pytest.mark.usefixtures("poisoned")


def check(x, index, weight=None, group=1):
    got = sketch.triton(x, index, weight, group)
    assert got.dtype == x.dtype
    magnitude = sketch.plain(x.double().abs(), index, None if weight is None else weight.abs(), group)
    # One rounding of the sum into x's dtype.
    assert_close(got, sketch.plain(x.double(), index, weight, group), torch.finfo(x.dtype).eps, 4, magnitude)
    torch.testing.assert_close(sketch.triton(x, index, weight, group), got, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("fan_in", range(1, 9))
def test_equals_the_reference(dtype, group, fan_in):
    check(torch.randn(3, 5, 64).to(dtype), *make_table(64, 16, fan_in, fan_in % 2 == 0, group), group)


@pytest.mark.parametrize(
    ("k", "fan_in", "group", "stream"),
    [(300, 1, 1, True), (8, 1, 1, False), (40, 8, 1, True), (320, 1, 16, False), (1100, 1, 1, True)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_of_reading_a_row(k, fan_in, group, stream, dtype):
    assert sketch_tile(320, k, fan_in, group, dtype.itemsize, ARCHS["sm_90"]).stream == stream
    check(torch.randn(2, 320).to(dtype), *make_table(320, k, fan_in, fan_in > 1, group), group)


@pytest.mark.parametrize("k", [3, 16])
@pytest.mark.parametrize("layout", ["sliced", "turned", "outer", "expanded"])
def test_strides(layout, k):
    x = torch.randn(3, 4, 16)
    x = x[:, :1].expand(3, 4, 16) if layout == "expanded" else layouts(x)[layout]
    check(x, *make_table(16, k))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (2, 3, 4, 8), (1, 1, 1, 8)])
def test_leading_shapes(shape):
    check(torch.randn(shape), *make_table(8, 4))


def turned(*shape):
    """Return a tensor [reversed shape, 8] whose leading axes do not merge."""
    x = torch.randn(*shape, 8)
    return x.permute(*range(len(shape) - 1, -1, -1), len(shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "group"), [(8, 1), (3, 1), (4, 4)])
@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 1, 4, 3), (2, 1, 1)])
def test_leading_axes_of_three_strides_are_not_copied(shape, k, group, dtype):
    before = copies.total()
    check(turned(*shape).to(dtype), *make_table(8, k, 1, False, group), group)
    check(torch.randn(2, 7, 3, 8)[:, ::2, :2].to(dtype), *make_table(8, k, 1, False, group), group)
    assert copies.total() == before


@pytest.mark.parametrize("k", [8, 3])
def test_leading_axes_of_more_strides_are_copied_once_a_call(k):
    before = copies["sketch", "x"]
    check(turned(2, 3, 4, 5), *make_table(8, k))
    assert copies["sketch", "x"] == before + 2  # check calls it twice


def test_a_table_made_under_inference_mode():
    with torch.inference_mode():
        index, weight = make_table(8, 4, 2, True)
    check(torch.randn(2, 8), index, weight)
    with torch.inference_mode():
        index[0, 0] = 9
    with pytest.raises(IndexError, match="index has entries from"):
        sketch.triton(torch.randn(2, 8), index, weight)


def test_no_columns():
    assert sketch.triton(torch.randn(2, 8), torch.zeros(1, 0, dtype=torch.int32)).shape == (2, 0)


def test_bad_input():
    index = torch.tensor([[0, 8]], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"index has entries from 0 to 8; they must lie in \[0, 8\)"):
        sketch.triton(torch.randn(2, 8), index)
    with pytest.raises(ValueError, match="not made of aligned runs of 2"):
        sketch.triton(torch.randn(2, 8), torch.tensor([[1, 2]], dtype=torch.int32), None, 2)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 5), d=st.integers(1, 70), k=st.integers(1, 50), fan_in=st.integers(1, 8))
def test_random_shapes(n, d, k, fan_in):
    check(torch.randn(n, d), *make_table(d, k, fan_in, True))
