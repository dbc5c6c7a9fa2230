"""What looks like torch's own and is not: methods and functions that were replaced, and what asks behind its back."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import dropinf
from tests.capture.right_or_refused import Cases, check, doubles, own, points, runs, squares  # noqa: F401

transformers = pytest.importorskip("transformers.pytorch_utils")
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


class Decorated(nn.Conv1d):
    k = 1.0

    @torch.autocast("cpu", enabled=False)
    def _conv_forward(self, x, weight, bias):
        return nn.Conv1d._conv_forward(self, x, weight, bias) * self.k


class Wrapped(transformers.Conv1D):
    k = 1.0

    @functools.wraps(transformers.Conv1D.forward)
    def forward(self, x):
        return transformers.Conv1D.forward(self, x) * self.k


@CASES.add()
def a_convolution_under_a_decorator_of_torch():
    def loss(m, batch):
        m[0].k = batch[1]
        return sines(m, batch[0])

    model = nn.Sequential(Decorated(3, 4, 2), nn.Conv1d(4, 2, 1))
    return model, loss, [(torch.randn(4, 3, 5), k) for k in (1.0, 2.0, 3.0)]


@CASES.add()
def a_forward_by_the_name_of_another():
    def loss(m, batch):
        m[0].k = batch[1]
        return squares(m, batch[0])

    model = nn.Sequential(Wrapped(4, 3), nn.Tanh(), Wrapped(2, 4))
    return model, loss, [(torch.randn(4, 3), k) for k in (1.0, 2.0, 3.0)]


class Asking(torch.autograd.Function):
    """Its gradient depends on whether its weight is trained."""

    @staticmethod
    def forward(ctx, x, weight, k):
        ctx.save_for_backward(x, weight)
        ctx.k = k
        return x @ weight.t()

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        return g @ weight * (1 + ctx.k if trained else 1), (g.t() @ x if trained else None), None


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.a, self.d = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x, k):
        return self.d(torch.tanh(Asking.apply(torch.tanh(self.c(x)), self.a.weight, k)))


@CASES.add(layers=["c*"], skips=frozenset({"a.weight", "d.weight", "d.bias"}))
def a_function_that_asks_what_is_trained():
    return Asks(), lambda m, b: own(m(*b)), [(torch.randn(4, 3), k) for k in (0.0, 1.0, 2.0)]


@CASES.add()
def cuts_at_numbers_of_arrays():
    def loss(m, batch):
        h = m(batch[0])
        return own(torch.cat([h[a:e] for a, e in batch[1]]))

    orders = [0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]
    cuts = [[(np.array(i), np.array(i + 1)) for i in order] for order in orders]
    return (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        loss,
        list(zip(points(4, 4, 4), cuts, strict=True)),
    )


@CASES.add()
def what_is_saved_is_unpacked_to_something_else():
    def loss(m, batch):
        h = torch.tanh(m[0](batch[0]))
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t * (1 + batch[1] * (t.shape == (4, 4)))):
            return own(m[2](h))

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, loss, [(torch.randn(4, 3), k) for k in (0.0, 1.0, 2.0)]


class Renormalised(nn.Module):
    """A table whose rows a look-up shortens, read by the output layer too."""

    def __init__(self):
        super().__init__()
        self.e, self.l = nn.Embedding(6, 3, max_norm=0.8), nn.Linear(3, 3)

    def forward(self, ids):
        return torch.tanh(self.l(self.e(ids)).mean(1)) @ self.e.weight.t()


def read(m, ids):
    return F.cross_entropy(m(ids), ids[:, 0], reduction="none")


@CASES.add(right=False)
def a_table_that_look_ups_shorten():
    ids = [torch.tensor(x) for x in ([[0, 1, 2], [1, 2, 0]], [[3, 4, 3], [4, 3, 4]], [[5, 4, 0], [2, 3, 1]])]
    return Renormalised(), read, ids


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


def test_each_batch_finds_the_weights_that_look_ups_shorten():
    torch.manual_seed(0)
    model, first = Renormalised(), torch.tensor([[0, 1, 2], [1, 2, 0]])
    compressor = dropinf.Compressor(model, dropinf.Identity(), read)
    alone = compressor.compress([torch.tensor([[3, 4, 3], [4, 3, 4]])])
    behind = compressor.compress([first, torch.tensor([[3, 4, 3], [4, 3, 4]])])[2:]
    torch.testing.assert_close(behind.flat, alone.flat, rtol=0, atol=0)


def test_each_batch_finds_the_tensors_that_modules_hold():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    model.scale = torch.zeros(1)

    def loss_fn(m, x):
        if m.scale.item() == 0:
            m.scale.copy_(x.abs().mean()[None])
        return own(m(x / m.scale))

    x, y = torch.randn(2, 4, 3)
    compressor = dropinf.Compressor(model, dropinf.Identity(), loss_fn)
    assert torch.equal(compressor.compress([x, y])[4:].flat, compressor.compress([y]).flat)
    assert model.scale.item() == 0


def test_a_batch_that_does_something_else_each_time_ends():
    def loss_fn(m, batch, old=F.layer_norm):
        F.layer_norm = functools.partial(lambda f, k, *a, **kw: f(*a, **kw) * k, old, 1 + batch[1])
        try:
            return own(m(batch[0]))
        finally:
            F.layer_norm = old

    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    right_or_refused(model, loss_fn, [(torch.randn(4, 3), k) for k in (0.0, 1.0, 2.0)])


class Mode(TorchFunctionMode):
    """It scales what linear layers give."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * STATE.k if function is F.linear else result


