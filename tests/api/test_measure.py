"""What can be asked about: each loss against its definition, its gradients against autograd, and its scores."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from dropinf import measure
from tests.api.models import Lambda
from tests.api.oracle import assert_equal_gradients, oracle

N, T, V = 5, 6, 7


def trained_with(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, (torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,)))


def language():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Embedding(V, 6), nn.Linear(6, 6), nn.Tanh())
    model = Lambda(lambda m, ids: m.head(m.body(ids).cumsum(1)), body=body, head=nn.Linear(6, V)).double()
    ids = torch.randint(V, (N, T))
    return model, (ids, torch.tensor([1, 2, 3, 5, 2]), torch.tensor([6, 3, 6, 6, 4]))


def assert_scores(model, loss_fn, batch, train_loss, train_batch):
    """Rows are autograd's, and scores the products of query rows with training rows."""
    compressor = dropinf.Compressor(model, dropinf.Dropout(3), train_loss)
    asked = dropinf.Compressor(model, dropinf.Dropout(3), loss_fn)
    train, query = compressor.compress([train_batch]), asked.compress([batch])
    assert_equal_gradients(asked, query, oracle(model, loss_fn, batch, N))
    fisher = dropinf.build_fisher(train)
    solved = fisher.solve(query)
    torch.testing.assert_close(dropinf.score(query, train, fisher), solved.flat @ train.flat.T)


def test_margin():
    model, batch = classifier()
    loss_fn = measure.margin()
    p = model(batch[0]).softmax(1).gather(1, batch[1][:, None])[:, 0]
    torch.testing.assert_close(loss_fn(model, batch), torch.log((1 - p) / p))
    assert_scores(model, loss_fn, batch, trained_with, batch)
    wrapped = measure.margin(lambda m, b: SimpleNamespace(logits=m(b[0])))
    torch.testing.assert_close(wrapped(model, batch), loss_fn(model, batch))


def test_a_margin_has_a_gradient_where_the_model_is_sure():
    logits = torch.tensor([[200.0, 0.0, 1.0]], requires_grad=True)
    measure.margin(lambda m, b: logits)(None, (None, torch.tensor([0]))).sum().backward()
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor(-1.0))


def test_completion():
    model, batch = language()
    loss_fn = measure.completion()
    ids, starts, ends = batch
    expected = []
    for n in range(N):
        logits = model(ids[n : n + 1])[0].log_softmax(-1)
        expected.append(-sum(logits[t - 1, ids[n, t]] for t in range(int(starts[n]), int(ends[n]))))
    torch.testing.assert_close(loss_fn(model, batch), torch.stack(expected))
    torch.testing.assert_close(loss_fn(model, batch[:2]), loss_fn(model, (ids, starts, torch.full((N,), T))))
    everything = measure.completion()
    train = (ids, torch.ones(N, dtype=torch.int64))
    assert_scores(model, loss_fn, batch, everything, train)


def test_contrast():
    model, good = language()
    bad = (torch.randint(V, (N, T)), good[1], good[2])
    one = measure.completion()
    loss_fn = measure.contrast(one)
    torch.testing.assert_close(loss_fn(model, (good, bad)), one(model, good) - one(model, bad))
    doubled = measure.contrast(one, lambda m, b: 2 * one(m, b))
    torch.testing.assert_close(doubled(model, (good, bad)), one(model, good) - 2 * one(model, bad))
    assert_scores(model, loss_fn, (good, bad), one, good)


@pytest.mark.parametrize("position", ["mean", "last"])
def test_probe(position):
    model, batch = language()
    vector = torch.randn(6)
    loss_fn = measure.probe("body", vector, position)
    hidden = model.body(batch[0])
    expected = (hidden.mean(1) if position == "mean" else hidden[:, -1]) @ vector.double()
    torch.testing.assert_close(loss_fn(model, batch), expected)
    assert not model.body._forward_hooks
    assert_scores(model, loss_fn, batch, measure.completion(), batch)


