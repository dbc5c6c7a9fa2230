"""The registered ops: opcheck, torch.compile, autocast, autograd, and an import that touches no device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dropinf_kernels as kernels
from tests.reference.helpers import WRITES, make_table

ROOT = Path(kernels.__file__).parents[1]
WINDOW = ([3, 2], [2, 1], [1, 0], [1, 1])


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, list[tuple]]:
    """Return positional arguments of every op, in the order of its public signature."""
    torch.manual_seed(0)
    a, g = torch.randn(2, 6, 8, dtype=dtype), torch.randn(2, 6, 4, dtype=dtype)
    x, y = torch.randn(2, 4, 5, 4, dtype=dtype), torch.randn(2, 6, 3, 3, dtype=dtype)
    ids = torch.randint(0, 9, (2, 6))
    cu_seqlens = torch.tensor([0, 4, 4, 12], dtype=torch.int32)
    left, right, taps = make_table(8, 4, 2, True), make_table(4, 2, 1), make_table(12, 5, 2, True)
    rows, cols = make_table(4, 7)[0][0], make_table(8, 7)[0][0]
    q, scale = kernels.quantize_rows(torch.randn(10, 8))
    codes, c_scale = kernels.quantize_bits(torch.randn(10, 8), 2)
    return {
        "sketch": [(a, *left, 1), (a, make_table(8, 4, 2, False, 4)[0], None, 4)],
        "compress_linear": [(a, g, *left, *right, 1, None), (a, g, None, None, *right, 1, cu_seqlens, torch.bfloat16)],
        "compress_linear_into": [
            (torch.zeros(2, 9, dtype=dtype)[:, 1:].unflatten(1, (2, 4)), a, g, *left, *right, 1, None),
            (torch.zeros(3, 30, dtype=dtype)[:, 6:22].unflatten(1, (2, 8)), a, g, None, None, *right, 1, cu_seqlens),
        ],
        "compress_linear_int8": [(a, g, *left, *right, 1, None)],
        "compress_conv_int8": [(x, y, *WINDOW, 1, *taps, None, None, 1)],
        "compress_embedding_int8": [(ids, g, 9, None, None, *right, -1, 1, cu_seqlens)],
        "compress_norm_int8": [(None, a, *left, 1, None)],
        "compress_flat_int8": [(ids, g, rows, cols, cu_seqlens)],
        "compress_conv": [
            (x, y, *WINDOW, 2, *taps, *make_table(6, 3, 2, True), 1),
            (x, y, *WINDOW, 1, None, None, None, None, 1),
        ],
        "sketch_patches": [(x, *WINDOW, *make_table(24, 5, 2, True))],
        "compress_embedding": [
            (ids, g, 9, *make_table(9, 5, 2, True), *right, 3, 1, None),
            (ids, g, 9, None, None, *right, -1, 1, cu_seqlens),
        ],
        "compress_norm": [(a, a, *left, 1, None), (None, a, None, None, 1, cu_seqlens)],
        "compress_flat": [(a, g, rows, cols, None), (ids, g, rows, cols, cu_seqlens)],
        "gram_update": [(torch.zeros(8, 8), a[0]), (torch.zeros(8, 8), q, scale)],
        "score_topk": [(a[0], a[1], 3, None, 0), (a[0], q, 20, scale, 5)],
        "quantize_rows": [(a[0],)],
        "dequantize_rows": [(q, scale, torch.bfloat16)],
        "quantize_bits": [(a[0], 1), (g[0], 4)],
        "dequantize_bits": [(codes, c_scale, 2, torch.bfloat16)],
        "score_topk_bits": [(a[0], codes, c_scale, 2, 3, 0), (a[0], codes, c_scale, 2, 20, 5)],
    }


CASES = [(name, i) for name, calls in arguments().items() for i in range(len(calls))]


def test_every_public_op_is_registered_and_tested():
    assert set(arguments()) == set(kernels.__all__) - {"conv_output_size"}
    for name in arguments():
        assert hasattr(torch.ops.dropinf, name)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_opcheck(name, case):
    torch.library.opcheck(getattr(torch.ops.dropinf, name).default, arguments()[name][case])


def clone(args: tuple) -> tuple:
    return tuple(v.clone() if isinstance(v, Tensor) else v for v in args)


def call_all(inputs: dict[str, list[tuple]], namespace) -> list:
    results = []
    for name, calls in inputs.items():
        for args in calls:
            out = getattr(namespace, name)(*args)
            results.append(args[0] if out is None else out)
    return results


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_calls_equal_eager(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda inputs: call_all(inputs, kernels), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(arguments()), call_all(arguments(), kernels), rtol=0, atol=0)


def test_compiled_calls_use_the_registered_ops():
    torch._dynamo.reset()
    seen = []

    def record(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(lambda inputs: call_all(inputs, kernels), backend=record, fullgraph=True)(arguments())
    for name in arguments():
        assert any(name in target for target in seen), name


def test_compiled_with_dynamic_shapes():
    torch._dynamo.reset()
    index, weight = make_table(8, 4, 2, True)

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def run(a, c):
        return kernels.compress_linear(a, a, index, weight, index, weight), kernels.score_topk(c, c, 5)

    for n in (2, 3, 7):
        a, c = torch.randn(n, 5, 8), torch.randn(n, 8)
        eager = kernels.compress_linear(a, a, index, weight, index, weight), kernels.score_topk(c, c, 5)
        torch.testing.assert_close(run(a, c), eager, rtol=0, atol=0)


def test_registered_ops_equal_the_functions():
    got = call_all(arguments(), torch.ops.dropinf)
    torch.testing.assert_close(got, call_all(arguments(), kernels), rtol=0, atol=0)


@pytest.mark.parametrize("namespace", [kernels, torch.ops.dropinf], ids=["function", "registered"])
def test_autocast_changes_nothing(namespace):
    want = call_all(arguments(), namespace)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call_all(arguments(), namespace)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_inputs_that_require_grad(name, case):
    plain = arguments()[name][case]
    tracked = tuple(v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in clone(plain))
    if name in WRITES:  # what is written is never a parameter
        tracked = (tracked[0].detach(), *tracked[1:])
    want = getattr(kernels, name)(*plain)
    got = getattr(kernels, name)(*tracked)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for out in (got,) if isinstance(got, Tensor) else got or ():
        assert not out.requires_grad


def test_inputs_that_require_grad_when_compiled():
    torch._dynamo.reset()
    a = torch.randn(2, 3, 8, requires_grad=True)
    F = torch.zeros(8, 8)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(a):
        kernels.gram_update(F, a[0])
        return kernels.compress_linear(a, a), a.sum()

    out, total = run(a)
    assert not out.requires_grad
    total.backward()
    torch.testing.assert_close(F, a[0].detach().T @ a[0].detach())
    torch.testing.assert_close(a.grad, torch.ones_like(a))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_same_inputs_same_bits(name, case):
    first, second = (getattr(kernels, name)(*clone(arguments()[name][case])) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_inputs_are_not_written():
    for name, calls in arguments().items():
        for args in calls:
            before = clone(args)
            getattr(kernels, name)(*args)
            for i, (old, new) in enumerate(zip(before, args, strict=True)):
                if isinstance(old, Tensor) and not (name in WRITES and i == 0):
                    assert torch.equal(old, new), (name, i)


def test_import_touches_no_device_and_no_kernel():
    script = (
        "import sys, torch; "
        "torch.cuda._lazy_init = lambda: exit('device touched'); "
        "import dropinf_kernels; "
        "torch.ops.dropinf.sketch; "
        "assert not torch.cuda.is_initialized(); "
        "assert not any(name == 'triton' or name.startswith('dropinf_kernels.gpu') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)
