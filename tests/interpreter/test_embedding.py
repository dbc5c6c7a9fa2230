from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import compress_embedding
from tests.interpreter.helpers import DTYPES, assert_close, on_cpu
from tests.reference.helpers import layouts, make_table

pytestmark = pytest.mark.usefixtures("poisoned")
NONE = (None, None)
EPS = torch.finfo(torch.float32).eps


def check(ids, g, rows, left=NONE, right=NONE, padding_idx=-1, group=1, cu_seqlens=None, eps=EPS):
    args = (rows, *left, *right, padding_idx, group, cu_seqlens)
    got = compress_embedding.triton(ids, g, *args)
    positive = [None if w is None else w.abs() if w.is_floating_point() else w for w in (*left, *right)]
    magnitude = compress_embedding.plain(ids, g.double().abs(), rows, *positive, padding_idx, group, cu_seqlens)
    assert_close(got, compress_embedding.plain(ids, g.double(), *args), eps, magnitude=magnitude)
    torch.testing.assert_close(compress_embedding.triton(ids, g, *args), got, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fan_in", [0, 1, 2, 8])
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_reference(dtype, fan_in, group, packed):
    ids, g = torch.randint(0, 48, (3, 20)), torch.randn(3, 20, 32).to(dtype)
    left = make_table(48, 16, fan_in, fan_in > 1, group) if fan_in else NONE
    cu_seqlens = torch.tensor([0, 0, 1, 40, 60]) if packed else None
    check(ids, g, 48, left, make_table(32, 16, 1, False, group), -1, group, cu_seqlens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fan_in", [2, 5])
def test_folded_output_side(dtype, fan_in):
    ids, g = torch.randint(0, 9, (2, 20)), torch.randn(2, 20, 32).to(dtype)
    check(ids, g, 9, make_table(9, 4), make_table(32, 8, fan_in, True), eps=torch.finfo(dtype).eps)


def test_padding_and_repeated_rows():
    ids, g = torch.randint(0, 5, (2, 30)), torch.randn(2, 30, 8)
    index = torch.tensor([[0, 3, 3, 1], [0, 3, 1, 1]], dtype=torch.int32)
    check(ids, g, 5, (index, None), NONE, padding_idx=3)
    check(ids.int(), g, 5, (index, torch.randn(2, 4)), NONE)


def test_cancelling_weights_leave_exactly_zero():
    index, weight = torch.tensor([[2], [2]], dtype=torch.int32), torch.tensor([[1.5], [-1.5]])
    got = compress_embedding.triton(torch.tensor([[2, 2]]), torch.randn(1, 2, 4), 5, index, weight)
    assert (got == 0).all()


def test_ids_outside_the_table_contribute_nothing():
    got = compress_embedding.triton(torch.tensor([[1, 7, -3]]), torch.ones(1, 3, 2), 5)
    assert got.sum().item() == 2.0


@pytest.mark.parametrize("table", [NONE, (torch.tensor([[1, 5]], dtype=torch.int32), None)])
def test_an_id_wider_than_32_bits_is_no_row_of_the_table(table):
    got = compress_embedding.triton(torch.tensor([[2**32 + 5, 1, -3, 5 - 2**32]]), torch.ones(1, 4, 2), 8, *table)
    assert got.sum().item() == 2.0
    assert got[0, 0, 1 if table is NONE else 0].item() == 1.0


def test_long_samples_are_split():
    check(torch.randint(0, 9, (1, 700)), torch.randn(1, 700, 8), 9, make_table(9, 4))


@pytest.mark.parametrize("layout", ["sliced", "turned", "outer", "expanded"])
def test_strides(layout):
    ids, g = torch.randint(0, 9, (3, 8)), torch.randn(3, 8, 16)
    if layout == "expanded":
        ids, g = ids[:1].expand(3, 8), g[:, :1].expand(3, 8, 16)
    else:
        ids, g = ids.t().contiguous().t(), layouts(g)[layout]
    check(ids, g, 9, make_table(9, 4), make_table(16, 8))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
def test_empty_shapes(shape):
    check(torch.zeros(shape, dtype=torch.int64), torch.randn(*shape, 4), 3)


def test_bad_input():
    ids, g = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 4)
    with pytest.raises(IndexError, match="in_index has entries from 5 to 5"):
        compress_embedding.triton(ids, g, 5, torch.tensor([[5]], dtype=torch.int32))
    with pytest.raises(TypeError, match=r"ids has dtype torch\.float32"):
        compress_embedding.triton(ids.float(), g, 5)
    with pytest.raises(ValueError, match="cu_seqlens ends at 1"):
        compress_embedding.triton(ids, g, 5, cu_seqlens=on_cpu(0, 1))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 3), t=st.integers(0, 30), rows=st.integers(1, 40), d=st.integers(1, 40), fan_in=st.integers(1, 8)
)
def test_random_shapes(n, t, rows, d, fan_in):
    check(
        torch.randint(0, rows, (n, t)), torch.randn(n, t, d), rows, make_table(rows, 7, fan_in, True), make_table(d, 3)
    )
