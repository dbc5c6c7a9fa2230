from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import entries, launch, reference, reference_sparse
from tests.interpreter.helpers import DTYPES, ON_GPU, assert_close, on_cpu
from tests.reference.helpers import layouts, make_table

pytestmark = pytest.mark.usefixtures("poisoned")
DOCUMENTS = [0, 0, 1, 90, 90, 140]


def wide(x):
    """Ids stay as they are; a missing input stays missing."""
    return x.double() if x is not None and x.is_floating_point() else x


def check_norm(a, g, *args):
    """Compare with float64; what rounding is relative to is the result without cancellation."""
    got = entries.compress_norm(a, g, *args)
    assert got.dtype == torch.float32
    size = [t.abs() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in (a, g, *args)]
    magnitude = reference.compress_norm(wide(size[0]), size[1].double(), *size[2:])
    assert_close(got, reference.compress_norm(wide(a), g.double(), *args), factor=8, magnitude=magnitude)
    return got


def check_flat(a, g, *args):
    got = entries.compress_flat(a, g, *args)
    assert got.dtype == torch.float32
    magnitude = reference_sparse.compress_flat(wide(a.abs() if a.is_floating_point() else a), g.double().abs(), *args)
    assert_close(got, reference_sparse.compress_flat(wide(a), g.double(), *args), factor=8, magnitude=magnitude)
    return got


def flat_input(kind, lead, d, dtype):
    """A float input [*lead, d], or ids [*lead] of which some name no coordinate at all."""
    return torch.randn(*lead, d).to(dtype) if kind == "dense" else torch.randint(-2, d + 2, lead).to(kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize(("fan_in", "weighted"), [(1, False), (1, True), (2, False), (5, True), (8, True)])
@pytest.mark.parametrize("ones", [False, True])
def test_norm_equals_the_reference(dtype, group, fan_in, weighted, ones):
    a, g = torch.randn(2, 37, 64).to(dtype), torch.randn(2, 37, 64).to(dtype)
    check_norm(None if ones else a, g, *make_table(64, 48, fan_in, weighted, group), group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 5, 24, 130, 300])
def test_norm_of_a_whole_axis(dtype, d):
    a, g = torch.randn(2, 19, d).to(dtype), torch.randn(2, 19, d).to(dtype)
    check_norm(a, g)
    check_norm(None, g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", torch.int32, torch.int64])
@pytest.mark.parametrize("k", [1, 33, 300])
def test_flat_equals_the_reference(dtype, kind, k):
    a, g = flat_input(kind, (3, 41), 20, dtype), torch.randn(3, 41, 12).to(dtype)
    check_flat(a, g, make_table(12, k)[0][0], make_table(20, k)[0][0])


def test_flat_ids_that_no_column_names_contribute_nothing_and_read_nothing():
    ids = torch.tensor([[7, 2, -1, 9, 2, 1 << 20]])
    g = torch.full((1, 6, 4), float("nan"))
    g[0, [1, 4]] = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    rows, cols = torch.tensor([3, 0, 1, 3]).int(), torch.tensor([2, 2, 5, 8]).int()
    assert entries.compress_flat(ids, g, rows, cols).tolist() == [[44.0, 11.0, 0.0, 0.0]]


def test_flat_ids_below_zero_name_no_column():
    ids, minus = torch.tensor([[-1, 0]]), torch.tensor([-1], dtype=torch.int32)
    check_flat(ids, torch.ones(1, 2, 2), minus + 1, minus)
    assert entries.compress_flat(ids, torch.ones(1, 2, 2), minus + 1, minus).tolist() == [[0.0]]


def test_flat_ids_compare_all_64_bits():
    ids = torch.tensor([[(1 << 32) + 1, 1]])
    one = torch.ones(1, dtype=torch.int32)
    assert entries.compress_flat(ids, torch.ones(1, 2, 2), one, one).tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["sliced", "turned", "outer", "expanded"])
def test_strides(dtype, layout):
    def lay(x):
        if layout == "expanded":
            return x[:, :1].expand(*x.shape)
        return layouts(x)[layout]

    a, g = lay(torch.randn(3, 8, 16).to(dtype)), lay(torch.randn(3, 8, 16).to(dtype))
    # A table that is itself a strided view.
    index = make_table(16, 8, 2, False, 8)[0].T.contiguous().T
    check_norm(a, g, index, None, 8)
    check_norm(None, g, index, None, 8)
    check_norm(a, g)
    rows, cols = make_table(16, 40)[0][0, ::2], make_table(16, 40)[0][0, 1::2]
    check_flat(a, g, rows, cols)
    check_flat(torch.randint(0, 16, (8, 3)).T, g, rows, cols)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0), (1, 1, 1)])
@pytest.mark.parametrize("k", [0, 1])
def test_empty_shapes(shape, k):
    n, _, d = shape
    a, g = torch.randn(shape), torch.randn(shape)
    assert check_norm(a, g).shape == (n, d)
    assert check_norm(None, g).shape == (n, d)
    if d == 0:
        k = 0
    table = torch.zeros(1, k, dtype=torch.int32)
    assert check_norm(a, g, table).shape == (n, k)
    assert check_flat(a, g, table[0], table[0]).shape == (n, k)
    assert check_flat(torch.zeros(shape[:2], dtype=torch.int64), g, table[0], table[0]).shape == (n, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(2, 70), (140,)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_documents(dtype, lead, index_dtype):
    a, g = torch.randn(*lead, 16).to(dtype), torch.randn(*lead, 16).to(dtype)
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=index_dtype)
    rows, cols = make_table(16, 40)[0][0], make_table(16, 40)[0][0]
    check_norm(a, g, *make_table(16, 8, 3, True, 4), 4, cu_seqlens)
    check_norm(None, g, None, None, 1, cu_seqlens)
    check_flat(a, g, rows, cols, cu_seqlens)
    check_flat(torch.randint(0, 16, lead), g, rows, cols, cu_seqlens)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["ones", "dense", torch.int64])
