"""What looks like torch's own and is not: methods and functions that were replaced; and samples that differ alone."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from tests.capture.right_or_refused import Cases, check, doubles, own, points, runs, squares  # noqa: F401

CASES = Cases()
SIZES = 0.1, 10.0, 10.0  # of what is clamped: nothing at first


class Clamping(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.clamp(-3, 3), weight, bias)


class Masking(nn.Conv1d):
    mask = 1.0

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * self.mask, bias)


def sines(m, x):
    return m(x).flatten(1).sin().sum(1)


@CASES.add()
def a_convolution_that_clamps():
    return nn.Sequential(Clamping(3, 4, 2)), sines, [torch.randn(4, 3, 5, 5) * s for s in SIZES]


@CASES.add()
def a_convolution_that_masks_its_weight():
    def loss(m, batch):
        m[0].mask = batch[1]
        return sines(m, batch[0])

    masks = torch.ones(5, 3, 2), torch.rand(5, 3, 2).round(), torch.rand(5, 3, 2).round()
    return nn.Sequential(Masking(3, 5, 2)), loss, [(torch.randn(4, 3, 5), mask) for mask in masks]


@CASES.add()
def a_convolution_of_an_instance():
    def loss(m, batch):
        kind = nn.Conv1d._conv_forward
        m[0]._conv_forward = lambda x, weight, bias: kind(m[0], x, weight * batch[1], bias)
        try:
            return sines(m, batch[0])
        finally:
            del m[0]._conv_forward

    return nn.Sequential(nn.Conv1d(3, 5, 2)), loss, [(torch.randn(4, 3, 5), k) for k in (1.0, 2.0, 3.0)]


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


def by_hand(model, loss_fn, batches):
    """One backward a sample, with what is replaced in place."""
    rows = []
    for batch in batches:
        for n in range(len(batch[0])):
            found = torch.autograd.grad(loss_fn(model, batch)[n], list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def right_or_refused(model, loss_fn, batches):
    want = by_hand(model, loss_fn, batches)
    try:
        got = dropinf.Compressor(model, dropinf.Identity(), loss_fn).compress(batches)
    except ValueError:
        return
    torch.testing.assert_close(got.flat, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


STATE = SimpleNamespace(k=1.0)


def stateful(model, batch):
    STATE.k = batch[1]
    return model(batch[0]).flatten(1).sin().sum(1)


REPLACED = {
    "linear_forward": (nn.Linear, "forward", lambda m, x: F.linear(x * STATE.k, m.weight, m.bias)),
    "conv_forward": (nn.Conv1d, "forward", lambda m, x: m._conv_forward(x, m.weight * STATE.k, m.bias)),
    "conv_method": (
        nn.Conv1d, "_conv_forward", lambda _, x, weight, bias: torch.conv1d(x * STATE.k, weight, bias),
    ),
    "linear": (F, "linear", lambda x, w, b=None, old=F.linear: old(x * STATE.k, w, b)),
    "conv": (F, "conv1d", lambda x, w, b=None, *a, old=F.conv1d: old(x * STATE.k, w, b, *a)),
    "layer_norm": (F, "layer_norm", lambda x, *a, old=F.layer_norm, **k: old(x, *a, **k) * STATE.k),
    "rms_norm": (F, "rms_norm", lambda x, *a, old=F.rms_norm, **k: old(x, *a, **k) * STATE.k),
    "group_norm": (F, "group_norm", lambda x, *a, old=F.group_norm, **k: old(x, *a, **k) * STATE.k),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLACED)
def test_what_was_replaced_for_all(name, monkeypatch):
    monkeypatch.setattr(*REPLACED[name])
    torch.manual_seed(0)
    STATE.k = 1.0
    model = nn.Sequential(
        nn.Conv1d(3, 4, 2), nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.Linear(4, 2)
    )
    right_or_refused(model, stateful, [(torch.randn(4, 3, 5), k) for k in (1.0, 3.0, 3.0)])
