"""Architectures whose tensors lie in other layouts: on a GPU their layers are hooked as on a CPU, and give the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropinf
from dropinf_kernels.gpu.launch import copies
from tests.gpu_like.architectures import ARCHITECTURES, build
from tests.gpu_like.helpers import on_gpu, on_hooks, ways
from tests.gpu_like.pretend import CUDA, move


@pytest.mark.parametrize(
    "name", [n if n == "gemma3" else pytest.param(n, marks=pytest.mark.kernels) for n in ARCHITECTURES]
)
def test_equal_the_cpu(gpu, name):
    rows, found, before = [], [], copies.copy()
    for place in ("cpu", "gpu"):
        model, batch, loss_fn = build(name)
        if place == "gpu":
            model, batch = move(model), on_gpu(batch)
        compressor = dropinf.Compressor(model, dropinf.Dropout(4), loss_fn)
        rows.append(compressor.compress([batch]))
        found.append(ways(compressor))
    assert found[0] == found[1]
    assert copies == before
    for layer in rows[0].shapes:
        here, there = (of[layer].cpu() for of in rows)
        assert float((there - here).norm()) <= 1e-4 * float(here.norm()), layer


def test_masks_drawn_under_inference_mode_are_checked_once(gpu):
    model, batch = move(nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))), torch.randn(5, 8).to(CUDA)
    with torch.inference_mode():
        compressor = dropinf.Compressor(model, dropinf.Dropout(4), lambda model, x: model(x).square().sum(1))
    checks = []
    for count in (1, 3):  # tables come to the GPU once a call
        gpu.waits.clear()
        compressor.compress([batch] * count)
        checks.append(sum("dropinf_kernels" in line for _, line in gpu.waits))
    assert on_hooks(compressor)
    assert checks[0] == checks[1] > 0
