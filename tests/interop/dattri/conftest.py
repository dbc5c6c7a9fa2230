"""Fixtures of this toolkit's tests."""

from __future__ import annotations

import copy

import pytest
from torch.utils.data import DataLoader, TensorDataset

from tests.interop.dattri.models import (
    digits,
    mlp,
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """dattri writes batch_metadata.json into the working directory, and reads it back."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained():
    """(model, its checkpoints, train, query)."""
    data, query = digits(0, 200), digits(200, 230)
    return *mlp(data), DataLoader(data, 64), DataLoader(query, 16)


@pytest.fixture(scope="module")
def doubled(trained):
    model, states, train, query = trained
    double = lambda loader: DataLoader(  # noqa: E731
        TensorDataset(loader.dataset.tensors[0].double(), loader.dataset.tensors[1]), loader.batch_size
    )
    return copy.deepcopy(model).double(), states, double(train), double(query)
