"""Indexes and the processes that make them: shared by all of these tests."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.faults.forks import Forks


@pytest.fixture(scope="session")
def forks():
    started = Forks()
    yield started
    started.close()


@pytest.fixture
def place():
    """A folder in memory where there is one: these tests write thousands of files, each one synced."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="dropinf-faults-", dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder)
