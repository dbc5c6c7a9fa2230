"""Kernels on a GPU, at sizes of a real layer, and how they are launched: streams, graphs, allocations, waits."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: kernels are interpreted and compiled here instead")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
