"""Offsets past 2^31 elements, in every axis of every input and in the outputs, on memory that is hardly committed."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import dropinf_kernels as ops
from dropinf_kernels import gpu
from dropinf_kernels.gpu import launch, tiles
from tests.reference.helpers import make_table

ROOT = Path(__file__).parents[2]
# One worker: the subprocess runs once for all of them.
pytestmark = pytest.mark.xdist_group("offsets")
COMMITTED = 1.5 * 2**30  # bytes
NORESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python's mmap names since 3.13
Call = tuple[Callable, tuple]


def uncommitted(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros on pages that exist once they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags), dtype=dtype).view(shape)


def stretched(x: Tensor, dim: int) -> Tensor:
    """Return a tensor equal to `x`, of which about half along `dim`, or the last, lies past 2^31 elements."""
    size = x.shape[dim]
    # Below 2^31 itself, or Triton would take it for an int64.
    stride = (1 << 31) // ((size - 1) // 2 if size >= 5 else size - 1) + 64
    inner = x.movedim(dim, 0).contiguous()
    memory = uncommitted([stride * (x.shape[dim] - 1) + inner[0].numel()], x.dtype)
    out = memory.as_strided(inner.shape, (stride, *inner[0].stride())).movedim(0, dim)
    return out.copy_(x)


def last_of_axis(d: int, k: int, fan_in: int = 1, weighted: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return a table that reads the last coordinate, the one whose offset is large."""
    index, weight = make_table(d, k, fan_in, weighted)
    index[:, 0] = d - 1
    return index, weight


def calls(dtype: torch.dtype) -> dict[str, list[Call]]:
    """Return calls of each op: the op and its arguments."""
    a, g = torch.randn(3, 5, 12).to(dtype), torch.randn(3, 5, 6).to(dtype)
    ids = torch.randint(0, 9, (3, 5))
    cu_seqlens = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    left, right, pick = last_of_axis(12, 4, 2, True), last_of_axis(6, 3), last_of_axis(12, 4)
    cube, cubes, line, lines = (torch.randn(3, 4, *size).to(dtype) for size in ((5, 3, 3), (3, 2, 2), (8,), (7,)))
    x, y, window = (
        torch.randn(3, 4, 4, 5).to(dtype),
        torch.randn(3, 4, 4, 5).to(dtype),
        ([3, 3], [1, 1], [1, 1], [1, 1]),
    )
    taps = last_of_axis(36, 5, 2, True)
    q, int8, scale = torch.randn(3, 4).to(dtype), torch.randint(-127, 128, (5, 4), dtype=torch.int8), torch.rand(5)
    codes = torch.randint(0, 256, (5, 4), dtype=torch.uint8)
    return {
        "linear": [
            (ops.compress_linear, (a, g, *left, *right)),
            (ops.compress_linear, (a, g, *pick)),
            (ops.compress_linear, (a[0, :3], g[0, :3], *left, None, None, 1, cu_seqlens)),
        ],
        "sketch": [
            (ops.sketch, (a[0], *left)),
            (ops.sketch, (torch.randn(3, 2, 256).to(dtype), last_of_axis(256, 4)[0])),
        ],
        "norm": [
            (ops.compress_norm, (a, a.flip(0), *left)),
            (ops.compress_norm, (None, g[0, :3], None, None, 1, cu_seqlens)),
        ],
        "flat": [
            (ops.compress_flat, (a, g, right[0][0], pick[0][0, :3])),
            (ops.compress_flat, (ids, g, right[0][0], pick[0][0, :3])),
        ],
        "conv": [
            (ops.compress_conv, (x, y, *window, 1, *taps, *last_of_axis(4, 3))),
            (ops.compress_conv, (x, y, *window, 4, *last_of_axis(9, 5))),
            (ops.compress_conv, (cube, cubes, [3, 2, 2], [1] * 3, [0] * 3, [1] * 3, 1)),
            (ops.compress_conv, (line, lines, [2], [1], [0], [1], 1)),
            (ops.sketch_patches, (x, *window, *taps)),
        ],
        "embedding": [
            (ops.compress_embedding, (ids, g, 9, *last_of_axis(9, 5, 2, True), *right)),
            (ops.compress_embedding, (ids[0, :3], g[0, :3], 9, None, None, None, None, -1, 1, cu_seqlens)),
        ],
        "gram": [
            (ops.gram_update, (torch.eye(130), torch.randn(4, 130).to(dtype))),
        ],
        "topk": [
            (ops.score_topk, (q, torch.randn(5, 4).to(dtype), 3)),
            (ops.score_topk, (q, int8, 3, scale)),
        ],
        "quantize": [
            (ops.quantize_rows, (q,)),
            (ops.dequantize_rows, (int8, scale)),
        ],
        "bits": [
            (ops.quantize_bits, (torch.randn(3, 16).to(dtype), 2)),
            (ops.dequantize_bits, (codes, scale, 2)),
            (ops.score_topk_bits, (torch.randn(3, 16).to(dtype), codes, scale, 2, 3)),
        ],
    }


