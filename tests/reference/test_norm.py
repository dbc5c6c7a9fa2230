from __future__ import annotations

import pytest
import torch
from torch import nn

import dropinf_kernels as kernels
from tests.reference.helpers import CUTS, DTYPES, assert_near, dense, documents, layouts, make_table


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("fan_in", "weighted"), [(1, False), (1, True), (3, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_equals_folded_autograd(dtype, group, fan_in, weighted, bias):
    x, g = torch.randn(3, 5, 16), torch.randn(3, 5, 16).to(dtype)
    layer = nn.LayerNorm(16, dtype=torch.float64)
    a = nn.functional.layer_norm(x, [16]).to(dtype)
    index, weight = make_table(16, 8, fan_in, weighted, group)
    got = kernels.compress_norm(None if bias else a, g, index, weight, group)
    grads = []
    for n in range(3):
        # The affine part alone, on the input as it was stored.
        loss = ((layer.weight * a[n].double() + layer.bias) * g[n].double()).sum()
        grads.append(torch.autograd.grad(loss, layer.bias if bias else layer.weight)[0])
    assert_near(got, torch.stack(grads) @ dense(index, weight, 16).T, dtype)


def test_norm_without_index_is_the_whole_gradient():
    a, g = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(kernels.compress_norm(a, g), (a * g).sum(1))
    torch.testing.assert_close(kernels.compress_norm(None, g), g.sum(1))


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("fan_in", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_documents_equal_a_loop(cuts, fan_in, bias):
    a, g = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    cu_seqlens = torch.tensor(cuts)
    table = make_table(8, 4, fan_in, True)
    got = kernels.compress_norm(None if bias else a, g, *table, cu_seqlens=cu_seqlens)
    pairs = zip(documents(a, cu_seqlens), documents(g, cu_seqlens), strict=True)
    want = torch.cat([kernels.compress_norm(None if bias else x, y, *table) for x, y in pairs])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (1, 1, 8)])
@pytest.mark.parametrize("indexed", [False, True])
def test_norm_empty_and_single(shape, indexed):
    index = make_table(8, 4)[0] if indexed else None
    x = torch.randn(shape)
    for a in (None, x):
        got = kernels.compress_norm(a, x, index)
        assert got.shape == (shape[0], 4 if indexed else 8)
        assert shape[1] != 0 or not got.any()


def test_norm_strides_and_chunks_do_not_matter(monkeypatch):
    a, g = torch.randn(5, 4, 16), torch.randn(5, 4, 16)
    table = make_table(16, 8, 2, True)
    want = kernels.compress_norm(a, g, *table)
    monkeypatch.setattr("dropinf_kernels.ops.norm.BUFFER_BYTES", 2 * 4 * 16 * 4)
    for name in layouts(a):
        got = kernels.compress_norm(layouts(a)[name], layouts(g)[name], *table)
        torch.testing.assert_close(got, want, msg=name)


def test_norm_bad_input_names_the_argument():
    a = torch.ones(2, 3, 8)
    with pytest.raises(ValueError, match=r"a has shape .* and g has shape"):
        kernels.compress_norm(a, torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"^weight is given without index"):
        kernels.compress_norm(a, a, None, torch.ones(1, 4))
