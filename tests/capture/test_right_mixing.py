"""Losses that depend on other samples of their batch: refused, unless ``mixing=True``, and then the derivative in the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.right_or_refused import Cases, check, check_mixing, doubles, mlp, points, runs, squares  # noqa: F401


class Raw(nn.Module):
    """Raw parameters alone."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.tanh(x @ self.w + self.b)


class Gru(nn.Module):
    """A recurrent layer alone."""

    def __init__(self):
        super().__init__()
        self.g = nn.GRU(3, 4, batch_first=True)

    def forward(self, x):
        return self.g(x[:, None])[0][:, 0]


class Normed(nn.Module):
    """A linear layer and a norm, without a raw parameter."""

    def __init__(self):
        super().__init__()
        self.l, self.n = nn.Linear(3, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.n(torch.tanh(self.l(x)))


def contrastive(m, x):
    z = F.normalize(m(x), dim=1)
    return F.cross_entropy(z @ (z + z.square()).T, torch.arange(len(x)), reduction="none")


def centred(m, x):
    y = m(x)
    return (y - y.mean(0)).square().sum(1)


def softmaxed(m, x):
    y = m(x)
    return (y.sum(1).softmax(0)[:, None] * y).sum(1)


def standardized(m, x):
    y = m(x)
    return ((y - y.mean(0)) / (y.var(0, unbiased=False) + 0.1).sqrt()).pow(3).sum(1)


def shared_norm(m, x):
    return squares(m, x) * m(x).norm()


def neighbours(m, x):
    y = m(x)
    return squares(m, x) + (y * y.roll(1, 0)).sum(1)


def neighbours_of_equal_parity(m, x):
    y = m(x)
    return squares(m, x) + (y * y.roll(2, 0)).sum(1)


def mirrored(m, x):
    y = m(x)
    return (y * y.flip(0)).sum(1) + y[:, 0]


def slightly(m, x):
    y = m(x)
    return squares(m, x) + 1e-4 * y.mean()


def by_one_sample(m, x):
    y = m(x)
    return squares(m, x) + y[0].sum()


def cumulative(m, x):
    return m(x).cumsum(0).square().sum(1)


def ranked(m, x):
    y = m(x).sum(1)
    return F.softplus(y[None] - y[:, None]).sum(1)


LOSSES = [contrastive, centred, softmaxed, standardized, shared_norm, neighbours, neighbours_of_equal_parity, mirrored, slightly, by_one_sample, cumulative, ranked]  # fmt: skip
MODELS = {"raw": Raw, "gru": Gru, "normed": Normed, "mlp": lambda: mlp(last=4)}


@runs
@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize("make", [pytest.param(m, id=name) for name, m in MODELS.items()])
def test_mixing_is_refused_or_as_it_stands(make, loss_fn, sketch, backwards):
    check_mixing(lambda: (make(), loss_fn, points(4, 4, 5, 3)), sketch, backwards)


CASES = Cases()


@CASES.add()
def batch_norm_by_hand():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.s, self.b = nn.Linear(3, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 1)

        def forward(self, x):
            h = self.a(x)
            h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-3).sqrt()
            return self.b(torch.tanh(h * self.s))

    return Norm(), squares, points(4, 4, 5, 3)


@CASES.add()
def batch_norm_of_the_inputs():
    """Statistics of the data alone do not depend on a parameter, but the layer's rows meet in the loss."""

    class Meet(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h + h.amax(0))

    return Meet(), squares, points(4, 4, 5, 3)


@CASES.add()
def attention_across_samples():
    class Across(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.m = nn.Linear(3, 4), nn.MultiheadAttention(4, 2)

        def forward(self, x):
            h = self.a(x)
            return self.m(h, h, h)[0]

    return Across(), squares, points(4, 4, 5, 3)


@CASES.add()
def a_weight_s_product_of_the_batch():
    class Gram(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return x @ (self.w @ x.T @ x)

    def loss(m, x):
        y = m(x)
        return y.square().sum(1) + (y @ y.T).tanh().sum(1)

    return Gram(), loss, points(4, 4, 5, 3)


@runs
@CASES.parametrize()
def test_layers_that_mix(build, options, sketch, backwards):
    check_mixing(build, sketch, backwards, **options)


SOMETIMES = Cases()


@SOMETIMES.add(right=False)
def mixing_in_later_batches_alone():
    def loss(m, b):
        y = m(b[0])
        return squares(m, b[0]) + (y.roll(1, 0) * y).sum(1) * b[1]

    return mlp(last=2), loss, [(x, float(k > 0)) for k, x in enumerate(points())]


@SOMETIMES.add(right=False)
def mixing_in_later_batches_by_content():
    def loss(m, b):
        y = m(b[0])
        return squares(m, b[0]) + (y.roll(1, 0) * y).sum(1) * b[1]

    return mlp(last=2), loss, [(x, torch.full((len(x),), float(k > 1))) for k, x in enumerate(points(4, 4, 4, 4))]


@SOMETIMES.add(right=False)
def mixing_raw_in_later_batches_alone():
    def loss(m, b):
        y = m(b[0])
        return squares(m, b[0]) + (y.roll(1, 0) * y).sum(1) * b[1]

    return Raw(), loss, [(x, torch.full((len(x),), float(k > 0))) for k, x in enumerate(points())]


@SOMETIMES.add(right=False)
def mixing_by_detached_weights():
    """Importance weights of the whole batch, held constant: each value depends on the others, no derivative does."""

    def loss(m, x):
        y = m(x).square().sum(1)
        return y * y.softmax(0).detach()

    return mlp(), loss, points()


@SOMETIMES.add(right=False)
def mixing_by_detached_weights_of_raw():
    def loss(m, x):
        y = m(x).square().sum(1)
        return y * y.softmax(0).detach()

    return Raw(), loss, points()


@SOMETIMES.add(right=False)
def mixing_by_detached_statistics():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.s, self.b = nn.Linear(3, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 1)

        def forward(self, x):
            h = self.a(x)
            return self.b(torch.tanh((h - h.mean(0).detach()) * self.s))

    return Norm(), squares, points()


@SOMETIMES.add(right=False)
def hard_negatives_of_the_batch():
    """The nearest other sample, detached, is the negative."""

    def loss(m, x):
        y = m(x)
        d = torch.cdist(y, y.detach()) + torch.eye(len(x)) * 1e3
        return F.softplus(-d.gather(1, d.argmin(1, keepdim=True))[:, 0])

    return mlp(last=3), loss, points(4, 4, 5, 3)


@runs
@SOMETIMES.parametrize()
@pytest.mark.parametrize("mixing", [False, True])
def test_mixing_sometimes(build, options, sketch, backwards, mixing):
    check(build, sketch, backwards, mixing=mixing, **options)
