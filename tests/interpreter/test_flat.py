from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import compress_flat
from dropinf_kernels.gpu import launch, norm
from dropinf_kernels.gpu.launch import copies
from tests.interpreter.helpers import DTYPES, ON_GPU, assert_close
from tests.reference.helpers import layouts, make_table

pytestmark = pytest.mark.usefixtures("poisoned")
DOCUMENTS = [0, 0, 1, 90, 90, 140]


def wide(x):
    """Return x in float64; ids stay as they are."""
    return x.double() if x.is_floating_point() else x


def check(a, g, *args):
    """Compare with float64; what rounding is relative to is the result without cancellation."""
    got = compress_flat.triton(a, g, *args)
    assert got.dtype == torch.float32
    magnitude = compress_flat.plain(wide(a.abs() if a.is_floating_point() else a), g.double().abs(), *args)
    assert_close(got, compress_flat.plain(wide(a), g.double(), *args), factor=8, magnitude=magnitude)
    return got


def make_input(kind, lead, d, dtype):
    """Return a float input [*lead, d], or ids [*lead] of which some name no coordinate at all."""
    return torch.randn(*lead, d).to(dtype) if kind == "dense" else torch.randint(-2, d + 2, lead).to(kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", torch.int32, torch.int64])
@pytest.mark.parametrize("k", [1, 33, 300])
def test_equals_the_reference(dtype, kind, k):
    a, g = make_input(kind, (3, 41), 20, dtype), torch.randn(3, 41, 12).to(dtype)
    check(a, g, make_table(12, k)[0][0], make_table(20, k)[0][0])


def test_ids_that_no_column_names_contribute_nothing_and_read_nothing():
    ids = torch.tensor([[7, 2, -1, 9, 2, 1 << 20]])
    g = torch.full((1, 6, 4), float("nan"))
    g[0, [1, 4]] = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    rows, cols = torch.tensor([3, 0, 1, 3]).int(), torch.tensor([2, 2, 5, 8]).int()
    assert compress_flat.triton(ids, g, rows, cols).tolist() == [[44.0, 11.0, 0.0, 0.0]]


def test_ids_below_zero_name_no_column():
    ids, minus = torch.tensor([[-1, 0]]), torch.tensor([-1], dtype=torch.int32)
    check(ids, torch.ones(1, 2, 2), minus + 1, minus)
    assert compress_flat.triton(ids, torch.ones(1, 2, 2), minus + 1, minus).tolist() == [[0.0]]


def test_ids_compare_all_64_bits():
    ids = torch.tensor([[(1 << 32) + 1, 1]])
    one = torch.ones(1, dtype=torch.int32)
    assert compress_flat.triton(ids, torch.ones(1, 2, 2), one, one).tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["sliced", "turned", "outer", "expanded"])
def test_strides(dtype, layout):
    def lay(x):
        if layout == "expanded":
            return x[:, :1].expand(*x.shape)
        return layouts(x)[layout]

    a, g = lay(torch.randn(3, 8, 16).to(dtype)), lay(torch.randn(3, 8, 16).to(dtype))
    # Tables that are themselves strided views.
    rows, cols = make_table(16, 40)[0][0, ::2], make_table(16, 40)[0][0, 1::2]
    check(a, g, rows, cols)
    check(torch.randint(0, 16, (8, 3)).T, g, rows, cols)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0), (1, 1, 1)])
@pytest.mark.parametrize("k", [0, 1])
def test_empty_shapes(shape, k):
    n, _, d = shape
    a, g, k = torch.randn(shape), torch.randn(shape), min(k, d)
    entries = torch.zeros(k, dtype=torch.int32)
    assert check(a, g, entries, entries).shape == (n, k)
    assert check(torch.zeros(shape[:2], dtype=torch.int64), g, entries, entries).shape == (n, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(2, 70), (140,)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_documents(dtype, lead, index_dtype):
    a, g = torch.randn(*lead, 16).to(dtype), torch.randn(*lead, 16).to(dtype)
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=index_dtype)
    rows, cols = make_table(16, 40)[0][0], make_table(16, 40)[0][0]
    check(a, g, rows, cols, cu_seqlens)
    check(torch.randint(0, 16, lead), g, rows, cols, cu_seqlens)


def test_packed_ids_that_are_not_evenly_spaced_are_copied():
    ids, g, before = torch.randint(0, 16, (70, 2)).T, torch.randn(2, 70, 16), copies.copy()
    check(ids, g, make_table(16, 40)[0][0], make_table(16, 40)[0][0], torch.tensor(DOCUMENTS))
    assert set(copies - before) == {("packed rows", "a")}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["dense", torch.int64])
def test_split_positions(packed, kind, monkeypatch):
    seen = []
    monkeypatch.setattr(
        norm, "launch", lambda k, grid, *args, **meta: seen.append(grid) or launch.launch(k, grid, *args, **meta)
    )
    g, cu_seqlens = torch.randn(1, 700, 16), torch.tensor([0, 700]) if packed else None
    rows, cols = make_table(16, 24)[0][0], make_table(16, 24)[0][0]
    args = (make_input(kind, (1, 700), 16, torch.float32), g, rows, cols, cu_seqlens)
    got = check(*args)
    assert seen[0][1] > 1 if ON_GPU else seen[0][1] == 6  # every block of 128 positions is a program of its own
    torch.testing.assert_close(check(*args), got, rtol=0, atol=0)


def test_mixed_dtypes():
    check(torch.randn(2, 5, 8).half(), torch.randn(2, 5, 8), torch.tensor([1, 7]).int(), torch.tensor([0, 3]).int())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 3),
    t=st.integers(0, 150),
    d=st.integers(1, 40),
    k=st.integers(0, 140),
    kind=st.sampled_from(["dense", torch.int32, torch.int64]),
)
def test_random_shapes(n, t, d, k, kind):
    a, g = make_input(kind, (n, t), d + 3, torch.float32), torch.randn(n, t, d)
    check(a, g, make_table(d, k)[0][0], make_table(d + 3, k)[0][0])


G, ONE = torch.zeros(2, 3, 8), torch.zeros(1, dtype=torch.int32)
BAD = [
    ({"rows": ONE + 8}, IndexError, r"rows has entries from 8 to 8; they must lie in \[0, 8\)"),
    ({"cols": ONE - 1}, IndexError, "cols has entries from -1 to -1"),
    ({"cols": ONE.long()}, TypeError, "cols has dtype torch.int64; it must be int32"),
    ({"cols": torch.zeros(2, dtype=torch.int32)}, ValueError, r"cols has shape \[2\]; rows and cols must both be"),
    ({"a": torch.zeros(2, 4, 8)}, ValueError, r"leading dimensions \[2, 4\] and \[2, 3\] must agree"),
    ({"a": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"leading dimensions \[2, 4\] and \[2, 3\] must agree"),
    ({"a": G.bool()}, TypeError, "a has dtype torch.bool"),
    ({"cols": ONE.to("meta")}, ValueError, "cols is on meta and g on"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        compress_flat.triton(**({"a": G, "g": G, "rows": ONE, "cols": ONE} | change))
