from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import dropinf_kernels as kernels
from tests.reference.helpers import DTYPES, assert_near, dense, layouts, make_table

CUTS = [[0, 3, 3, 8, 12], [0, 0, 12], [0, 12, 12]]


def embedding_gradients(ids: Tensor, g: Tensor, rows: int, padding_idx: int | None = None) -> Tensor:
    """Return the gradients of nn.Embedding's weight, one backward per sample, as [N, d_out, rows] in float64."""
    layer = nn.Embedding(rows, g.shape[-1], padding_idx=padding_idx, dtype=torch.float64)
    grads = [torch.autograd.grad((layer(ids[n]) * g[n].double()).sum(), layer.weight)[0].T for n in range(ids.shape[0])]
    return torch.stack(grads)


@pytest.mark.parametrize("dtype", DTYPES)
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
    want = kernels.compress_embedding(ids, g, 5, *table)
    for budget in (1, 300, 4000):
        monkeypatch.setattr("dropinf_kernels.ops.embedding.BUFFER_BYTES", budget)
        torch.testing.assert_close(kernels.compress_embedding(ids, g, 5, *table), want)


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


def test_strides_do_not_matter():
    ids, g = torch.randint(0, 9, (3, 5)), torch.randn(3, 5, 8)
    tables = (*make_table(9, 6, 2, True), *make_table(8, 4))
    want = kernels.compress_embedding(ids, g, 9, *tables)
    turned = ids.T.contiguous().T
    for name, h in layouts(g).items():
        torch.testing.assert_close(kernels.compress_embedding(turned, h, 9, *tables), want, msg=name)


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