OPS = list(calls(torch.float32))


def stretches(arguments: tuple) -> Iterator[tuple[str, tuple]]:
    """Yield fresh arguments with one axis of one tensor stretched; tables are always small."""
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor) and x.dim() >= 2 and x.dtype != torch.int32 and not is_weight(arguments, i):
            for dim in range(x.dim()):
                large = list(copies(arguments))
                large[i] = stretched(x, dim)
                yield f"argument {i}, axis {dim}", tuple(large)


def is_weight(arguments: tuple, i: int) -> bool:
    return i > 0 and isinstance(arguments[i - 1], Tensor) and arguments[i - 1].dtype == torch.int32


def large_outputs(op: str) -> Iterator[tuple[Callable, tuple, tuple]]:
    """Yield arguments whose output has more than 2^31 elements, and others whose output ends in the same number."""
    a, g, ids = torch.randn(1, 3, 256).half(), torch.randn(1, 3, 256).half(), torch.randint(0, 256, (1, 3))
    x, y, window = torch.randn(1, 2, 4, 4).half(), torch.randn(1, 128, 2, 2).half(), ([3, 3], [1, 1], [0, 0], [1, 1])
    wide, taps = make_table(256, 1024)[0], make_table(18, 512)[0]
    codes = torch.randint(0, 256, (20, 32), dtype=torch.uint8)

    def repeated(elements: int, samples: list[Tensor], *rest):
        """Return samples that differ in nothing, each of which yields so many elements."""
        count = (1 << 31) // elements + 2
        return (*(v.expand(count, *v.shape[1:]) for v in samples), *rest), (*samples, *rest)

    # Square outputs of one sample; the last block does not depend on what lies before.
    side, small = 46400, 64
    C, long, F = torch.randn(1, side), torch.randn(1, 2, side).half(), uncommitted((side, side), torch.float32)
    channels, pixels = torch.randn(1, side, 3, 3).half(), torch.randn(1, side, 1, 1).half()
    few, last_id = long[..., -small:], torch.full((1, 2), side - 1)

    calls = {
        "linear": [
            (ops.compress_linear, repeated(256 * 256, [a, g])),
            (ops.compress_linear_int8, repeated(256 * 256, [a, g])),
            (ops.compress_linear, ((long, long), (few, few))),
        ],
        "sketch": [
            (ops.sketch, repeated(4, [a[0, :1]], last_of_axis(256, 4)[0])),
            (ops.sketch, repeated(1024, [a[0, :1]], wide)),
        ],
        "norm": [(ops.compress_norm, repeated(256, [a, g]))],
        "flat": [(ops.compress_flat, repeated(1024, [a, g], wide[0], wide[0]))],
        "conv": [
            (ops.compress_conv, repeated(128 * 512, [x, y], *window, 1, taps)),
            (ops.compress_conv, repeated(128 * 9, [x, y], *window, 2)),
            *(
                (
                    ops.compress_conv,
                    (
                        (channels[:, -5200 * n :], pixels, *window, n),
                        (channels[:, -32:], pixels[:, -small:], *window, n),
                    ),
                )
                for n in (1, 2)
            ),
            (ops.sketch_patches, repeated(4 * 512, [x], *window, taps)),
        ],
        "embedding": [
            (ops.compress_embedding, repeated(256 * 256, [ids, g], 256)),
            (ops.compress_embedding, ((last_id, long, side), (last_id - side + small, few, small))),
        ],
        "gram": [(ops.gram_update, ((F, C), (torch.zeros(small, small), C[:, -small:])))],
        "topk": [(ops.score_topk, repeated(16, [a[0, :1]], torch.randn(20, 256), 16))],
        "quantize": [
            (ops.quantize_rows, repeated(256, [a[0, :1]])),
            (ops.dequantize_rows, repeated(256, [a[0, :1].to(torch.int8), torch.rand(1)])),
        ],
        "bits": [
            (ops.quantize_bits, repeated(128, [a[0, :1]], 4)),
            (ops.dequantize_bits, repeated(256, [codes[:1], torch.rand(1)], 1)),
            (ops.score_topk_bits, repeated(16, [a[0, :1]], codes, torch.rand(20), 1, 16)),
        ],
    }
    for declared, (large, small) in calls[op]:
        yield declared.triton, large, small


