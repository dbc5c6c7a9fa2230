"""Kernels on numpy: TRITON_INTERPRET=1 is read when a kernel is defined, so this tier has a process of its own.

With DROPINF_GPU=1 instead, the same tests run on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.interpreter.helpers import ON_GPU

if ON_GPU:
    # These two look into the interpreter.
    collect_ignore = ["test_traffic.py", "test_offsets.py"]
    torch.set_default_device("cuda")
elif os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill what torch.empty returns with NaN, or 99 for integers: a value that a kernel forgot shows."""
    plain = torch.empty

    def empty(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", empty)
