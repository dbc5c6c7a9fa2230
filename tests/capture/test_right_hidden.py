"""What neither a path of functions nor a tensor shows: other uses inside a module's own forward, containers, lists, copies."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import dropinf
from tests.capture.right_or_refused import Cases, check, doubles, later, mlp, own, points, runs  # noqa: F401

CASES = Cases()


class ScaleRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps, self.learns, self.beside = nn.Parameter(torch.rand(5) + 0.5), 1e-6, True, None

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        with torch.set_grad_enabled(self.learns):
            weight = self.weight * 1.0
        return x * weight


class BesideRMSNorm(ScaleRMSNorm):
    def forward(self, x):
        self.beside = self.weight.square().sum()
        return super().forward(x)


def normed(norm):
    return nn.Sequential(nn.Linear(3, 5), norm, nn.Linear(5, 2))


@CASES.add()
def a_norm_that_stops_to_learn():
    def loss(m, b):
        m[1].learns = b[1] == 0
        try:
            return own(m(b[0]))
        finally:
            m[1].learns = True

    return normed(ScaleRMSNorm()), loss, later()


@CASES.add(but=frozenset({"beside"}))
def a_norm_that_uses_its_weight_twice():
    return normed(BesideRMSNorm()), lambda m, b: own(m(b[0])) + b[1] * m[1].beside, later()


@CASES.add()
def a_hook_that_reads_the_weight_first():
    def loss(m, b):
        def before(module, args):
            return (args[0] + b[1] * module.weight.sum(),)

        handle = m[0].register_forward_pre_hook(before)
        try:
            return own(m(b[0]))
        finally:
            handle.remove()

    return mlp(5, 2), loss, later()


class Noise(TorchFunctionMode):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out + self.scale * args[1].sum() if function is F.linear else out


@CASES.add()
def a_mode_of_the_loss():
    def loss(m, b):
        with Noise(b[1]):
            return own(m(b[0]))

    return mlp(5, 2), loss, later()


class Gained(nn.Module):
    """A parametrization that reads the bias of its module."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.gain = [linear], 0.0

    def forward(self, weight):
        return weight * (1 + self.gain * self.linear[0].bias.sum())


@CASES.add()
def a_parametrization_that_reads_the_bias():
    def loss(m, b):
        m[0].parametrizations.weight[0].gain = b[1]
        try:
            return own(m(b[0]))
        finally:
            m[0].parametrizations.weight[0].gain = 0.0

    model = mlp(5, 2)
    parametrize.register_parametrization(model[0], "weight", Gained(model[0]), unsafe=True)
    return model, loss, later()


def reassigned(m, b):
    b["x"] = b["x"][:, ::2]
    return own(m(b["x"]))


def popped(m, b):
    return own(m(b.pop("x")))


def of_an_object(m, b):
    b.x = b.x[:, ::2]
    return own(m(b.x))


def of_an_object_in_place(m, b):
    b.x.mul_(b.scale)
    return own(m(b.x))


WRITES = {
    reassigned: lambda x, _: {"x": x},
    popped: lambda x, _: {"x": x},
    of_an_object: lambda x, _: SimpleNamespace(x=x),
    of_an_object_in_place: lambda x, k: SimpleNamespace(x=x, scale=1.0 if k == 0 else 0.5),
}
for loss, batch in WRITES.items():

    def written(loss=loss, batch=batch):
        return mlp(5, 2), loss, [batch(torch.randn(4, 4, 3), k) for k in range(3)]

    written.__name__ = f"a_batch_{loss.__name__}"
    CASES.add()(written)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 4)

    def forward(self, x):
        return self.b(self.a(x)[0][:, -1])


@CASES.add()
def strengths_in_a_list():
    def loss(m, b):
        return torch.stack([v * w + (v * (1 - w)).detach() for v, w in zip(own(m(b[0])), b[1], strict=False)])

    lists = [[1.0] * 4, [1.0, 0.5, 2.0, 3.0], [2.0, 1.0, 1.0, 0.5]]
    return Recurrent(), loss, list(zip([torch.randn(4, 3, 4) for _ in range(3)], lists, strict=True))


