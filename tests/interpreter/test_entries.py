from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import entries, reference, reference_sparse
from tests.interpreter.helpers import assert_close
from tests.reference.helpers import layouts, make_table

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float16]
PACKED = torch.tensor([0, 0, 1, 40, 40, 60])


def check_norm(a, g, *args):
    got = entries.compress_norm(a, g, *args)
    wide = None if a is None else a.double()
    index, weight, *rest = (*args, None, None)[: max(2, len(args))]
    magnitude = reference.compress_norm(
        None if a is None else wide.abs(), g.double().abs(), index, None if weight is None else weight.abs(), *rest
    )
    assert got.dtype == torch.float32
    assert_close(got, reference.compress_norm(wide, g.double(), *args), magnitude=magnitude)
    torch.testing.assert_close(entries.compress_norm(a, g, *args), got, rtol=0, atol=0)


def check_flat(a, g, *args):
    got = entries.compress_flat(a, g, *args)
    wide = a.double() if a.is_floating_point() else a
    magnitude = reference_sparse.compress_flat(wide.abs(), g.double().abs(), *args)
    assert_close(got, reference_sparse.compress_flat(wide, g.double(), *args), magnitude=magnitude)
    torch.testing.assert_close(entries.compress_flat(a, g, *args), got, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("fan_in", [1, 2, 5, 8])
@pytest.mark.parametrize("scale", [True, False])
def test_norm_equals_the_reference(dtype, group, fan_in, scale):
    a, g = torch.randn(3, 20, 32).to(dtype), torch.randn(3, 20, 32).to(dtype)
    table = make_table(32, 16, fan_in, fan_in > 2, group)
    check_norm(a if scale else None, g, *table, group)
    check_norm(a if scale else None, g, *table, group, PACKED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [True, False])
def test_a_whole_axis(dtype, scale):
    a, g = torch.randn(2, 9, 37).to(dtype), torch.randn(2, 9, 37).to(dtype)
    check_norm(a if scale else None, g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
def test_flat_equals_the_reference(dtype, ids, cu_seqlens):
    a, g = torch.randn(3, 20, 24).to(dtype), torch.randn(3, 20, 16).to(dtype)
    if ids:
        a = torch.randint(0, 24, (3, 20))
    check_flat(a, g, make_table(16, 50)[0][0], make_table(24, 50)[0][0], cu_seqlens)


def test_long_samples_are_split():
    a, g = torch.randn(1, 900, 8), torch.randn(1, 900, 8)
    check_norm(a, g)
    check_flat(a, g, make_table(8, 5)[0][0], make_table(8, 5)[0][0])


@pytest.mark.parametrize("layout", ["sliced", "turned", "outer", "expanded"])
def test_strides(layout):
    a, g = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    if layout == "expanded":
        a, g = a[:1].expand(3, 8, 16), g[:, :1].expand(3, 8, 16)
    else:
        a, g = layouts(a)[layout], layouts(g)[layout]
    check_norm(a, g, *make_table(16, 8, 2, True))
    check_flat(a, g, make_table(16, 5)[0][0], make_table(16, 5)[0][0])


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty_shapes(shape):
    check_norm(torch.randn(shape), torch.randn(shape))
    none = torch.zeros(0, dtype=torch.int32)
    check_flat(torch.randn(shape), torch.randn(shape), none, none)


def test_an_id_that_no_column_names_contributes_nothing():
    g = torch.full((1, 2, 4), 7.0)
    rows, cols = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([3, 0], dtype=torch.int32)
    got = entries.compress_flat(torch.tensor([[3, 9]]), g, rows, cols)
    assert got.tolist() == [[7.0, 0.0]]


def test_bad_input():
    a, g = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)
    bad, good = torch.tensor([8], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"index has entries from 8 to 8"):
        entries.compress_norm(a, g, bad.unsqueeze(0))
    with pytest.raises(IndexError, match="rows has entries from 8 to 8"):
        entries.compress_flat(a, g, bad, good)
    with pytest.raises(IndexError, match="cols has entries from 8 to 8"):
        entries.compress_flat(a, g, good, bad)
    with pytest.raises(ValueError, match="cu_seqlens ends at 5"):
        entries.compress_norm(a, g, cu_seqlens=torch.tensor([0, 5]))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 3), t=st.integers(0, 30), d=st.integers(1, 40), k=st.integers(1, 40), fan_in=st.integers(1, 8))
def test_random_shapes(n, t, d, k, fan_in):
    a, g = torch.randn(n, t, d), torch.randn(n, t, d)
    check_norm(a, g, *make_table(d, k, fan_in, True))
    check_flat(a, g, make_table(d, k)[0][0], make_table(d, k)[0][0])
