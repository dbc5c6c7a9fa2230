"""Products of tokens: a backward for each token's loss, and sums that are the samples' products."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from tests.api.models import N, build, causal_lm
from tests.directions.cases import assert_near, make
from tests.directions.test_rerank import WAYS, random_direction


def causal_tokens(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none")


@pytest.mark.parametrize("way", WAYS)
def test_equals_a_backward_for_each_token(way):
    model, batch, _ = build("gpt2")
    d = random_direction(model)
    found = dropinf.tokens(model, d, batch, causal_tokens, way=way)
    losses = causal_tokens(model, batch)
    expected = torch.zeros(2, *losses.shape, dtype=torch.float64)
    named = dict(model.named_parameters())
    for n, t in torch.cartesian_prod(*map(torch.arange, losses.shape)).tolist():
        gradients = torch.autograd.grad(losses[n, t], list(named.values()), retain_graph=True)
        for q in range(2):
            expected[q, n, t] = sum((g * d.tensor(x, q)).sum() for x, g in zip(named, gradients, strict=True))
    assert_near(found, expected, 1e-10)
    assert_near(found.sum(2), dropinf.rerank(model, [batch], d, causal_lm, way=way), 1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_sum_to_the_score(way):
    case = make("gpt2", "dropout")
    d = dropinf.direction(case.query, case.fisher, case.compressor)
    expected = dropinf.score(case.query, case.train, case.fisher)
    assert_near(dropinf.tokens(case.model, d, case.batch, causal_tokens, way=way).sum(2), expected, 1e-9)
    model = copy.deepcopy(case.model).float()
    compressor = dropinf.Compressor(model, dropinf.Dropout((3, 2)), causal_lm)
    query = compressor.compress([case.batch])[:2]
    d = dropinf.direction(query, dropinf.build_fisher(query, "joint"), compressor)
    found = dropinf.tokens(model, d, case.batch, causal_tokens, way=way)
    assert_near(found.double().sum(2), dropinf.rerank(model, [case.batch], d, causal_lm).double(), 1e-5)


def test_losses_may_have_any_more_dimensions():
    model = nn.Conv2d(2, 3, 3, padding=1).double()
    batch = torch.randn(N, 2, 5, 4, dtype=torch.float64)
    d = random_direction(model, queries=3)
    found = dropinf.tokens(model, d, batch, lambda m, b: m(b).square().sum(1))
    assert found.shape == (3, N, 5, 4)
    assert_near(found.sum((2, 3)), dropinf.rerank(model, [batch], d, lambda m, b: m(b).square().sum((1, 2, 3))), 1e-10)


def no_slope(model, batch):
    """A root of zero: finite, with an infinite derivative."""
    return (model(batch) * 0).sum(1).sqrt()


def mlp():
    model, batch, loss_fn = build("mlp")
    return model, batch, loss_fn, random_direction(model)


def test_what_does_not_belong_together_is_refused():
    model, batch, loss_fn, d = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="direction and model are of different models: the weights"):
        dropinf.rerank(model, [batch], d, loss_fn)
    with pytest.raises(ValueError, match="of different models"):
        dropinf.tokens(nn.Linear(3, 2), d, batch, loss_fn)


@pytest.mark.filterwarnings("ignore:rerank")
def test_bad_input_is_named():
    model, batch, loss_fn, d = mlp()
    rerank, tokens = dropinf.rerank, dropinf.tokens
    for call, error, match in (
        (lambda: rerank(model, [batch], {}, loss_fn), TypeError, "direction must be a dropinf.Direction"),
        (lambda: rerank(None, [batch], d, loss_fn), TypeError, "model must be"),
        (lambda: rerank(model, [batch], d, None), TypeError, "loss_fn must be"),
        (lambda: rerank(model, [batch], d, loss_fn, way="fast"), ValueError, "way is 'fast'; it must be one of"),
        (lambda: rerank(model, batch, d, loss_fn), TypeError, "one batch"),
        (lambda: rerank(model, [], d, loss_fn), ValueError, "batches: it is empty"),
        (lambda: rerank(model, [batch], d, lambda m, b: m(b)), ValueError, "shape .N., it returned a tensor"),
        (lambda: rerank(model, [batch], d, lambda m, b: m(b).sum()), ValueError, "one loss per sample"),
        (lambda: rerank(model, [batch], d, lambda m, b: 1.0), ValueError, "it returned float"),
        (lambda: rerank(model, [batch / 0], d, loss_fn), ValueError, "a loss of batch 0 is not finite"),
        (
            lambda: tokens(model, d, batch, loss_fn),
            ValueError,
            r"losses of tokens, .N, T., it returned .*dropinf.rerank",
        ),
        (lambda: tokens(model, d, batch, lambda m, b: m(b).argmax(-1, keepdim=True)), ValueError, "int64"),
        (lambda: rerank(model, [batch], (1e300 * d) * 1e300, loss_fn), ValueError, "query 0 is not finite"),
        (lambda: rerank(model, [batch], d, no_slope), ValueError, "product of sample 0 of batch 0 with query 0"),
    ):
        with pytest.raises(error, match=match):
            call()
    with pytest.raises(ValueError, match="rerank: it is called under"), torch.inference_mode():
        rerank(model, [batch], d, loss_fn)
    norm = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ValueError, match="BatchNorm"):
        rerank(norm, [batch], random_direction(norm), loss_fn)
