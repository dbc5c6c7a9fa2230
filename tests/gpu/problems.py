"""One call of every op at sizes that take several blocks and splits, and how near its result must come to float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import dropinf_kernels as ops
from tests.cases.linear import BLOCKS
from tests.interpreter.helpers import assert_close
from tests.reference.helpers import make_table
from tests.reference.test_bits import check_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = {"scattered": (1, 1), "runs-8": (8, 1), "runs-16": (16, 1), "fold": (1, 4)}  # group, fan_in
WINDOW = ([3, 3], [1, 1], [1, 1], [1, 1])


@dataclass(frozen=True)
class Problem:
    """A call on CPU tensors: its first `data` arguments are data, the rest tables and numbers.

    `rounded` is how much of its dtype's eps a result may be off beyond the accumulator's error.
    """

    op: str
    args: tuple
    data: int = 2
    rounded: float = 0

    @property
    def dtype(self) -> torch.dtype:
        return next((v.dtype for v in self.args[: self.data] if is_float(v)), torch.float32)

    def on(self, device: torch.device | str) -> tuple:
        """Return fresh arguments on `device`."""
        return tuple(v.to(device, copy=True) if isinstance(v, Tensor) else v for v in self.args)

    def fresh(self, device: torch.device | str) -> tuple:
        """Return arguments on `device` whose data have other values, and whose tables are the same."""
        # Each by another number of places, or scalar products would stay as they are.
        other = (v.roll(i + 1, -1) if isinstance(v, Tensor) and i < self.data else v for i, v in enumerate(self.args))
        return Problem(self.op, tuple(other), self.data).on(device)

    def wide(self, *, positive: bool = False) -> tuple:
        """Return arguments with data in float64; `positive` for the result that rounding is relative to."""
        args = tuple(v.double() if is_float(v) and i < self.data else v for i, v in enumerate(self.on("cpu")))
        return tuple(v.abs() if positive and (is_float(v) or is_int8(v)) else v for v in args)


def is_float(v: object) -> bool:
    return isinstance(v, Tensor) and v.is_floating_point()


def is_int8(v: object) -> bool:
    return isinstance(v, Tensor) and v.dtype == torch.int8


def results(op: object, args: tuple) -> tuple[Tensor, ...]:
    """Return what a call returns, or the first argument of one that works in place."""
    out = op(*args)
    out = args[0] if out is None else out
    return out if isinstance(out, tuple) else (out,)


def check(problem: Problem, got: tuple[Tensor, ...]) -> None:
    """Compare results with the reference in float64, on the CPU."""
    got = tuple(out.cpu() for out in got)
    accumulator = torch.float64 if problem.dtype == torch.float64 else torch.float32
    # Matrix units cut sums off, so that errors of one sign add up; TF32 alone errs by four to twenty times as much.
    tolerance = 32 * torch.finfo(accumulator).eps + problem.rounded * torch.finfo(problem.dtype).eps
    if problem.op == "quantize_bits":
        check_rows(problem.args[0], *got, problem.args[1])
        return
    if problem.op in ("quantize_rows", "dequantize_rows", "dequantize_bits"):
        for one, other in zip(got, results(getattr(ops, problem.op).plain, problem.args), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        return
    if problem.op == "score_topk_bits":  # as score_topk with the rows that codes stand for
        q, codes, c_scale, bits, k = problem.args
        rows = ops.dequantize_bits(codes, c_scale, bits, torch.float64)
        problem = replace(problem, op="score_topk", args=(q, rows, k, None))
    compress = getattr(ops, problem.op.removesuffix("_int8"))
    want, *rest = results(compress, problem.wide())
    magnitude = results(compress, problem.wide(positive=True))[0]
    if problem.op == "score_topk":
        check_topk(problem, got, want, magnitude, tolerance)
    elif problem.op.endswith("_int8"):
        check_int8(*got, want, max(tolerance, torch.finfo(torch.float32).eps) * magnitude.max())
    else:
        assert len(got) == 1
        assert not rest
        assert_close(got[0], want, tolerance, 1, magnitude)


def check_topk(problem: Problem, got: tuple[Tensor, ...], want: Tensor, magnitude: Tensor, tolerance: float) -> None:
    """Every value is right, and every index carries its own score; scores nearer than the tolerance may swap."""
    values, indices = got
    assert_close(values, want, tolerance, 1, magnitude)
    q, c, _, c_scale = problem.wide()[:4]
    scores = q @ (c.double() if c_scale is None else c.double() * c_scale.double()[:, None]).T
    assert_close(scores.gather(1, indices), want, tolerance, 1, magnitude)
    assert all(row.unique().numel() == row.numel() for row in indices)


def check_int8(q: Tensor, scale: Tensor, want: Tensor, slack: Tensor) -> None:
    """Each row's scale belongs to its greatest entry, and each entry is within half a step."""
    assert q.dtype == torch.int8
    assert q.shape == want.shape
    rows, step = want.flatten(1), scale.double()[:, None]
    assert ((127 * step[:, 0] - rows.abs().amax(1)).abs() <= slack).all()
    assert ((q.flatten(1) * step - rows).abs() <= 0.5 * step + slack).all()