def test_split_positions(packed, kind, monkeypatch):
    seen = []
    monkeypatch.setattr(
        entries, "launch", lambda k, grid, *args, **meta: seen.append(grid) or launch.launch(k, grid, *args, **meta)
    )
    g = torch.randn(1, 700, 16)
    cu_seqlens = torch.tensor([0, 700]) if packed else None
    if kind == "ones":
        call, args = check_norm, (None, g, *make_table(16, 24, 2, True), 1, cu_seqlens)
    else:
        rows, cols = make_table(16, 24)[0][0], make_table(16, 24)[0][0]
        call, args = check_flat, (flat_input(kind, (1, 700), 16, torch.float32), g, rows, cols, cu_seqlens)
    got = call(*args)
    assert seen[0][1] > 1 if ON_GPU else seen[0][1] == 6  # every block of 128 positions is a program of its own
    torch.testing.assert_close(call(*args), got, rtol=0, atol=0)


def test_documents_of_unequal_length_share_one_grid():
    """Splits are chosen for the mean length; a longer document has longer ranges, a shorter one empty ranges."""
    a, g = torch.randn(900, 6), torch.randn(900, 6)
    check_norm(a, g, None, None, 1, torch.tensor([0, 3, 3, 850, 900]))


def test_mixed_dtypes():
    a, g = torch.randn(2, 5, 8).half(), torch.randn(2, 5, 8)
    check_norm(a, g)
    check_flat(a, g, torch.tensor([1, 7]).int(), torch.tensor([0, 3]).int())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 3),
    t=st.integers(0, 150),
    d=st.integers(1, 40),
    k=st.integers(0, 140),
    fan_in=st.integers(1, 8),
    kind=st.sampled_from(["dense", torch.int32, torch.int64]),
)
def test_random_shapes(n, t, d, k, fan_in, kind):
    a, g = torch.randn(n, t, d), torch.randn(n, t, d)
    check_norm(a, g, *make_table(d, k, fan_in, True))
    check_flat(flat_input(kind, (n, t), d + 3, torch.float32), g, make_table(d, k)[0][0], make_table(d + 3, k)[0][0])


G, ONE = torch.zeros(2, 3, 8), torch.zeros(1, dtype=torch.int32)
CUT, UNEVEN = torch.tensor([0, 6]), torch.zeros(3, 2, 8).transpose(0, 1)
BAD_NORM = [
    ({"index": torch.tensor([[0, 8]]).int()}, IndexError, r"index has entries from 0 to 8; they must lie in \[0, 8\)"),
    ({"index": torch.tensor([[1, 2]]).int(), "group": 2}, ValueError, "index is not made of aligned runs of 2"),
    ({"index": torch.tensor([[0, 1]])}, TypeError, "index has dtype torch.int64; it must be int32"),
    ({"weight": torch.ones(1, 2)}, ValueError, "weight is given without index"),
    ({"a": torch.zeros(2, 3, 7)}, ValueError, r"leading dimensions \[2, 3, 7\] and \[2, 3, 8\] must agree"),
    ({"a": G.int()}, TypeError, "a has dtype torch.int32"),
    ({"g": G[0], "a": None}, ValueError, r"g has shape \[3, 8\]; it must have 3 dimensions"),
    ({"index": ONE[None].to("meta")}, ValueError, "index is on meta and g on"),
    ({"cu_seqlens": on_cpu(0, 4, 3, 6)}, ValueError, "cu_seqlens decreases"),
    ({"cu_seqlens": on_cpu(0, 5)}, ValueError, "cu_seqlens ends at 5; it must end at the number of rows, 6"),
    ({"a": UNEVEN, "cu_seqlens": CUT}, ValueError, r"a has shape .* pass a.contiguous\(\)"),
    ({"a": None, "g": UNEVEN, "cu_seqlens": CUT}, ValueError, r"g has shape .* pass g.contiguous\(\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_NORM)
def test_norm_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        entries.compress_norm(**({"a": G, "g": G} | change))


BAD_FLAT = [
    ({"rows": ONE + 8}, IndexError, r"rows has entries from 8 to 8; they must lie in \[0, 8\)"),
    ({"cols": ONE - 1}, IndexError, "cols has entries from -1 to -1"),
    ({"cols": ONE.long()}, TypeError, "cols has dtype torch.int64; it must be int32"),
    ({"cols": torch.zeros(2, dtype=torch.int32)}, ValueError, r"cols has shape \[2\]; rows and cols must both be"),
    ({"a": torch.zeros(2, 4, 8)}, ValueError, r"leading dimensions \[2, 4\] and \[2, 3\] must agree"),
    ({"a": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"leading dimensions \[2, 4\] and \[2, 3\] must agree"),
    ({"a": G.bool()}, TypeError, "a has dtype torch.bool"),
    ({"cols": ONE.to("meta")}, ValueError, "cols is on meta and g on"),
    ({"a": torch.zeros(3, 2).int().T, "cu_seqlens": CUT}, ValueError, r"pass a.contiguous\(\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_FLAT)
def test_flat_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        entries.compress_flat(**({"a": G, "g": G, "rows": ONE, "cols": ONE} | change))
