"""The int8 variant of each compress kernel: one program that holds the row, and a second stage where none does."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import dropinf_kernels as ops
from dropinf_kernels.gpu import tiles
from tests.reference.helpers import make_table

pytestmark = pytest.mark.usefixtures("poisoned")
WINDOW = ([3, 2], [1, 1], [1, 0], [1, 1])


def problems(t: int, k: int) -> dict:
    """Return the op and the arguments of each problem; the second argument is the output gradient [3, t, ...]."""
    a, g, y = torch.randn(3, t, 150), torch.randn(3, t, 16), torch.randn(3, 6, t // 2, 2)
    x = torch.randn(3, 25, t // 2, 3)
    left, right, rows, cols = make_table(16, 8), make_table(150, k), make_table(16, k), make_table(150, k)
    # Ids that a column names, as no other reads its gradient.
    ids, named = (table[0][0][torch.randint(0, k, (3, t))] for table in (right, cols))
    return {
        "compress_linear": (ops.compress_linear, (a, g, *right, *left)),
        "compress_conv": (ops.compress_conv, (x, y, *WINDOW, 1, *make_table(150, k))),
        "grouped": (ops.compress_conv, (x[:, :6], y, *WINDOW, 6, *make_table(6, min(k, 40)))),
        "compress_embedding": (ops.compress_embedding, (ids, g, 150, *right, *left)),
        "compress_norm": (ops.compress_norm, (a, a.flip(1), *right)),
        "compress_flat": (ops.compress_flat, (a, g, rows[0][0], cols[0][0])),
        "ids": (ops.compress_flat, (named, g, rows[0][0], cols[0][0])),
    }


def int8(compress):
    """Return the op that compresses so and quantizes."""
    return getattr(ops, f"{compress.__name__}_int8")


@pytest.mark.parametrize("t", [4, 300])
@pytest.mark.parametrize("k", [8, 140])
@pytest.mark.parametrize("op", problems(4, 8))
def test_equals_the_quantized_reference(op, t, k):
    compress, args = problems(t, k)[op]
    args[1][1] = 0
    exact = compress.plain(*(v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in args))
    with mock.patch.object(tiles, "launch", wraps=tiles.launch) as second:
        q, scale = int8(compress).triton(*args)
    # One block and few positions: the program that sums a row also quantizes it.
    assert second.called == (t == 300 or k == 140)
    assert q.dtype == torch.int8
    assert q.shape == exact.shape
    assert scale[1] == 0
    rows, steps = exact.flatten(1), scale.double()[:, None]
    torch.testing.assert_close(steps[:, 0], rows.abs().amax(1) / 127, rtol=1e-5, atol=0)
    # Half a step, and the rounding of a float32 sum: 16 eps of the greatest, which is 127 steps.
    error = 0.5 + 127 * 16 * torch.finfo(torch.float32).eps
    assert ((q.flatten(1).double() * steps - rows).abs() <= error * steps).all()
    plain, _ = int8(compress).plain(*args)
    assert (q.int() - plain.int()).abs().max() <= 1


@pytest.mark.parametrize("t", [4, 300])
@pytest.mark.parametrize("op", problems(4, 8))
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_is_marked(op, t, bad):
    compress, args = problems(t, 8)[op]
    args[1][0] = bad
    q, scale = int8(compress).triton(*args)
    assert torch.isnan(scale).tolist() == [True, False, False]
    assert (q[0] == 0).all()
    assert (q[1] != 0).any()