@functools.cache
def problems(dtype: torch.dtype, scale: int = 1) -> dict[str, Problem]:
    """Return every op's problems by name; `scale` divides the sizes."""
    torch.manual_seed(0)
    return {
        **linear_problems(dtype, scale),
        **sparse_problems(dtype, scale),
        **conv_problems(dtype, scale),
        **stored_problems(dtype, scale),
    }


def linear_problems(dtype: torch.dtype, scale: int) -> dict[str, Problem]:
    t, d_in, d_out = 512 // scale, 768 // scale, 3072 // scale
    a, g = torch.randn(4, t, d_in).to(dtype), torch.randn(4, t, d_out).to(dtype)
    many = torch.randn(160, 48, d_in).to(dtype), torch.randn(160, 48, d_out).to(dtype)
    found = {}
    for block, (k_out, k_in) in BLOCKS.items():
        for kind, (group, fan_in) in KINDS.items():
            right = make_table(d_in, max(16, k_in // scale), fan_in, fan_in > 1, group)
            left = make_table(d_out, max(16, k_out // scale), fan_in, fan_in > 1, group)
            # Both sides of each product round to 16 bits, and that averages out over positions.
            rounded = 2 / t**0.5 if fan_in > 1 else 0
            found[f"linear-{block}-{kind}"] = Problem("compress_linear", (a, g, *right, *left, group), rounded=rounded)
    right, left = make_table(d_in, 64, 1, False, 8), make_table(d_out, 64, 1, False, 8)
    cu_seqlens = torch.tensor([0, 5, 5, 2 * t, 4 * t])
    room = torch.zeros(4, 64 * 64 + 10)[:, 3:-7].unflatten(1, (64, 64))
    packed = (a.flatten(0, 1), g.flatten(0, 1), *right, *left, 8, cu_seqlens)
    return found | {
        "linear-kept-input": Problem("compress_linear", (a[..., :256], g, None, None, *left, 8)),
        "linear-packed": Problem("compress_linear", packed),
        "linear-into": Problem("compress_linear_into", (room, a, g, *right, *left, 8), 3),
        "linear-not-split": Problem("compress_linear", (*many, *right, *left, 8)),
        "linear-int8-one-program": Problem("compress_linear_int8", (*many, *right, *left, 8)),
        "linear-int8-two-stages": Problem("compress_linear_int8", (a, g, *right, *left, 8)),
    }


def sparse_problems(dtype: torch.dtype, scale: int) -> dict[str, Problem]:
    t, d, rows = 512 // scale, 768 // scale, 16 * (300 // scale)
    x = torch.randn(4, t, 3072 // scale).to(dtype)
    a, g, ids = torch.randn(4, t, d).to(dtype), torch.randn(4, t, d).to(dtype), torch.randint(0, rows, (4, t))
    found = {}
    for kind, k, group, fan_in in (
        ("scattered", 64, 1, 1), ("scattered-streamed", 2048, 1, 1), ("runs-8", 256, 8, 1), ("runs-16", 256, 16, 1),
        ("fold", 64, 1, 4), ("fold-streamed", 1024, 1, 4),
    ):  # fmt: skip
        table = make_table(x.shape[-1], max(16, k // scale), fan_in, fan_in > 1, group)
        found[f"sketch-{kind}"] = Problem("sketch", (x, *table, group), 1, rounded=1)
    for kind, (group, fan_in) in KINDS.items():
        table = make_table(d, max(16, 256 // scale), fan_in, fan_in > 1, group)
        lookup = make_table(rows, 64, fan_in, fan_in > 1, group)
        found[f"norm-{kind}"] = Problem("compress_norm", (a, g, *table, group))
        # Every other id is one that the table names.
        named = torch.where(torch.arange(t) % 2 == 0, ids, lookup[0][0][torch.randint(0, 64, (4, t))])
        # Where the one-hot side is folded, in float32, the other is not rounded to 16 bits.
        found[f"embedding-{kind}"] = Problem("compress_embedding", (named, g, rows, *lookup, *table, -1, group))
    rows_of, cols_of = make_table(d, 1000 // scale)[0][0], make_table(d, 1000 // scale)[0][0]
    named = torch.randint(0, d, (4, t))
    return found | {
        "bias": Problem("compress_norm", (None, g)),
        "norm-int8": Problem("compress_norm_int8", (a, g, *table)),
        "flat": Problem("compress_flat", (a, g, rows_of, cols_of)),
        "flat-ids": Problem("compress_flat", (named, g, rows_of, cols_of)),
        "flat-int8": Problem("compress_flat_int8", (a, g, rows_of, cols_of)),
        "embedding-whole": Problem("compress_embedding", (ids % 100, g, 100)),
        "embedding-int8": Problem("compress_embedding_int8", (ids % 100, g, 100)),
    }


def conv_problems(dtype: torch.dtype, scale: int) -> dict[str, Problem]:
    channels, size = 64 // scale, max(6, 28 // scale)
    x = torch.randn(4, channels, size, size).to(dtype)
    g = torch.randn(4, 2 * channels, size, size).to(dtype)
    found = {}
    for fan_in in (1, 4):
        taps, left = make_table(9 * channels, 100, fan_in, fan_in > 1), make_table(2 * channels, 64)
        kind = "fold" if fan_in > 1 else "scattered"
        found[f"conv-{kind}"] = Problem("compress_conv", (x, g, *WINDOW, 1, *taps, *left))
        found[f"patches-{kind}"] = Problem("sketch_patches", (x, *WINDOW, *taps), 1, rounded=1)
    return found | {
        "conv-whole": Problem("compress_conv", (x, g, *WINDOW, 1)),
        "conv-groups": Problem("compress_conv", (x, g, *WINDOW, 2, *make_table(9 * channels // 2, 40), *left)),
        "conv-depthwise": Problem("compress_conv", (x, g, *WINDOW, channels)),
        "conv-int8": Problem("compress_conv_int8", (x, g, *WINDOW, 1, *taps, *left)),
    }


def stored_problems(dtype: torch.dtype, scale: int) -> dict[str, Problem]:
    n, k = 5000 // scale, 768 // scale
    C, q = torch.randn(n, k).to(dtype), torch.randn(70, k).to(dtype)
    F = torch.randn(k, k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    F, int8, c_scale = F + F.T, torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n)
    small = F[:64, :64].clone()
    return {
        "gram": Problem("gram_update", (F, C[:2000])),
        "gram-one-block": Problem("gram_update", (small, C[:2000, :64])),
        "gram-int8": Problem("gram_update", (F, int8[:2000], c_scale[:2000])),
        "top-10": Problem("score_topk", (q, C, 10, None)),
        "top-100": Problem("score_topk", (q, C, 100, None)),
        "top-10-int8": Problem("score_topk", (q, int8, 10, c_scale)),
        "quantize": Problem("quantize_rows", (C,), 1),
        "dequantize": Problem("dequantize_rows", (int8, c_scale, dtype), 1),
        **bits_problems(C, q, c_scale),
    }


def bits_problems(C: Tensor, q: Tensor, c_scale: Tensor) -> dict[str, Problem]:
    found = {}
    for bits in (1, 2, 4):
        codes = torch.randint(0, 256, (len(C), C.shape[1] * bits // 8), dtype=torch.uint8)
        found[f"quantize-{bits}-bits"] = Problem("quantize_bits", (C, bits), 1)
        found[f"dequantize-{bits}-bits"] = Problem("dequantize_bits", (codes, c_scale, bits, C.dtype), 1)
        found[f"top-10-{bits}-bits"] = Problem("score_topk_bits", (q, codes, c_scale, bits, 10), 1)
    return found


NAMES = list(problems(torch.float32, 16))
