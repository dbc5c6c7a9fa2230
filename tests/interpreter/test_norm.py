from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import compress_norm
from dropinf_kernels.gpu import launch, norm
from dropinf_kernels.gpu.launch import copies
from tests.interpreter.helpers import DTYPES, ON_GPU, assert_close, on_cpu
from tests.reference.helpers import layouts, make_table

pytestmark = pytest.mark.usefixtures("poisoned")
DOCUMENTS = [0, 0, 1, 90, 90, 140]


def check(a, g, *args):
    """Compare with float64; what rounding is relative to is the result without cancellation."""
    got = compress_norm.triton(a, g, *args)
    assert got.dtype == torch.float32
    size = [t.abs() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in (a, g, *args)]
    magnitude = compress_norm.plain(None if a is None else size[0].double(), size[1].double(), *size[2:])
    exact = compress_norm.plain(None if a is None else a.double(), g.double(), *args)
    assert_close(got, exact, factor=8, magnitude=magnitude)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize(("fan_in", "weighted"), [(1, False), (1, True), (2, False), (5, True), (8, True)])
@pytest.mark.parametrize("ones", [False, True])
def test_equals_the_reference(dtype, group, fan_in, weighted, ones):
    a, g = torch.randn(2, 37, 64).to(dtype), torch.randn(2, 37, 64).to(dtype)
    check(None if ones else a, g, *make_table(64, 48, fan_in, weighted, group), group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 5, 24, 130, 300])
def test_a_whole_axis(dtype, d):
    a, g = torch.randn(2, 19, d).to(dtype), torch.randn(2, 19, d).to(dtype)
    check(a, g)
    check(None, g)


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
    check(a, g, index, None, 8)
    check(None, g, index, None, 8)
    check(a, g)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0), (1, 1, 1)])
@pytest.mark.parametrize("k", [0, 1])
def test_empty_shapes(shape, k):
    n, _, d = shape
    a, g = torch.randn(shape), torch.randn(shape)
    assert check(a, g).shape == (n, d)
    assert check(None, g).shape == (n, d)
    k = min(k, d)
    assert check(a, g, torch.zeros(1, k, dtype=torch.int32)).shape == (n, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(2, 70), (140,)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_documents(dtype, lead, index_dtype):
    a, g = torch.randn(*lead, 16).to(dtype), torch.randn(*lead, 16).to(dtype)
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=index_dtype)
    check(a, g, *make_table(16, 8, 3, True, 4), 4, cu_seqlens)
    check(None, g, None, None, 1, cu_seqlens)


def test_packed_rows_that_are_not_evenly_spaced_are_copied():
    a, g, before = torch.randn(2, 70, 16), torch.randn(70, 2, 16).transpose(0, 1), copies.copy()
    check(a, g, *make_table(16, 8), 1, torch.tensor(DOCUMENTS))
    assert set(copies - before) == {("packed rows", "g")}


@pytest.mark.parametrize("packed", [False, True])
def test_split_positions(packed, monkeypatch):
    seen = []
    monkeypatch.setattr(
        norm, "launch", lambda k, grid, *args, **meta: seen.append(grid) or launch.launch(k, grid, *args, **meta)
    )
    g, cu_seqlens = torch.randn(1, 700, 16), torch.tensor([0, 700]) if packed else None
    args = (None, g, *make_table(16, 24, 2, True), 1, cu_seqlens)
    got = check(*args)
    assert seen[0][1] > 1 if ON_GPU else seen[0][1] == 6  # every block of 128 positions is a program of its own
    torch.testing.assert_close(check(*args), got, rtol=0, atol=0)


def test_documents_of_unequal_length_share_one_grid():
    """Splits are chosen for the mean length; a longer document has longer ranges, a shorter one empty ranges."""
    a, g = torch.randn(900, 6), torch.randn(900, 6)
    check(a, g, None, None, 1, torch.tensor([0, 3, 3, 850, 900]))


def test_mixed_dtypes():
    check(torch.randn(2, 5, 8).half(), torch.randn(2, 5, 8))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 3), t=st.integers(0, 150), d=st.integers(1, 40), k=st.integers(0, 140), fan_in=st.integers(1, 8)
)
def test_random_shapes(n, t, d, k, fan_in):
    check(torch.randn(n, t, d), torch.randn(n, t, d), *make_table(d, k, fan_in, True))


G, ONE = torch.zeros(2, 3, 8), torch.zeros(1, dtype=torch.int32)
BAD = [
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
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        compress_norm.triton(**({"a": G, "g": G} | change))