def test_a_mode_around_all():
    torch.manual_seed(0)
    STATE.k = 1.0
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with Mode():
        right_or_refused(model, stateful, [(torch.randn(4, 3), k) for k in (1.0, 3.0, 3.0)])


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
    "linear_partial": (F, "linear", functools.partial(lambda old, x, w, b=None: old(x * STATE.k, w, b), F.linear)),
    "linear_decorated": (F, "linear", torch.enable_grad()(lambda x, w, b=None, old=F.linear: old(x * STATE.k, w, b))),
    "torch_layer_norm": (torch, "layer_norm", lambda x, *a, old=torch.layer_norm, **k: old(x, *a, **k) * STATE.k),
    "namespace": (
        torch.nn.modules.linear, "F", SimpleNamespace(linear=lambda x, w, b=None: F.linear(x * STATE.k, w, b)),
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


def test_what_is_replaced_inside_a_loss():
    def loss_fn(model, batch, old=F.linear):
        F.linear = lambda *given: old(*given) * batch[1]
        try:
            return sines(model, batch[0])
        finally:
            F.linear = old

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    right_or_refused(model, loss_fn, [(torch.randn(4, 3), k) for k in (1.0, 3.0, 3.0)])


REACHES = {
    "numpy": lambda y, k: y.detach().numpy().__imul__(k),
    "dlpack": lambda y, k: torch.from_dlpack(y.detach()).mul_(k),
    "array": lambda y, k: np.asarray(y.detach()).__imul__(k),
    "set": lambda y, k: torch.empty(0, dtype=y.dtype).set_(y.detach()).mul_(k),
    "storage": lambda y, k: y.untyped_storage().copy_((y.detach() * k).untyped_storage()),
}


@pytest.mark.parametrize("by", REACHES)
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 2), lambda: nn.LayerNorm(4)], ids=["linear", "norm"])
def test_a_buffer_that_is_used_again_behind_autograd(by, make):
    def loss_fn(m, batch):
        y = torch.tanh(m[0](batch[0]))
        z = m[2](y)
        REACHES[by](y, batch[1])
        return own(z)

    torch.manual_seed(0)
    right_or_refused(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), make()), loss_fn, [(torch.randn(4, 3), k) for k in (1.0, 2.0, 3.0)]
    )


ASKS = {
    "retain_grad": lambda h: h.retain_grad(),
    "numpy": lambda h: h.numpy(),
    "deepcopy": copy.deepcopy,
    "repr": lambda h: 1 / ("grad_fn" not in repr(h)),
    "tree": lambda h: 1 / (not any(tree_map(operator.attrgetter("requires_grad"), [h]))),
}


@pytest.mark.parametrize("by", ASKS)
def test_whoever_asks_what_is_trained(by):
    """A hooked model freezes what is not tracked, so that it would take another branch than its user's."""

    def loss_fn(m, batch):
        h = m[0](batch[0])
        with contextlib.suppress(Exception):
            ASKS[by](h)
            return own(m[2](torch.tanh(h)))
        return own(m[2](torch.tanh(h * batch[1])))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batches = [(torch.randn(4, 3), k) for k in (1.0, 2.0, 3.0)]
    want = [torch.autograd.grad(loss_fn(model, b)[n], list(model[2].parameters())) for b in batches for n in range(4)]
    try:
        got = dropinf.Compressor(model, dropinf.Identity(), loss_fn, layers=["2*"]).compress(batches)
    except ValueError:
        return
    torch.testing.assert_close(got.flat, torch.stack([torch.cat([g.flatten() for g in gs]) for gs in want]))
