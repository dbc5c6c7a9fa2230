"""What a call costs before the GPU hears of it: microseconds of Python per call, and the first call of a kernel.

No GPU is needed: the compiled kernel is stubbed where it would be handed to the driver. *ours* stops before Triton;
*with Triton* counts its argument handling and cache look-up too: what the first call of a look costs. *again* is a call
that looks like an earlier one. The driver's own launch, some microseconds, is in none. Kernels are sm_90's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import dropinf_kernels as ops
from dropinf_kernels.gpu import launch, replay
from tests.compile.fake_gpu import fake_driver

# One case of each op in tests/cases, by the name of its module.
CALLS = {
    "compress_linear": ("linear", "runs"),
    "compress_linear, fold": ("linear", "fold"),
    "compress_linear_int8": ("linear", "runs-int8"),
    "sketch": ("sketch", "runs"),
    "compress_conv": ("conv", "6-dropout"),
    "compress_embedding": ("embedding", "8-scattered"),
    "compress_norm": ("norm", "norm-16-scattered"),
    "compress_flat": ("flat", "flat-16"),
    "gram_update": ("gram", "20x30"),
    "score_topk": ("topk", "top-3"),
    "quantize_rows": ("quantize", "quantize"),
}


def _nothing(*args: object, **kwargs: object) -> None:
    pass


@pytest.fixture(autouse=True)
def _no_gpu() -> Iterator[None]:
    """Compile for sm_90, and run nothing."""
    active = driver._active
    driver.set_active(fake_driver("sm_90"))
    with (
        mock.patch.object(CompiledKernel, "_init_handles", _nothing),
        mock.patch.object(CompiledKernel, "run", _nothing),
    ):
        yield
    driver._active = active


def call_of(op: str) -> tuple[object, Callable[[], object]]:
    module, name = CALLS[op]
    cases = importlib.import_module(f"tests.cases.{module}").small(torch.bfloat16)
    call = next(case.call for case in cases if case.name == name)
    # compress_flat launches the kernel of compress_norm.
    launcher = "norm" if module == "flat" else module
    return importlib.import_module(f"dropinf_kernels.gpu.{launcher}"), call


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("part", ["ours", "with Triton", "again"])
def test_python_per_call(benchmark, op: str, part: str) -> None:
    benchmark.group = f"Python per call, {part}"
    module, call = call_of(op)
    with (
        mock.patch.object(module, "launch", _nothing if part == "ours" else launch.launch),
        mock.patch.object(replay, "can_replay", lambda _: part == "again"),  # noqa: PT008 (a Mock is slow)
    ):
        benchmark.pedantic(call, rounds=30, iterations=50, warmup_rounds=2)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("disk", ["compiled", "from the disk cache"])
def test_first_call(benchmark, op: str, disk: str, tmp_path: Path, monkeypatch) -> None:
    """The first call in a process: the kernel is compiled, or found where an earlier process left it."""
    benchmark.group = f"first call, {disk}"
    module, call = call_of(op)
    kernels = [v for v in vars(module).values() if isinstance(v, JITFunction)]
    rounds = iter(range(10))

    def forget() -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / (str(next(rounds)) if disk == "compiled" else "")))
        for kernel in kernels:
            kernel.device_caches.clear()

    benchmark.pedantic(call, setup=forget, rounds=3, warmup_rounds=1)


def test_a_registered_op_per_call(benchmark) -> None:
    """torch.ops.dropinf.sketch over the function: what compiled code pays for being seen by the compiler."""
    benchmark.group = "registered op, plain PyTorch body"
    x, index = torch.randn(2, 16), torch.arange(8, dtype=torch.int32)[None]
    benchmark.pedantic(torch.ops.dropinf.sketch, (x, index), rounds=30, iterations=50, warmup_rounds=2)


def test_its_body_per_call(benchmark) -> None:
    benchmark.group = "registered op, plain PyTorch body"
    x, index = torch.randn(2, 16), torch.arange(8, dtype=torch.int32)[None]
    benchmark.pedantic(ops.sketch, (x, index), rounds=30, iterations=50, warmup_rounds=2)
