from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dropinf_kernels as kernels
from tests.reference.helpers import DTYPES, assert_near, layouts, make_table

CUTS = [[0, 3, 3, 8, 12], [0, 0, 12], [0, 12, 12]]


def flat_oracle(a: Tensor, g: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    grads = torch.einsum("nto,nti->noi", g.double(), a.double())
    return grads[:, rows.long(), cols.long()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 5, 16])
@pytest.mark.parametrize("k", [1, 6, 90])
def test_flat_gathers_entries_of_the_gradient(dtype, t, k, monkeypatch):
    a, g = torch.randn(3, t, 7).to(dtype), torch.randn(3, t, 5).to(dtype)
    rows, cols = make_table(5, k)[0][0], make_table(7, k)[0][0]
    want = flat_oracle(a, g, rows, cols)
    assert_near(kernels.compress_flat(a, g, rows, cols), want, dtype)
    monkeypatch.setattr("dropinf_kernels.ops.flat._CACHE_BYTES", 8 * t * 4)
    assert_near(kernels.compress_flat(a, g, rows, cols), want, dtype)
    for name, b in layouts(a).items():
        torch.testing.assert_close(
            kernels.compress_flat(b, layouts(g)[name], rows, cols).double(), want, rtol=1e-4, atol=1e-4
        )


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 3), t=st.integers(0, 10), k=st.integers(0, 40), d=st.integers(1, 6))
def test_flat_random_shapes(n, t, k, d):
    a, g = torch.randn(n, t, d, dtype=torch.float64), torch.randn(n, t, d + 1, dtype=torch.float64)
    rows, cols = make_table(d + 1, k)[0][0], make_table(d, k)[0][0]
    torch.testing.assert_close(kernels.compress_flat(a, g, rows, cols), flat_oracle(a, g, rows, cols))
    ids = torch.randint(0, d, (n, t))
    one_hot = nn.functional.one_hot(ids, d)
    torch.testing.assert_close(kernels.compress_flat(ids, g, rows, cols), flat_oracle(one_hot, g, rows, cols))


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("packed", [(12,), (3, 4)])
@pytest.mark.parametrize("sparse", [False, True])
def test_flat_documents_equal_a_loop(cuts, packed, sparse):
    a = torch.randint(0, 6, packed) if sparse else torch.randn(*packed, 6)
    g = torch.randn(*packed, 5)
    rows, cols = make_table(5, 9)[0][0], make_table(6, 9)[0][0]
    got = kernels.compress_flat(a, g, rows, cols, torch.tensor(cuts))
    flat_a, flat_g = a.reshape(12, *a.shape[len(packed) :]), g.reshape(12, 5)
    for n, (lo, hi) in enumerate(pairwise(cuts)):
        want = kernels.compress_flat(flat_a[None, lo:hi], flat_g[None, lo:hi], rows, cols)
        torch.testing.assert_close(got[n], want[0])


def test_chunks_of_matches_do_not_change_the_result(monkeypatch):
    ids, g = torch.randint(0, 5, (3, 20)), torch.randn(3, 20, 4, dtype=torch.float64)
    rows, cols = make_table(4, 50)[0][0], make_table(5, 50)[0][0]
    want = kernels.compress_flat(ids, g, rows, cols)
    for budget in (1, 300, 4000):
        monkeypatch.setattr("dropinf_kernels.ops.flat.BUFFER_BYTES", budget)
        torch.testing.assert_close(kernels.compress_flat(ids, g, rows, cols), want)


def test_strides_of_a_lookup_do_not_matter():
    ids, g = torch.randint(0, 9, (3, 5)), torch.randn(3, 5, 8)
    rows, cols = make_table(8, 11)[0][0], make_table(9, 11)[0][0]
    want = kernels.compress_flat(ids, g, rows, cols)
    turned = ids.T.contiguous().T
    for name, h in layouts(g).items():
        torch.testing.assert_close(kernels.compress_flat(turned, h, rows, cols), want, msg=name)


IDS, G = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, 4)
ROWS = torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((G, G, ROWS.long(), ROWS), TypeError, "rows has dtype torch.int64"),
        ((G, G, ROWS, ROWS[:3]), ValueError, r"cols has shape \[3\]"),
        ((G, G, ROWS[None], ROWS[None]), ValueError, r"rows has shape \[1, 5\]"),
        ((IDS[:1], G, ROWS, ROWS), ValueError, "leading dimensions"),
        ((IDS, G, ROWS + 4, ROWS), IndexError, "rows has entries"),
        ((G, G, ROWS + 4, ROWS), (IndexError, RuntimeError), "out of"),
    ],
)
def test_flat_bad_input_names_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.compress_flat(*arguments)
