"""Fixtures of this toolkit's tests."""

from __future__ import annotations

import pytest
import torch

from tests.interop.dattri_llm.models import (
    batches,
    gpt,
    losses,
    text,
)


@pytest.fixture(scope="module")
def trained():
    """(model, train, query): a GPT on bytes."""
    model, train, query = gpt(), text(0, 48), text(48, 60)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        for batch in batches(train):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
    model.zero_grad()
    return model, train, query
