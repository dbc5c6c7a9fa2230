"""What all tests share: one thread each, a seed, and which of them wait for `make test-kernels`."""

from __future__ import annotations

import contextlib
import os

# Products here are small, and threads that wait for each other take the cores from the other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

with contextlib.suppress(ModuleNotFoundError):  # tests of GPUs need none
    from hypothesis import HealthCheck, settings

    # Both limits are of the clock, and a machine may be busy with other work.
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")


def waits(item: pytest.Item) -> bool:
    """Whether a kernel's test is left to `make test-kernels`: all machine code but of one architecture and dtype, and
    on the interpreter half precision, random shapes and far offsets."""
    folder, name = item.path.parent.name, item.name
    if folder == "compile":
        return "[bf16-sm_90]" not in name
    more = name.startswith("test_random_") or "dtype1" in name or item.path.name == "test_offsets.py"
    return folder == "interpreter" and more


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if waits(item):
            item.add_marker(pytest.mark.kernels)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
