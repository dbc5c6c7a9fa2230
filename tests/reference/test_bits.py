"""Rows of few bits against their definition in NumPy, one field at a time in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dropinf_kernels as kernels
from dropinf_kernels.ops import bits as module
from dropinf_kernels.ops.bits import BitQueries
from tests.reference.helpers import DTYPES, layouts

STEPS = {1: 1.0, 2: 0.9957, 4: 0.3352}
every_width = pytest.mark.parametrize("bits", [1, 2, 4])


def codes_of(packed, bits):
    """Return the codes [N, K] of packed rows, by arithmetic: byte j of a row holds coordinates j, j + its width, ..."""
    packed = packed.numpy().astype(np.int64)
    return np.concatenate([packed // 2 ** (f * bits) % 2**bits for f in range(8 // bits)], 1)


def decoded(packed, scale, bits):
    return torch.from_numpy((codes_of(packed, bits) - (2**bits - 1) / 2) * scale.double().numpy()[:, None])


def check_rows(x, packed, scale, bits, slack=1e-5):
    """Every code is that of its coordinate, but for those that a rounded sum may push over an edge; scales follow."""
    assert (packed.dtype, scale.dtype) == (torch.uint8, torch.float32)
    assert packed.shape == (x.shape[0], x.shape[1] * bits // 8)
    y, codes = x.double().numpy(), codes_of(packed, bits)
    for row, code, number in zip(y, codes, scale.double().numpy(), strict=True):
        if not row.any():
            assert number == 0
            continue
        z = row / np.sqrt(np.mean((row / abs(row).max()) ** 2)) / abs(row).max() / STEPS[bits]
        want = np.clip(np.floor(z) + 2 ** (bits - 1), 0, 2**bits - 1)
        assert ((code == want) | (abs(z - np.rint(z)) < slack * (1 + abs(z)))).all()
        value = code - (2**bits - 1) / 2
        unit = row / abs(row).max()
        np.testing.assert_allclose(number, abs(row).max() * (unit @ unit) / (value @ unit), rtol=1e-6, atol=1e-45)


@every_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (7, 40), (3, 1000)])
def test_codes_and_scales_are_those_of_the_definition(dtype, bits, shape, monkeypatch):
    monkeypatch.setattr(module, "_TILE_BYTES", 2 * 8 * shape[1])
    x = torch.randn(shape).to(dtype)
    x[-1, 3:5] = torch.tensor([0.0, -0.0])
    check_rows(x, *kernels.quantize_bits(x, bits), bits)


@every_width
def test_rows_come_back_in_every_dtype(bits):
    x = torch.randn(6, 48)
    packed, scale = kernels.quantize_bits(x, bits)
    want = decoded(packed, scale, bits)
    for dtype in DTYPES:
        back = kernels.dequantize_bits(packed, scale, bits, dtype)
        assert back.dtype == dtype
        torch.testing.assert_close(back.double(), want, rtol=torch.finfo(dtype).eps, atol=0)
    wider = kernels.dequantize_bits(packed.t().contiguous().t(), scale.repeat_interleave(2)[::2], bits)
    assert torch.equal(wider, kernels.dequantize_bits(packed, scale, bits))


@every_width
def test_the_product_with_the_row_itself_is_exact_and_other_products_are_unbiased(bits):
    """Over random rotations; the least-squares scale, which is less by |row|^2 |v|^2 / (v row)^2, would be off."""
    turns, k = 3000, 32
    x, y = torch.randn(k, dtype=torch.float64), torch.randn(k, dtype=torch.float64)
    y += 2 * x
    rotations = torch.linalg.qr(torch.randn(turns, k, k, dtype=torch.float64)).Q
    rows, queries = rotations @ x, rotations @ y
    back = decoded(*kernels.quantize_bits(rows, bits), bits)
    torch.testing.assert_close((back * rows).sum(1), (x @ x).expand(turns), rtol=1e-6, atol=0)
    found = (back * queries).sum(1)
    assert abs(found.mean() - x @ y) < 5 * found.std() / turns**0.5
    shrunk = found * (back * rows).sum(1) / back.square().sum(1)
    assert abs(shrunk.mean() - x @ y) > 5 * shrunk.std() / turns**0.5


@every_width
def test_rows_of_any_size_of_float32(bits):
    x = torch.randn(6, 16)
    x = x / x.abs().amax(1, keepdim=True) * torch.tensor([1e-44, 1e-38, 1e-20, 1.0, 1e20, 1.5e38]).unsqueeze(1)
    x[3] = 0
    packed, scale = kernels.quantize_bits(x, bits)
    assert scale.isfinite().all()
    assert scale[3] == 0
    # A row of so few bits of its own has codes of its own, too.
    check_rows(x[1:], packed[1:], scale[1:], bits)
    check_rows(x[:1], packed[:1], scale[:1], bits, slack=0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_quantize_names_the_row_that_is_not_finite(bad):
    x = torch.zeros(5, 8)
    x[3, 1] = bad  # one bit of 3e38 alone has a scale of 6e38
    with pytest.raises(ValueError, match=r"x is not finite, or beyond float32, in row 3 \(1 such rows\)"):
        kernels.quantize_bits(x, 1)


@every_width
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty_rows(bits, shape):
    packed, scale = kernels.quantize_bits(torch.ones(shape), bits)
    assert kernels.dequantize_bits(packed, scale, bits).shape == shape
    assert BitQueries(torch.ones(2, shape[1]), bits).dot(packed).tolist() == [[0.0] * shape[0]] * 2
    assert kernels.score_topk_bits(torch.ones(2, shape[1]), packed, scale, bits, 2)[0].shape == (2, min(2, shape[0]))


@every_width
@pytest.mark.parametrize("layout", ["sliced", "turned", "outer"])
def test_strides(bits, layout):
    x, q = torch.randn(9, 16), torch.randn(3, 16)
    packed, scale = kernels.quantize_bits(x, bits)
    torch.testing.assert_close(kernels.quantize_bits(layouts(x)[layout], bits), (packed, scale), rtol=0, atol=0)
    strange = packed.repeat_interleave(2, 1)[:, ::2]
    got = kernels.score_topk_bits(layouts(q)[layout], strange, scale.repeat(2)[:9], bits, 4)
    want = torch.topk(q.double() @ decoded(packed, scale, bits).T, 4)
    torch.testing.assert_close(got[0].double(), want.values, rtol=0, atol=1e-4)
    assert torch.equal(got[1], want.indices)


@pytest.fixture(params=["integers", "floats"])
def _either_way(request, monkeypatch):
    if request.param == "floats":
        monkeypatch.setattr(module, "in_integers", lambda q, codes: False)


def check_products(q, packed, bits, limit=1.5e-5):
    got = BitQueries(q, bits).dot(packed)
    assert got.dtype == q.dtype
    value = torch.from_numpy(codes_of(packed, bits) - (2**bits - 1) / 2)
    largest = q.double().abs().amax(1, keepdim=True)
    error = got.double() / largest - (q.double() / largest) @ value.T
    size = (q.double() / largest).norm(dim=1, keepdim=True) * value.norm(dim=1)
    assert (error.abs() <= limit * size).all(), (error.abs() / size).max()


@pytest.mark.usefixtures("_either_way")
@every_width
@pytest.mark.parametrize(("queries", "rows", "width"), [(1, 5, 8), (5, 70, 64), (16, 300, 4096), (40, 33, 1000)])
def test_products(bits, queries, rows, width, monkeypatch):
    monkeypatch.setattr(module, "_TILE_BYTES", 4 * 100 * width)
    monkeypatch.setattr("dropinf_kernels.ops.topk.INT8_COLUMNS", 600)
    packed = torch.randint(0, 256, (rows, width * bits // 8), dtype=torch.uint8)
    check_products(torch.randn(queries, width), packed, bits)
    check_products(torch.randn(queries, width).double(), packed, bits, limit=1e-14)


@pytest.mark.usefixtures("_either_way")
@every_width
def test_products_with_queries_of_one_large_entry_of_any_size_and_of_all_codes_alike(bits):
    q = torch.randn(6, 4096)
    q[::2, 5] = 1e3
    q *= torch.tensor([1.0, 1.0, 1e-36, 1e-36, 1e34, 1e34]).unsqueeze(1)
    packed = torch.randint(0, 256, (40, 512 * bits), dtype=torch.uint8)
    packed[:2] = torch.tensor([[0], [255]])
    check_products(q, packed, bits)
    for row in q:
        check_products(row.unsqueeze(0), packed, bits)


@pytest.mark.usefixtures("_either_way")
@every_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 5, 40, 99])
def test_topk_equals_torch(dtype, bits, k, monkeypatch):
    monkeypatch.setattr(module, "BUFFER_BYTES", 4 * 8 * 7)
    q = torch.randn(4, 64).to(dtype)
    packed, scale = kernels.quantize_bits(torch.randn(40, 64), bits)
    values, indices = kernels.score_topk_bits(q, packed, scale, bits, k, offset=9)
    scores = q.double() @ decoded(packed, scale, bits).T
    want = torch.topk(scores, min(k, 40))
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert indices.dtype == torch.int64
    size = q.double().norm(dim=1).max() * decoded(packed, scale, bits).norm(dim=1).max()
    assert values.shape == want.values.shape
    assert ((values.double() - want.values).abs() <= 1e-5 * size).all()
    assert ((scores.gather(1, indices - 9) - want.values).abs() <= 2e-5 * size).all()
    assert all(row.unique().numel() == row.numel() for row in indices)


@settings(max_examples=40, deadline=None)
@given(
    q=st.integers(1, 3),
    n=st.integers(0, 30),
    k=st.integers(0, 12),
    block=st.integers(1, 40),
    bits=st.sampled_from([1, 2, 4]),
    integers=st.booleans(),
)
def test_ties_go_to_the_lowest_index(q, n, k, block, bits, integers):
    # Whole numbers, whose sums are exact in any order.
    query, kinds = torch.randint(-2, 3, (q, 16)).float(), torch.randint(0, 256, (3, 2 * bits), dtype=torch.uint8)
    which = torch.randint(0, 3, (n,))
    packed, scale = kinds[which], torch.ones(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUFFER_BYTES", 3 * 4 * block)
        if not integers:
            patch.setattr(module, "in_integers", lambda q, codes: False)
        values, indices = kernels.score_topk_bits(query, packed, scale, bits, k, offset=100)
        order = torch.sort(BitQueries(query, bits).dot(kinds)[:, which], dim=1, descending=True, stable=True)
    torch.testing.assert_close(values, order.values[:, :k])
    assert torch.equal(which[indices - 100], which[order.indices[:, :k]])
    assert torch.equal(indices, order.indices[:, :k] + 100)


def test_what_is_not_finite_stays_so():
    packed, scale = torch.zeros(3, 1, dtype=torch.uint8), torch.tensor([1.0, float("nan"), 2.0])
    values, indices = kernels.score_topk_bits(torch.ones(1, 8), packed, scale, 1, 3)
    assert indices.tolist() == [[1, 0, 2]]
    assert values[0, 0].isnan()
    assert values[0, 1:].tolist() == [-4, -8]
    q = torch.tensor([[float("nan")] + [0.0] * 7, [float("inf")] + [0.0] * 7])
    values, indices = kernels.score_topk_bits(q, packed, scale.nan_to_num(3.0), 1, 3)
    assert values[0].isnan().all()
    assert indices.tolist() == [[0, 1, 2]] * 2
    assert values[1].tolist() == [-float("inf")] * 3


ONES, BYTES = torch.ones(3, 8), torch.zeros(3, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.quantize_bits(ONES[0], 1), ValueError, "x has shape"),
        (lambda: kernels.quantize_bits(ONES.int(), 1), TypeError, "x has dtype"),
        (lambda: kernels.quantize_bits(ONES, 3), ValueError, "bits is 3; it must be 1, 2 or 4"),
        (lambda: kernels.quantize_bits(ONES[:, :6], 2), ValueError, "x has 6 columns; with bits=2 .* multiple of 4"),
        (lambda: kernels.dequantize_bits(ONES, ONES[:, 0], 1), TypeError, "codes is torch.float32"),
        (lambda: kernels.dequantize_bits(BYTES, ONES[0], 1), ValueError, "scale is .*N = 3"),
        (lambda: kernels.dequantize_bits(BYTES, ONES[:, 0], 8), ValueError, "bits is 8"),
        (lambda: kernels.score_topk_bits(ONES, BYTES, ONES[:, 0], 1, -1), ValueError, "k is -1"),
        (lambda: kernels.score_topk_bits(ONES, BYTES, ONES[:, 0], 2, 1), ValueError, "q has 8 columns; it must have 4"),
        (lambda: kernels.score_topk_bits(ONES, BYTES, ONES[:2, 0], 1, 1), ValueError, "scale is .*N = 3"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
