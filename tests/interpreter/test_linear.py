from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dropinf_kernels import compress_linear, compress_linear_into
from dropinf_kernels.gpu import launch, linear, tiling
from dropinf_kernels.gpu.launch import copies
from tests.interpreter.helpers import DTYPES, ON_GPU, assert_close, on_cpu
from tests.reference.helpers import layouts, make_table

pytestmark = pytest.mark.usefixtures("poisoned")


def want(a, g, *args):
    return compress_linear.plain(a.double(), g.double(), *args)


def operand_eps(dtype, fan_in=1, weighted=False):
    """A folded 16-bit side is rounded to 16 bits once more before it is multiplied."""
    return torch.finfo(dtype if fan_in > 1 or weighted else torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize(("fan_in", "weighted"), [(1, False), (1, True), (2, False), (5, True), (8, True)])
def test_equals_the_reference(dtype, group, fan_in, weighted):
    a, g = torch.randn(2, 37, 64).to(dtype), torch.randn(2, 37, 48).to(dtype)
    tables = (*make_table(64, 32, fan_in, weighted, group), *make_table(48, 16, fan_in, weighted, group))
    got = compress_linear.triton(a, g, *tables, group)
    assert got.dtype == torch.float32
    assert_close(
        got, want(a, g, *tables, group), operand_eps(dtype, fan_in, weighted), 4 if weighted or fan_in > 1 else 16
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sides", ["neither", "in", "out"])
@pytest.mark.parametrize("d", [5, 24, 130])
def test_a_side_kept_whole(dtype, sides, d):
    a, g = torch.randn(2, 9, d).to(dtype), torch.randn(2, 9, d).to(dtype)
    none = (None, None)
    tables = (*(make_table(d, 3) if sides == "in" else none), *(make_table(d, 3) if sides == "out" else none))
    assert_close(compress_linear.triton(a, g, *tables), want(a, g, *tables))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["sliced", "turned", "outer", "expanded"])
def test_strides(dtype, layout):
    a, g = torch.randn(3, 8, 16).to(dtype), torch.randn(3, 8, 16).to(dtype)
    tables = (*make_table(16, 8, 1, False, 8), *make_table(16, 8, 1, False, 8))
    if layout == "expanded":
        a, g = a[:1].expand(3, 8, 16), g[:, :1].expand(3, 8, 16)
    else:
        a, g = layouts(a)[layout], layouts(g)[layout]
    assert_close(compress_linear.triton(a, g, *tables, 8), want(a, g, *tables, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "t"), [(3, 9), (1, 1500), (0, 4), (2, 0)], ids=str)  # the second in several splits
def test_into_writes_its_columns_of_a_block(n, t, dtype, stored):
    a, g = torch.randn(n, t, 40).to(dtype), torch.randn(n, t, 24).to(dtype)
    tables = (*make_table(40, 16, 1, False, 8), *make_table(24, 8, 1, False, 8))
    block = torch.full((n, 8 * 16 + 5), 7.0, dtype=stored)
    room = block[:, 2:-3].unflatten(1, (8, 16))
    compress_linear_into.triton(room, a, g, *tables, 8)
    assert_close(room.float(), want(a, g, *tables, 8), torch.finfo(stored).eps)
    assert (block[:, :2] == 7).all()
    assert (block[:, -3:] == 7).all()


def test_into_packed_documents():
    a, g, cu_seqlens = torch.randn(11, 8), torch.randn(11, 4), torch.tensor([0, 3, 3, 11])
    block = torch.full((3, 40), 7.0)
    compress_linear_into.triton(block[:, 5:37].unflatten(1, (4, 8)), a, g, cu_seqlens=cu_seqlens)
    assert_close(block[:, 5:37].unflatten(1, (4, 8)), want(a, g, None, None, None, None, 1, cu_seqlens))


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8), (2, 4, 8, 0), (2, 4, 0, 8), (1, 1, 1, 1)])
def test_empty_shapes(shape):
    n, t, d_in, d_out = shape
    a, g = torch.randn(n, t, d_in), torch.randn(n, t, d_out)
    got = compress_linear.triton(a, g)
    assert got.shape == (n, d_out, d_in)
    assert_close(got, want(a, g))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_documents(dtype, index_dtype):
    a, g = torch.randn(2, 70, 16).to(dtype), torch.randn(2, 70, 16).to(dtype)
    tables = (*make_table(16, 8), *make_table(16, 4))
    cu_seqlens = torch.tensor([0, 0, 1, 90, 90, 140], dtype=index_dtype)
    assert_close(compress_linear.triton(a, g, *tables, 1, cu_seqlens), want(a, g, *tables, 1, cu_seqlens))


def test_packed_rows_that_are_not_evenly_spaced_are_copied():
    a, g = torch.randn(70, 2, 16).transpose(0, 1), torch.randn(2, 70, 16)
    tables, cu_seqlens, before = (*make_table(16, 8), *make_table(16, 4)), torch.tensor([0, 90, 140]), copies.copy()
    assert_close(compress_linear.triton(a, g, *tables, 1, cu_seqlens), want(a, g, *tables, 1, cu_seqlens))
    assert copies - before == {("packed rows", "a"): 1}


