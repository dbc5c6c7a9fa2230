"""The parts of a document's loss by token, and their products with directions."""

from __future__ import annotations

import pytest
import torch

import dropinf
from dropinf.transformer import TextModel
from tests.directions.cases import assert_near
from tests.text.models import PASSAGES


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_parts_sum_to_the_loss(folders, name, loss, packed):
    text = TextModel(folders(name), dtype=torch.float64)
    work = text.workload(PASSAGES, packed=packed, loss=loss, tokens_per_batch=30)
    lengths = {p.id: len(p.text.split()) for p in PASSAGES}
    for batch in work.batches:
        found = text.token_losses(work.model, batch, loss=loss)
        torch.testing.assert_close(found.sum(1), work.loss_fn(work.model, batch), rtol=1e-12, atol=0)
        for row, name_ in zip(found, batch["ids"], strict=True):
            n = lengths[name_]
            assert not row[0]
            assert bool((row[1:n] > 0).all())
            assert not row[n:].any()


@pytest.mark.filterwarnings("error::UserWarning:dropinf.*")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_tokens_sum_to_the_score(folders, dtype, tolerance, packed):
    text = TextModel(folders("gpt2"), dtype=dtype)
    work = text.workload(PASSAGES, packed=packed)
    compressor = dropinf.Compressor(text.model, dropinf.Dropout(4), work.loss_fn, cu_seqlens=work.cu_seqlens)
    rows = compressor.compress(work.batches)
    fisher = dropinf.build_fisher(rows, "joint")
    d = dropinf.direction(rows[:2], fisher, compressor)
    batch = work.batches[0]
    found = dropinf.tokens(text.model, d, batch, text.token_losses)
    assert found.shape[:2] == (2, len(batch["ids"]))
    assert_near(found.sum(2), dropinf.rerank(text.model, [batch], d, work.loss_fn).double(), tolerance)
    assert_near(found.sum(2), dropinf.score(rows[:2], rows, fisher)[:, : found.shape[1]].double(), 10 * tolerance)


def test_a_classifier_has_no_tokens(folders):
    text = TextModel(folders("bert"))
    with pytest.raises(ValueError, match=r"is a classifier.*dropinf.rerank"):
        text.token_losses(text.model, text.workload(PASSAGES).batches[0])
