"""Damaged and forged indexes: refused by name, or read as they are; nothing else."""

from __future__ import annotations

import pytest

MEMORY = 3 << 30  # above what the process has


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.more)])
@pytest.mark.parametrize("all_uses", [False, pytest.param(True, marks=pytest.mark.long)])
def test_forged_indexes(dtype, all_uses, forks, place):
    """With checksums that are right, and values that no index has."""
    process = forks.run("forge", place, dtype, all_uses, limits={"AS": MEMORY})
    print(process.text)
    assert process.status == 0, process.text[-20000:]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.more)])
@pytest.mark.parametrize(("count", "resumes"), [(100, 10), pytest.param(1000, 2, marks=pytest.mark.long)])
def test_mutated_indexes(dtype, count, resumes, forks, place):
    process = forks.run("fuzz", place, dtype, 0, count, resumes, limits={"AS": MEMORY})
    print(process.text)
    assert process.status == 0, process.text[-20000:]
