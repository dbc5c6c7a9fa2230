"""Fixtures of this toolkit's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """It writes into the working directory."""
    monkeypatch.chdir(tmp_path)
