"""Every op on a GPU equals its reference in float64 on the CPU, whichever way it is called."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import triton.testing

import dropinf_kernels as ops
from dropinf_kernels import device
from dropinf_kernels.gpu import launch, linear
from tests.gpu.problems import DTYPES, NAMES, check, problems, results

ROOT = Path(__file__).parents[2]


def test_every_op_has_a_problem():
    assert {p.op for p in problems(torch.float32, 16).values()} == set(ops.__all__) - {"conv_output_size"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference(name, dtype):
    problem = problems(dtype)[name]
    args = problem.on("cuda")
    assert device.runs_triton([v for v in args if torch.is_tensor(v)])
    got = results(getattr(ops, problem.op), args)
    check(problem, got)
    registered = results(getattr(torch.ops.dropinf, problem.op), problem.on("cuda"))
    assert all(torch.equal(one, other) for one, other in zip(got, registered, strict=True))


# All but those that are compared bit for bit: PyTorch divides by a number on a GPU by multiplying with its reciprocal.
@pytest.mark.parametrize("name", [name for name in NAMES if "quantize" not in name])
def test_float64_takes_the_reference(name):
    problem = problems(torch.float64)[name]
    check(problem, results(getattr(ops, problem.op), problem.on("cuda")))


@pytest.fixture
def _unsupported(monkeypatch):
    """A part on which these kernels do not run."""
    monkeypatch.setattr(device, "arch_of", lambda device: None)
    device._supported.cache_clear()
    yield
    device._supported.cache_clear()


@pytest.mark.usefixtures("_unsupported")
def test_an_unsupported_part_takes_the_reference_and_warns_once():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for name in ("linear-64x64-scattered", "bias", "linear-64x64-scattered"):
            problem = problems(torch.float32)[name]
            check(problem, results(getattr(ops, problem.op), problem.on("cuda")))
    assert sum("older than sm_80" in str(w.message) for w in seen) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("linear")])
def test_every_tile_that_may_be_chosen_gives_the_same_to_rounding(name, dtype, monkeypatch):
    problem = problems(dtype)[name]
    args = problem.on("cuda")
    tiles = []
    monkeypatch.setattr(linear, "choose", lambda op, key, candidates, run: tiles.extend(candidates) or candidates[0])
    results(getattr(ops, problem.op), args)
    for tile in tiles.copy():
        monkeypatch.setattr(linear, "choose", lambda *_, tile=tile: tile)
        check(problem, results(getattr(ops, problem.op), args))


@pytest.mark.parametrize("name", ["linear-64x128-runs-8", "linear-packed", "linear-int8-two-stages"])
def test_autotuning_times_a_problem_once(name, monkeypatch):
    monkeypatch.setenv("DROPINF_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "_tuned", {})
    problem = problems(torch.float16)[name]
    args = problem.on("cuda")
    check(problem, results(getattr(ops, problem.op), args))
    assert len(launch._tuned) == 1
    monkeypatch.setattr(triton.testing, "do_bench", None)
    check(problem, results(getattr(ops, problem.op), args))


def test_documents_that_do_not_fit_stop_the_stream():
    """The host does not wait for cu_seqlens on the device, so an assertion in the stream ends the process."""
    script = (
        "import torch, dropinf_kernels as ops; "
        "a = torch.ones(6, 4, device='cuda'); "
        "ops.compress_linear(a, a, cu_seqlens=torch.tensor([0, 5], device='cuda')); "
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "cu_seqlens must start with 0" in done.stdout + done.stderr