@pytest.mark.parametrize("packed", [False, True])
def test_split_positions(packed, monkeypatch):
    seen = []
    monkeypatch.setattr(
        linear, "launch", lambda k, grid, *args, **meta: seen.append(grid) or launch.launch(k, grid, *args, **meta)
    )
    a, g = torch.randn(1, 700, 16), torch.randn(1, 700, 16)
    cu_seqlens = torch.tensor([0, 700]) if packed else None
    tables = (*make_table(16, 8), *make_table(16, 8))
    got = compress_linear.triton(a, g, *tables, 1, cu_seqlens)
    assert seen[0][1] > 1 if ON_GPU else seen[0][1] == 22  # every block of positions is a program of its own
    assert_close(got, want(a, g, *tables, 1, cu_seqlens))
    torch.testing.assert_close(compress_linear.triton(a, g, *tables, 1, cu_seqlens), got, rtol=0, atol=0)


@pytest.mark.parametrize("k", [40, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks(k, dtype):
    a, g = torch.randn(1, 5, 150).to(dtype), torch.randn(1, 5, 150).to(dtype)
    tables = (*make_table(150, k), *make_table(150, k))
    assert_close(compress_linear.triton(a, g, *tables), want(a, g, *tables))


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_dtype(dtype):
    a, g = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    got = compress_linear.triton(a, g, dtype=dtype)
    assert got.dtype == dtype
    assert_close(got, want(a, g), torch.finfo(dtype).eps)


def test_mixed_dtypes():
    a, g = torch.randn(2, 5, 8).half(), torch.randn(2, 5, 8)
    assert_close(compress_linear.triton(a, g), want(a, g))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 3),
    t=st.integers(0, 40),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    k=st.integers(1, 40),
    fan_in=st.integers(1, 8),
)
def test_random_shapes(n, t, d_in, d_out, k, fan_in):
    a, g = torch.randn(n, t, d_in), torch.randn(n, t, d_out)
    in_index, in_weight = make_table(d_in, k, fan_in, True)
    out_index, _ = make_table(d_out, 1 + k // 2, fan_in)
    got = compress_linear.triton(a, g, in_index, in_weight, out_index)
    magnitude = want(a.abs(), g.abs(), in_index, in_weight.abs(), out_index)
    assert_close(got, want(a, g, in_index, in_weight, out_index), magnitude=magnitude)


BAD = [
    (
        {"in_index": torch.tensor([[0, 8]], dtype=torch.int32)},
        IndexError,
        r"in_index has entries from 0 to 8; they must lie in \[0, 8\)",
    ),
    ({"out_index": torch.tensor([[-1, 2]], dtype=torch.int32)}, IndexError, "out_index has entries from -1 to 2"),
    ({"in_index": torch.tensor([[1, 2]], dtype=torch.int32), "group": 2}, ValueError, "not made of aligned runs of 2"),
    ({"in_index": torch.tensor([[0, 1]])}, TypeError, "in_index has dtype torch.int64; it must be int32"),
    ({"a": torch.zeros(2, 4, 8)}, ValueError, r"leading dimensions \[2, 4\] and \[2, 3\] must agree"),
    ({"a": torch.zeros(2, 3, 8, dtype=torch.int32)}, TypeError, "a has dtype torch.int32"),
    ({"in_index": torch.zeros(1, 2, dtype=torch.int32, device="meta")}, ValueError, "in_index is on meta and g on"),
    ({"cu_seqlens": on_cpu(0, 4, 3, 6)}, ValueError, "cu_seqlens decreases"),
    ({"cu_seqlens": on_cpu(0, 5)}, ValueError, "cu_seqlens ends at 5; it must end at the number of rows, 6"),
    ({"cu_seqlens": on_cpu(1, 6)}, ValueError, "it must start with 0"),
    ({"dtype": torch.int8}, TypeError, "for int8: compress_linear_int8"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    arguments = {"a": torch.zeros(2, 3, 8), "g": torch.zeros(2, 3, 8)} | change
    with pytest.raises(error, match=message):
        compress_linear.triton(**arguments)


def test_a_table_is_checked_again_after_it_changes():
    a, g = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    index = torch.tensor([[0, 1]], dtype=torch.int32)
    compress_linear.triton(a, g, index)
    index[0, 1] = 8
    with pytest.raises(IndexError, match="entries from 0 to 8"):
        compress_linear.triton(a, g, index)


def test_every_block_of_the_rule_gives_the_same(monkeypatch):
    a, g = torch.randn(2, 20, 40).half(), torch.randn(2, 20, 40).half()
    tables = (*make_table(40, 16, 1, False, 8), *make_table(40, 16, 1, False, 8))
    exact = want(a, g, *tables, 8)
    for block in tiling._BLOCKS:
        monkeypatch.setattr(tiling, "outer_blocks", lambda k_out, k_in, block=block: block)
        assert_close(compress_linear.triton(a, g, *tables, 8), exact)
