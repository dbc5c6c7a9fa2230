"""Folders with small models of text."""

from __future__ import annotations

import pytest

from tests.text.models import folders_in


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with a model and its tokenizer, by name; see `folders_in`."""
    return folders_in(tmp_path_factory)