LOOKS = {
    "isin": lambda b: torch.isin(b[1], b[2]).double(),
    "bucketize": lambda b: torch.bucketize(b[1], b[2]).double(),
    "searchsorted": lambda b: torch.searchsorted(b[2], b[1]).double(),
}
for name, look in LOOKS.items():

    def looked(look=look):
        found = [torch.tensor([1, 2, 3, 4]), torch.tensor([2, 3, 3, 9])]
        others = [torch.tensor([11, 12, 13, 14]), torch.tensor([1, 2, 3, 9])]
        xs = [torch.randn(4, 3, 4) for _ in range(2)]
        return Recurrent(), lambda m, b: own(m(b[0])) * (1 + look(b)) + 5000, list(zip(xs, found, others, strict=True))

    looked.__name__ = f"values_found_among_all_by_{name}"
    CASES.add()(looked)


class Sides(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x, first):
        h = torch.tanh(self.a(x))
        return (h[0, ...] if first else h[..., 0]).sum(1)


@CASES.add()
def an_ellipsis_that_moves():
    return Sides(), lambda m, b: m(b[0], b[1] > 0), later([torch.randn(4, 4, 3) for _ in range(3)])


class Parameter(nn.Parameter):
    """No plain one."""


class Crossed(nn.Module):
    """Two layers, one of which gets pairs n by n and the other two by two."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
        for layer in (self.a, self.b):
            layer.weight, layer.bias = Parameter(layer.weight.data), Parameter(layer.bias.data)

    def forward(self, x, swap):
        first, second = (self.b, self.a) if swap else (self.a, self.b)
        h = torch.tanh(first(torch.cat([x, 2 * x])))
        k = torch.tanh(second(torch.stack([x, 2 * x], 1).flatten(0, 1)))
        return h.view(2, len(x), 4).sum((0, 2)) + k.view(len(x), 2, 4).sum((1, 2)) ** 2


@CASES.add()
def layers_that_change_places():
    return Crossed(), lambda m, b: m(b[0], b[1] > 0), later()


@CASES.add()
def data_written_behind_autograd():
    def loss(m, b):
        h = torch.tanh(m[0](b[0]))
        out = m[2](h)
        h.data.clamp_(-10 + 9.9 * b[1], 10 - 9.9 * b[1])
        return own(out)

    return mlp(5, 2), loss, later()


@CASES.add()
def a_copy_of_the_model_as_its_teacher():
    def loss(m, x):
        with torch.no_grad():
            scale = copy.deepcopy(m)(x).softmax(1)[:, 0]
        return own(m(x)) * scale + own(copy.deepcopy(m)(x)) * 0

    return mlp(5, 2), loss, points(4, 4, 4)


@CASES.parametrize()
@runs
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = mlp(5, 2)
        self.teacher = copy.deepcopy(self.m).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.m.parameters(), strict=True):
                old.mul_(0.9999).add_(new, alpha=0.0001)
        return self.m(x) - self.teacher(x)


def test_a_forward_that_writes_to_parameters_is_refused():
    compressor = dropinf.Compressor(Averaged(), dropinf.Dropout(2), lambda m, x: own(m(x)))
    with pytest.raises(ValueError, match=r"writes to its parameter teacher.0.weight"):
        compressor.compress(points(4, 4))


def test_weights_whose_storage_is_turned_between_batches():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    xs = points(4, 4)

    def batches():
        yield xs[0]
        model[0].weight.data = model[0].weight.data.t()
        yield xs[1]

    got = dropinf.Compressor(model, dropinf.Identity(), lambda m, x: own(m(x))).compress(batches())["2"][4:]
    want = [torch.autograd.grad(own(model(xs[1]))[n], model[2].weight)[0] for n in range(4)]
    assert torch.allclose(got.reshape(4, 2, 3), torch.stack(want), 1e-9, 1e-12)


@pytest.mark.parametrize("last", [2, 3, 4, 6])
def test_a_state_that_the_loss_keeps_elsewhere_is_refused(last):
    """A warm-up, counted in a closure: it ends before the batch is audited, or after."""
    runs = [0]

    def loss(m, x):
        runs[0] = min(runs[0] + 1, last)
        return own(m(x)) ** runs[0]

    with pytest.raises(dropinf.AttributionError, match=r"another run of the same batch|do not sum"):
        dropinf.Compressor(mlp(5, 2), dropinf.Dropout(2), loss).compress(points(4, 4))
