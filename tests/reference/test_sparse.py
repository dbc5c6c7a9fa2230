"""Embeddings by lookup, and entries of the flattened gradient."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dropinf_kernels as kernels
from tests.reference.helpers import assert_near, dense, layouts, make_table

CUTS = [[0, 3, 3, 8, 12], [0, 0, 12], [0, 12, 12]]


def embedding_gradients(ids: Tensor, g: Tensor, rows: int, padding_idx: int | None = None) -> Tensor:
    """Gradients of nn.Embedding's weight, one backward per sample, as [N, d_out, rows] in float64."""
    layer = nn.Embedding(rows, g.shape[-1], padding_idx=padding_idx, dtype=torch.float64)
    grads = [torch.autograd.grad((layer(ids[n]) * g[n].double()).sum(), layer.weight)[0].T for n in range(ids.shape[0])]
    return torch.stack(grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize(("fan_in", "weighted", "group"), [(1, False, 1), (2, True, 1), (4, True, 4), (3, False, 2)])
def test_embedding_equals_folded_autograd(dtype, padding_idx, fan_in, weighted, group):
    ids, g = torch.randint(0, 12, (3, 9)), torch.randn(3, 9, 8).to(dtype)
    tables = (*make_table(12, 8, fan_in, weighted, group), *make_table(8, 4, fan_in, weighted, group))
    grads = embedding_gradients(ids, g, 12, padding_idx)
    want = dense(*tables[2:], 8) @ grads @ dense(*tables[:2], 12).T
    padding = -1 if padding_idx is None else padding_idx
    assert_near(kernels.compress_embedding(ids, g, 12, *tables, padding, group), want, dtype)
    assert_near(kernels.compress_embedding(ids, g, 12, padding_idx=padding), grads, dtype)


def test_a_vocabulary_row_in_several_places():
    ids, g = torch.tensor([[5, 1, 5]], dtype=torch.int32), torch.randn(1, 3, 2, dtype=torch.float64)
    index = torch.tensor([[5, 5, 1], [5, 0, 5]], dtype=torch.int32)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    want = embedding_gradients(ids, g, 6) @ dense(index, weight, 6).T
    torch.testing.assert_close(kernels.compress_embedding(ids, g, 6, index, weight), want)


def test_chunks_of_matches_do_not_change_the_result(monkeypatch):
    ids, g = torch.randint(0, 5, (3, 20)), torch.randn(3, 20, 4, dtype=torch.float64)
    table = make_table(5, 7, 3, True)
    rows, cols = make_table(4, 50)[0][0], make_table(5, 50)[0][0]
    want = kernels.compress_embedding(ids, g, 5, *table), kernels.compress_flat(ids, g, rows, cols)
    for budget in (1, 300, 4000):
        monkeypatch.setattr("dropinf_kernels.reference_sparse.BUFFER_BYTES", budget)
        torch.testing.assert_close(kernels.compress_embedding(ids, g, 5, *table), want[0])
        torch.testing.assert_close(kernels.compress_flat(ids, g, rows, cols), want[1])


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("packed", [(12,), (3, 4)])
def test_embedding_documents_equal_a_loop(cuts, packed):
    ids, g = torch.randint(0, 7, packed), torch.randn(*packed, 6)
    tables = (*make_table(7, 4, 2, True), *make_table(6, 3))
    got = kernels.compress_embedding(ids, g, 7, *tables, 2, cu_seqlens=torch.tensor(cuts))
    flat_ids, flat_g = ids.flatten(), g.reshape(12, 6)
    for n, (lo, hi) in enumerate(pairwise(cuts)):
        want = kernels.compress_embedding(flat_ids[None, lo:hi], flat_g[None, lo:hi], 7, *tables, 2)
        torch.testing.assert_close(got[n], want[0])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
def test_embedding_empty_and_single(shape):
    ids, g = torch.zeros(shape, dtype=torch.int64), torch.ones(*shape, 4)
    got = kernels.compress_embedding(ids, g, 5, make_table(5, 3)[0])
    assert got.shape == (shape[0], 4, 3)
    assert shape[1] != 0 or not got.any()
    nothing = torch.zeros(1, 0, dtype=torch.int32)
    assert kernels.compress_embedding(ids, g, 5, nothing, None, nothing).shape == (shape[0], 0, 0)


def test_lookup_strides_do_not_matter():
    ids, g = torch.randint(0, 9, (3, 5)), torch.randn(3, 5, 8)
    tables = (*make_table(9, 6, 2, True), *make_table(8, 4))
    rows, cols = make_table(8, 11)[0][0], make_table(9, 11)[0][0]
    want = kernels.compress_embedding(ids, g, 9, *tables), kernels.compress_flat(ids, g, rows, cols)
    turned = ids.T.contiguous().T
    for name, h in layouts(g).items():
        got = kernels.compress_embedding(turned, h, 9, *tables), kernels.compress_flat(turned, h, rows, cols)
        torch.testing.assert_close(got, want, msg=name)


def flat_oracle(a: Tensor, g: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    grads = torch.einsum("nto,nti->noi", g.double(), a.double())
    return grads[:, rows.long(), cols.long()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("t", [1, 5, 16])
@pytest.mark.parametrize("k", [1, 6, 90])
def test_flat_gathers_entries_of_the_gradient(dtype, t, k, monkeypatch):
    a, g = torch.randn(3, t, 7).to(dtype), torch.randn(3, t, 5).to(dtype)
    rows, cols = make_table(5, k)[0][0], make_table(7, k)[0][0]
    want = flat_oracle(a, g, rows, cols)
    assert_near(kernels.compress_flat(a, g, rows, cols), want, dtype)
    monkeypatch.setattr("dropinf_kernels.reference_sparse._CACHE_BYTES", 8 * t * 4)
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


IDS, G = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, 4)
ROWS = torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((IDS + 9, G, 9), IndexError, r"ids has entries from 9 to 9; they must lie in \[0, 9\)"),
        ((IDS - 1, G, 9), IndexError, "ids has entries from -1"),
        ((IDS.float(), G, 9), TypeError, "ids has dtype torch.float32"),
        ((IDS[0], G, 9), ValueError, "ids has shape"),
        ((IDS, G[:, :2], 9), ValueError, "leading dimensions"),
        ((IDS, G, 9, ROWS), ValueError, "in_index has shape"),
    ],
)
def test_embedding_bad_input_names_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.compress_embedding(*arguments)


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