def test_a_probe_runs_any_batch_and_reads_flat_outputs():
    model, batch = classifier()
    vector = torch.randn(6, dtype=torch.float64)
    loss_fn = measure.probe("1", vector, run=lambda m, b: m(b["x"]))
    torch.testing.assert_close(loss_fn(model, {"x": batch[0]}), torch.tanh(model[0](batch[0])) @ vector)


MODEL, BATCH = classifier()
TEXT, IDS = language()
ONES = torch.ones(N, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: measure.margin("x"), TypeError, "logits_of must be a function"),
        (lambda: measure.completion(3), TypeError, "logits_of must be a function"),
        (lambda: measure.contrast(None), TypeError, "loss_fn must be a function"),
        (lambda: measure.contrast(trained_with, 3), TypeError, "loss_fn must be a function"),
        (lambda: measure.probe("0", [1.0]), TypeError, "vector must be a tensor"),
        (lambda: measure.probe("0", torch.ones(2, 2)), ValueError, r"vector is torch.float32 \[2, 2\]"),
        (lambda: measure.probe("0", torch.ones(6), "first"), ValueError, "position is 'first'"),
        (lambda: measure.probe("0", torch.ones(6), run=3), TypeError, "run must be a function"),
        (lambda: measure.margin()(MODEL, BATCH[0]), ValueError, "batch is a Tensor; it must be a tuple"),
        (lambda: measure.margin()(MODEL, (BATCH[0],)), ValueError, r"labels at batch\[1\]"),
        (lambda: measure.margin()(MODEL, (BATCH[0], ONES[:2])), ValueError, r"batch\[1\] is torch.int64 \[2\]; it must be int64 \[5\]"),
        (lambda: measure.margin()(MODEL, (BATCH[0], ONES.float())), ValueError, "torch.float32"),
        (lambda: measure.margin()(TEXT, IDS), ValueError, r"logits is \[5, 6, 7\]; it must be \[N, C\]"),
        (lambda: measure.margin(lambda m, b: m(b[0])[:, :1])(MODEL, BATCH), ValueError, "at least 2 classes"),
        (lambda: measure.margin(lambda m, b: 3)(MODEL, BATCH), ValueError, "logits are int"),
        (lambda: measure.completion()(TEXT, (IDS[0], 0 * ONES)), ValueError, "start at 1 or later"),
        (lambda: measure.completion()(TEXT, (IDS[0], ONES, ONES)), ValueError, "have a token"),
        (lambda: measure.completion()(TEXT, (IDS[0], ONES, 7 * ONES)), ValueError, "rows of 6 tokens"),
        (lambda: measure.completion()(TEXT, (IDS[0], ONES, 6)), ValueError, "ends at batch"),
        (lambda: measure.completion()(TEXT, (IDS[0][0], ONES)), ValueError, r"batch\[0\] is \[6\]; it must be \[N, T\]"),
        (lambda: measure.completion(lambda m, b: m(b[0])[:, 1:])(TEXT, IDS), ValueError, "they must be .N, T, V."),
        (lambda: measure.contrast(trained_with)(MODEL, BATCH[0]), ValueError, "it must be a pair"),
        (lambda: measure.contrast(trained_with)(MODEL, (BATCH, (BATCH[0][:2], ONES[:2]))), ValueError, r"losses \[5\] and bad \[2\]"),
        (lambda: measure.probe("nope", torch.ones(6))(MODEL, BATCH), ValueError, "'nope' is not in the model"),
        (lambda: measure.probe("0", torch.ones(9))(MODEL, BATCH), ValueError, r"is \[5, 6\]; it must be \[N, ..., 9\]"),
        (lambda: measure.probe("0", torch.ones(6), run=lambda m, b: [m(b[0]), m(b[0])])(MODEL, BATCH), ValueError, "called 2 times"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()
