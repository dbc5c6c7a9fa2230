from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import dequantize_bits, quantize_bits, score_topk_bits
from dropinf_kernels.gpu import bits as module
from dropinf_kernels.gpu import topk
from tests.interpreter.helpers import DTYPES, ON_GPU, assert_close
from tests.interpreter.sorting import fast_sort
from tests.reference.helpers import layouts
from tests.reference.test_bits import check_rows, decoded, every_width

pytestmark = pytest.mark.usefixtures("poisoned", "_fast_sort")


@pytest.fixture(scope="module")
def _fast_sort():
    with contextlib.nullcontext() if ON_GPU else fast_sort():
        yield


def check_quantized(x, bits):
    codes, scale = quantize_bits.triton(x, bits)
    check_rows(x.cpu(), codes.cpu(), scale.cpu(), bits)
    for dtype in (*DTYPES, torch.float64):
        back = dequantize_bits.triton(codes, scale, bits, dtype)
        assert torch.equal(back, dequantize_bits.plain(codes, scale, bits, dtype))


def check(q, codes, scale, bits, k, offset=0):
    values, indices = (out.cpu() for out in score_topk_bits.triton(q, codes, scale, bits, k, offset))
    # The rest on the CPU, where an index out of range is an error and no more.
    scores = q.cpu().double() @ decoded(codes.cpu(), scale.cpu(), bits).T
    exact = torch.topk(scores, min(k, len(codes))).values
    assert_close(values, exact)
    assert indices.shape == exact.shape
    # Scores nearer than float32 resolves may swap; every index must still carry its own score.
    if values.numel():
        assert_close(scores.gather(1, indices - offset), exact)
        assert all(row.unique().numel() == row.numel() for row in indices)


def some_codes(rows, width):
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8)


@every_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 304), (2, 9000), (0, 8), (4, 0)])
def test_quantizes_as_the_definition_says(dtype, bits, shape):
    check_quantized(torch.randn(shape).to(dtype), bits)


