"""Samples that differ alone: by values that no tensor holds, and faint ones in a norm of one's own."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
from torch import nn

from tests.capture.right_or_refused import Cases, check, doubles, points, runs, squares  # noqa: F401

CASES = Cases()


def scaled(loss, given):
    """A recurrent layer or attention: its weights are taken one sample at a time."""

    def build(kind):
        layer = (
            nn.LSTM(3, 3, batch_first=True) if kind == "recurrent" else nn.MultiheadAttention(3, 1, batch_first=True)
        )

        def run(m, x):
            return m(x)[0] if kind == "recurrent" else m(x, x, x)[0]

        return layer, lambda m, b: loss(run(m, b[0]), b), [(torch.randn(4, 2, 3), more) for more in given]

    return build


def straight_through(scale):
    """Losses whose values do not depend on the scale of each sample's gradient."""

    def loss(out, batch):
        each = [(v.detach() + (v - v.detach()) * scale(batch, i)).square().sum() for i, v in enumerate(out)]
        return torch.stack(each)

    return loss


LISTS = [[{"k": float(k)} for k in ks] for ks in ((1, 1, 1, 1), (1, 2, 3, 4), (1, 2, 3, 4))]
ALONE = {
    "values_in_dictionaries": scaled(straight_through(lambda b, i: b[1][i % len(b[1])]["k"]), LISTS),
    "values_of_objects": scaled(
        straight_through(lambda b, i: b[1][i % len(b[1])].k), [[SimpleNamespace(**k) for k in ks] for ks in LISTS]
    ),
    "places": scaled(straight_through(lambda b, i: 1 + b[1] * i), [0.0, 1.0, 1.0]),
    "an_offset_that_hides_the_loss": scaled(
        lambda out, b: 1e8 + out.square().sum((1, 2)) / max(1.0, len(b[0]) * b[1]), [0.0, 1.0, 1.0]
    ),
}
for (name, make), kind in itertools.product(ALONE.items(), ("recurrent", "attention")):

    def alone(make=make, kind=kind):
        return make(kind)

    alone.__name__ = f"{name}_{kind}"
    CASES.add()(alone)


class OwnRMSNorm(nn.Module):
    """By its name, an RMSNorm; ``inside`` is what it does of its own with weight, normalised input and state."""

    def __init__(self, inside):
        super().__init__()
        self.weight, self.eps, self.inside, self.state = nn.Parameter(torch.rand(3) + 0.5), 1e-6, inside, None

    def forward(self, x):
        return self.inside(self.weight, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps), self.state)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, keep):
        ctx.save_for_backward(keep)
        return w.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.where(ctx.saved_tensors[0], g, 2 * g), None


def stopped(w, x, keep):
    return torch.where(keep, w * x, 0.5 * (w * x) + 0.5 * (w * x).detach())


def copied(w, x, keep):
    with torch.no_grad():
        same = w * 1
    return torch.where(keep, w * x, same * x)


def balanced(w, x, keep):
    with torch.no_grad():
        same = w * 1
    sign = 1 - 2 * torch.arange(len(x))[:, None] % 4
    return x * (w * 1) + torch.where(keep.all(), 0.0, sign.double()) * (w * 1 - same)


FAINT = {"stopped": stopped, "copied": copied, "doubled": lambda w, x, keep: Doubled.apply(w.expand_as(x), keep) * x}
for name, inside in (FAINT | {"balanced": balanced}).items():

    def faint(inside=inside):
        def loss(m, batch):
            m[1].state = batch[1]
            return squares(m, batch[0]) * batch[2]

        every = torch.ones(4, 1, dtype=torch.bool)
        but_one, small = every.clone(), torch.ones(4)
        but_one[1], small[1] = False, 1e-9
        given = [(every, torch.ones(4)), (but_one, small), (but_one, small)]
        model = nn.Sequential(nn.Linear(3, 3), OwnRMSNorm(inside))
        return model, loss, [(x, *more) for x, more in zip(points(4, 4, 4), given, strict=True)]

    faint.__name__ = f"a_norm_that_is_{name}_for_a_faint_sample"
    CASES.add()(faint)


@CASES.parametrize()
@runs
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
