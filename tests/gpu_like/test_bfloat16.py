"""Kernels and models in bfloat16, on an interpreter that is patched to compute it rightly (`bfloat16.py`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dropinf
import dropinf_kernels as ops
from tests.gpu.problems import NAMES, check, problems, results
from tests.gpu_like.bfloat16 import bfloat16, narrowed, widened
from tests.gpu_like.helpers import check as check_model

pytestmark = pytest.mark.usefixtures("_bfloat16")
SCALE = 16  # how much smaller than on a real GPU
# One call of each op in `make test`.
FIRST = (
    "linear-64x64-runs-8",
    "sketch-runs-8",
    "norm-fold",
    "embedding-scattered",
    "conv-scattered",
    "gram",
    "quantize",
)
ALL = [n if n in FIRST else pytest.param(n, marks=pytest.mark.kernels) for n in NAMES]


@pytest.fixture
def _bfloat16():
    with bfloat16():
        yield


def test_rounds_as_torch_does():
    values = torch.cat([torch.randn(1000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float("inf"), -0.0])])
    bits = narrowed(values.numpy())
    assert np.array_equal(bits, values.bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert torch.equal(torch.from_numpy(widened(bits)), values.bfloat16().float())


@pytest.mark.parametrize("name", ALL)
def test_every_op(gpu, name):
    problem = problems(torch.bfloat16, SCALE)[name]
    got = results(getattr(ops, problem.op), problem.on("cuda:0"))
    assert gpu.kernels
    check(problem, got)


@pytest.mark.parametrize("name", ["sequence_mlp", pytest.param("llama", marks=pytest.mark.kernels)])
def test_models(gpu, name):
    check_model(name, dropinf.Dropout(dim=4, group=2), torch.bfloat16)
