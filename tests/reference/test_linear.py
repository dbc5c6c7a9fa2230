from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dropinf_kernels as kernels
from tests.reference.helpers import CUTS, DTYPES, assert_near, dense, documents, layouts, make_table


def per_sample_gradients(a: Tensor, g: Tensor) -> Tensor:
    """Return the gradients of nn.Linear's weight, one backward per sample, in float64."""
    layer = nn.Linear(a.shape[-1], g.shape[-1], bias=False, dtype=torch.float64)
    grads = [
        torch.autograd.grad((layer(a[n].double()) * g[n].double()).sum(), layer.weight)[0] for n in range(a.shape[0])
    ]
    return torch.stack(grads)


def folded(grads: Tensor, tables, d_in: int, d_out: int) -> Tensor:
    in_index, in_weight, out_index, out_weight = tables
    return dense(out_index, out_weight, d_out) @ grads @ dense(in_index, in_weight, d_in).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(("fan_in", "weighted"), [(1, False), (1, True), (2, True), (3, False), (4, True)])
@pytest.mark.parametrize("rows", [2, 7])  # fewer values than a product has, and more
def test_linear_equals_folded_autograd(dtype, group, fan_in, weighted, rows):
    a, g = torch.randn(3, rows, 32).to(dtype), torch.randn(3, rows, 24).to(dtype)
    tables = (*make_table(32, 16, fan_in, weighted, group), *make_table(24, 8, fan_in, weighted, group))
    got = kernels.compress_linear(a, g, *tables, group)
    assert_near(got, folded(per_sample_gradients(a, g), tables, 32, 24), dtype)


@pytest.mark.parametrize("sides", ["neither", "in", "out"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_side_without_index_stays_whole(sides, dtype):
    a, g = torch.randn(2, 5, 6).to(dtype), torch.randn(2, 5, 4).to(dtype)
    none = (None, None)
    tables = (
        *(make_table(6, 3, 2, True) if sides == "in" else none),
        *(make_table(4, 2, 2, True) if sides == "out" else none),
    )
    assert_near(kernels.compress_linear(a, g, *tables), folded(per_sample_gradients(a, g), tables, 6, 4), dtype)


def test_mixed_dtypes_accumulate_in_the_wider():
    a, g = torch.randn(2, 5, 6).bfloat16(), torch.randn(2, 5, 4, dtype=torch.float64)
    assert_near(kernels.compress_linear(a, g), per_sample_gradients(a, g), torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 4),
    t=st.integers(0, 6),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    k=st.integers(1, 5),
    fan_in=st.integers(1, 4),
)
def test_linear_random_shapes(n, t, d_in, d_out, k, fan_in):
    a, g = torch.randn(n, t, d_in, dtype=torch.float64), torch.randn(n, t, d_out, dtype=torch.float64)
    tables = (*make_table(d_in, k, fan_in, True), *make_table(d_out, k + 1, fan_in))
    want = folded(torch.einsum("nto,nti->noi", g, a), tables, d_in, d_out)
    torch.testing.assert_close(kernels.compress_linear(a, g, *tables), want)


@pytest.mark.parametrize("group", [1, 4])
def test_linear_strides_do_not_matter(group):
    a, g = torch.randn(3, 4, 16), torch.randn(3, 4, 8)
    tables = (*make_table(16, 8, 2, True, group), *make_table(8, 4, 2, True, group))
    want = kernels.compress_linear(a, g, *tables, group)
    for name in layouts(a):
        got = kernels.compress_linear(layouts(a)[name], layouts(g)[name], *tables, group)
        torch.testing.assert_close(got, want, msg=name)
    spread = torch.ones(1, 1, 8).expand(3, 4, 8)
    torch.testing.assert_close(
        kernels.compress_linear(a, spread, *tables, group),
        kernels.compress_linear(a, spread.contiguous(), *tables, group),
    )


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("packed", [(12,), (3, 4)])
@pytest.mark.parametrize(("fan_in", "k"), [(1, 2), (1, 4), (2, 4)])  # weights scale the product, or what is multiplied
def test_linear_documents_equal_autograd(cuts, dtype, packed, fan_in, k):
    a, g = torch.randn(*packed, 8), torch.randn(*packed, 6)
    cu_seqlens = torch.tensor(cuts, dtype=dtype)
    tables = (*make_table(8, k, fan_in, True), *make_table(6, k, fan_in, True))
    got = kernels.compress_linear(a, g, *tables, cu_seqlens=cu_seqlens)
    pairs = zip(documents(a, cu_seqlens), documents(g, cu_seqlens), strict=True)
    want = torch.cat([folded(per_sample_gradients(x, y), tables, 8, 6) for x, y in pairs])
    assert_near(got, want, torch.float32)


A, G = torch.ones(2, 3, 8), torch.ones(2, 3, 4)
INDEX = torch.zeros(1, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"a": A[0], "g": G}, ValueError, r"a has shape \[3, 8\]; it must have 3 dimensions"),
        ({"a": A, "g": G[:, :2]}, ValueError, "leading dimensions"),
        ({"a": A.int(), "g": G}, TypeError, "a has dtype torch.int32"),
        ({"a": A, "g": G, "in_index": INDEX.long()}, TypeError, "in_index has dtype torch.int64"),
        ({"a": A, "g": G, "out_index": INDEX[0]}, ValueError, "out_index has shape"),
        (
            {"a": A, "g": G, "out_weight": torch.ones(1, 4)},
            ValueError,
            "out_weight is given without out_index",
        ),
        ({"a": A, "g": G, "cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens has dtype"),
        ({"a": A, "g": G, "cu_seqlens": torch.tensor([1, 6])}, ValueError, "must start with 0"),
        ({"a": A, "g": G, "cu_seqlens": torch.tensor([0, 5])}, ValueError, "ends at 5.* 6"),
        ({"a": A, "g": G, "cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, "cu_seqlens decreases"),
    ],
)
def test_linear_bad_input_names_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.compress_linear(**arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_writes_its_columns_of_a_block(dtype):
    a, g = torch.randn(3, 7, 32).to(dtype), torch.randn(3, 7, 24).to(dtype)
    tables = (*make_table(32, 16), *make_table(24, 8))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    block = torch.full((3, 8 * 16 + 5), 7.0, dtype=wide)
    assert kernels.compress_linear_into(block[:, 2:-3].unflatten(1, (8, 16)), a, g, *tables) is None
    assert_near(block[:, 2:-3].unflatten(1, (8, 16)), folded(per_sample_gradients(a, g), tables, 32, 24), dtype)
    assert (block[:, :2] == 7).all()
    assert (block[:, -3:] == 7).all()


ROOM = torch.zeros(2, 80)[:, 4:68].unflatten(1, (8, 8))
BAD_ROOMS = [
    (ROOM[:1], ValueError, r"out has shape \[1, 8, 8\] .* must be \[2, 8, 8\], each sample's part contiguous"),
    (ROOM.mT, ValueError, r"out has shape .* and strides \(80, 1, 8\)"),
    (ROOM[..., :4], ValueError, "out has shape"),
    (ROOM.flatten(1), ValueError, "out has shape"),
    (ROOM.int(), TypeError, "dtype is torch.int32"),
]


@pytest.mark.parametrize(("room", "error", "message"), BAD_ROOMS)
@pytest.mark.parametrize("body", ["plain", "triton"])
def test_into_refuses_what_it_cannot_fill(room, error, message, body):
    a = torch.zeros(2, 3, 8)
    with pytest.raises(error, match=message):
        getattr(kernels.compress_linear_into, body)(room, a, a)