@every_width
def test_zero_rows_and_rows_of_any_size(bits):
    x = torch.randn(5, 16)
    x = x / x.abs().amax(1, keepdim=True) * torch.tensor([1e-36, 1e-20, 0.0, 1e20, 1.5e38]).unsqueeze(1)
    check_quantized(x, bits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_row_that_is_not_finite_is_marked(bad):
    x = torch.zeros(3, 40)
    x[1, 7] = bad
    _, scale = quantize_bits.triton(x, 1)
    assert torch.isnan(scale).tolist() == [False, True, False]


@every_width
@pytest.mark.parametrize("layout", ["sliced", "turned", "outer"])
def test_strides(bits, layout):
    check_quantized(layouts(torch.randn(4, 32))[layout], bits)
    check_quantized(torch.randn(1, 32).expand(4, 32), bits)
    codes, q = some_codes(30, 8), torch.randn(3, 8 * 8 // bits)
    scale = torch.rand(60)[::2]
    strange = codes.t().contiguous().t() if layout == "turned" else some_codes(60, 24)[::2, ::3].copy_(codes)
    assert torch.equal(dequantize_bits.triton(strange, scale, bits), dequantize_bits.plain(codes, scale, bits))
    check(layouts(q)[layout], strange, scale, bits, 4)
    check(q[:1].expand(3, q.shape[1]), codes, scale, bits, 4)


@every_width
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "rows", "width", "k"), [(1, 70, 5, 1), (2, 300, 70, 17)])
def test_scores_equal_the_reference(dtype, bits, queries, rows, width, k):
    q = torch.randn(queries, width * (8 // bits)).to(dtype)
    check(q, some_codes(rows, width), torch.rand(rows), bits, k, offset=9)


def test_several_blocks_of_queries():
    check(torch.randn(65, 8).half(), some_codes(10, 2), torch.rand(10), 2, 4)


def test_same_bits_again():
    q, codes, scale = torch.randn(2, 32), some_codes(100, 4), torch.rand(100)
    for one, other in zip(*(score_topk_bits.triton(q, codes, scale, 1, 5) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("extra", [0, 1])
def test_the_most_it_keeps_and_a_longer_list(extra, monkeypatch):
    launched = []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *args, **meta: launched.append(args[0]) or launch(*args, **meta))
    check(torch.randn(2, 8), some_codes(600, 2), torch.rand(600), 2, topk.MAX_TOP + extra)
    assert bool(launched) == (extra == 0)


@every_width
@pytest.mark.parametrize(("k", "rows"), [(5, 300), (60, 400)])
def test_ties_go_to_the_lowest_row_across_blocks_and_splits(bits, k, rows, monkeypatch):
    q, codes = torch.randint(-2, 3, (3, 8 // bits)).float(), some_codes(rows, 1)
    scale = torch.randint(1, 3, (rows,)).float()
    splits = []
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda kernel, grid, *args, **meta: splits.append(grid) or launch(kernel, grid, *args, **meta)
    )
    values, indices = score_topk_bits.triton(q, codes, scale, bits, k, offset=2**40)
    assert splits[0][1] > 1
    scores = q.cpu().double() @ decoded(codes.cpu(), scale.cpu(), bits).T
    want = torch.sort(scores, dim=1, descending=True, stable=True)
    assert torch.equal(values.cpu().double(), want.values[:, :k])
    assert torch.equal(indices.cpu(), want.indices[:, :k] + 2**40)


def test_scores_that_are_not_finite():
    codes, scale = torch.zeros(4, 1, dtype=torch.uint8), torch.tensor([1.0, float("nan"), 2.0, 0.0])
    values, indices = score_topk_bits.triton(torch.ones(1, 8), codes, scale, 1, 4)
    assert indices.tolist() == [[1, 3, 0, 2]]
    assert values[0, 0].isnan()
    assert values[0, 1:].tolist() == [0, -4, -8]
    q = torch.zeros(2, 8)
    q[:, 3] = torch.tensor([float("nan"), float("inf")])
    values, indices = score_topk_bits.triton(q, codes[:2], torch.ones(2), 1, 2)
    assert indices.tolist() == [[0, 1]] * 2
    assert values[0].isnan().all()
    assert values[1].tolist() == [-float("inf")] * 2


@pytest.mark.parametrize(("queries", "rows", "k"), [(0, 5, 2), (3, 0, 2), (3, 5, 0), (2, 3, 10)])
def test_empty_shapes_and_more_than_there_are(queries, rows, k):
    check(torch.randn(queries, 8), some_codes(rows, 1), torch.rand(rows), 1, k)
    check(torch.randn(queries, 0), some_codes(rows, 0), torch.rand(rows), 1, min(k, 1))


def test_bad_input():
    q, codes, scale = torch.zeros(2, 8), some_codes(6, 1), torch.ones(6)
    with pytest.raises(ValueError, match="k is -1"):
        score_topk_bits.triton(q, codes, scale, 1, -1)
    with pytest.raises(ValueError, match="q has 8 columns; it must have 4"):
        score_topk_bits.triton(q, codes, scale, 2, 3)
    with pytest.raises(ValueError, match="bits is 5"):
        dequantize_bits.triton(codes, scale, 5)
    with pytest.raises(ValueError, match="x has 7 columns"):
        quantize_bits.triton(q[:, :7], 1)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    queries=st.integers(1, 6),
    rows=st.integers(1, 100),
    width=st.integers(1, 40),
    k=st.integers(1, 20),
    bits=st.sampled_from([1, 2, 4]),
)
def test_random_shapes(queries, rows, width, k, bits):
    check_quantized(torch.randn(rows % 7, width * (8 // bits)), bits)
    check(torch.randn(queries, width * (8 // bits)), some_codes(rows, width), torch.rand(rows), bits, k)
