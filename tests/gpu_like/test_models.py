"""Models on a GPU give what they give on a CPU: every kind of module, every sketch, every dtype that kernels take."""

from __future__ import annotations

import pytest
import torch

import dropinf
from tests.api.models import HUGGING_FACE, PLAIN
from tests.capture.test_models import SKETCHES
from tests.gpu_like.helpers import check

# One of each way of capture in `make test`; the others wait for `make test-kernels`.
MODELS = ("sequence_mlp", "cnn", "raw_parameters", "tied", "lstm", "llama")
ALL_MODELS = [n if n in MODELS else pytest.param(n, marks=pytest.mark.kernels) for n in (*PLAIN, *HUGGING_FACE)]
SKETCHED = {("flat", "tied"), ("gaussian", "tied"), ("whitened_rotated", "attention"), ("pca", "attention")}
ALL_SKETCHED = [
    pytest.param(s, n, marks=() if (s, n) in SKETCHED else pytest.mark.kernels)
    for s in SKETCHES
    if s != "dropout"
    for n in ("cnn", "attention", "tied")
]


@pytest.mark.parametrize("name", ALL_MODELS)
def test_models(gpu, name):
    check(name, dropinf.Dropout(dim=(3, 2)))
    assert gpu.kernels


@pytest.mark.parametrize(("sketch", "name"), ALL_SKETCHED)
def test_sketches(gpu, sketch, name):
    check(name, SKETCHES[sketch], calibrate=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes(gpu, dtype):
    check("sequence_mlp", dropinf.Dropout(dim=4, group=2), dtype)
    assert bool(gpu.kernels) == (dtype != torch.float64)
