"""The sanitizer: triton-viz patches Triton's interpreter when it is imported, so this tier has a process of its own.

Run it with DROPINF_SANITIZE=1 TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("DROPINF_SANITIZE") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