def last_program(launcher: Callable, arguments: tuple) -> tuple[Tensor, ...]:
    """Run the last program of each launch alone, with outputs on memory that is committed by writing."""
    from triton.runtime.interpreter import interpreter_builder as builder

    def launch_last(kernel, grid, device, *args, **meta):
        dims = (*grid, 1, 1)[:3]
        builder.grid_dim, builder.grid_idx = dims, tuple(n - 1 for n in dims)
        with mock.patch.multiple(builder, set_grid_dim=mock.DEFAULT, set_grid_idx=mock.DEFAULT):
            launch.launch(kernel, (1, 1, 1), device, *args, **meta)

    def empty(shape, *, dtype, device):
        return uncommitted((shape,) if isinstance(shape, int) else shape, dtype)

    with contextlib.ExitStack() as stack:
        for module in (tiles, *(getattr(gpu, name) for name in gpu.__all__ if name != "flat")):
            stack.enter_context(mock.patch.object(module, "launch", launch_last))
        stack.enter_context(mock.patch.object(torch, "empty", empty))
        return results(launcher, arguments)


def results(body: Callable, arguments: tuple) -> tuple[Tensor, ...]:
    """Return what a call returns, or the first argument of one that works in place."""
    out = body(*arguments)
    out = arguments[0] if out is None else out
    return out if isinstance(out, tuple) else (out,)


def copies(arguments: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)


def run(op: str) -> None:
    """Ask for the same bits on stretched inputs as on small ones, and of those that they be the reference's numbers."""
    torch.manual_seed(0)
    for declared, arguments in calls(torch.float16)[op]:
        want = results(declared.triton, copies(arguments))
        # Folds of fp16 inputs round once more than the reference.
        torch.testing.assert_close(want, results(declared.plain, copies(arguments)), rtol=1e-2, atol=1e-2)
        for where, large in stretches(arguments):
            for got, expected in zip(results(declared.triton, large), want, strict=True):
                assert torch.equal(got, expected), f"{declared.__name__}, {where}: {got} is not {expected}"
    for launcher, large, small in large_outputs(op):
        got, want = last_program(launcher, large), last_program(launcher, small)
        assert max(out.numel() for out in got) > 1 << 31
        # Another number of samples may choose other tiles, which sum in another order.
        torch.testing.assert_close([out.flatten()[-1] for out in got], [out.flatten()[-1] for out in want])
    committed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert committed < COMMITTED, f"{committed} bytes were committed"


def run_all() -> None:
    """Run each op in a fork, as a wrong offset ends in a segmentation fault; print its name and wait status."""
    from triton.runtime.interpreter import GridExecutor

    from tests.interpreter.sorting import fast_sort

    # It copies each storage onto itself, which would commit all of it.
    GridExecutor._restore_args_dev = lambda *args: None
    torch.set_num_threads(1)
    with fast_sort():
        for op in OPS:
            child = os.fork()
            if not child:
                try:
                    run(op)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            print(op, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.interpreter.test_offsets"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("op", OPS)
def test_offsets_past_two_billion_elements(op, done):
    assert f"{op} 0" in done.stdout.splitlines(), f"{done.stdout}\n{done.stderr[-4000:]}"


if __name__ == "__main__":
    run_all()
