"""Benchmarks on a GPU; run them with `make bench-gpu`."""

from __future__ import annotations

import pytest
import torch
import triton


@pytest.fixture(autouse=True, scope="session")
def _on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: nothing is timed")


@pytest.fixture(autouse=True)
def _named(benchmark):
    """Every row says where it was measured, and starts with free memory."""
    benchmark.extra_info.update(card=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    torch.manual_seed(0)
    torch.cuda.empty_cache()
