"""What only Python knows, from one batch to the next: settings, forwards, parameters and hooks that come and go."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.right_or_refused import Cases, ScaledGradient, check, doubles, own, points, runs  # noqa: F401

CASES = Cases()


def numbered(*xs):
    """Batches with their number: 0, and then what is changed."""
    return [(x, float(k)) for k, x in enumerate(xs)]


@contextmanager
def set_to(thing, name, value):
    """An attribute inside, as it was afterwards."""
    before = thing.__dict__.get(name, thing)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if before is thing:
            delattr(thing, name)
        else:
            setattr(thing, name, before)


class GainedRMSNorm(nn.Module):
    def __init__(self, d, shift=0):
        super().__init__()
        self.weight, self.eps, self.gain, self.shift = nn.Parameter(torch.rand(d) + 0.5), 1e-6, 1.0, shift

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * (self.shift + self.weight) * self.gain


def gained(shift):
    def build():
        model = nn.Sequential(nn.Linear(3, 4), GainedRMSNorm(4, shift), nn.Linear(4, 2))

        def loss(m, b):
            with set_to(m[1], "gain", 1 + b[1]):
                return own(m(b[0]))

        return model, loss, numbered(*points(4, 4, 4))

    return build


for shift in (0, 1):
    build = gained(shift)
    build.__name__ = f"a_gain_beside_{shift}_plus_the_weight"
    CASES.add()(build)


@CASES.add()
def a_norm_that_clamps_what_is_large():
    class ClampedRMSNorm(GainedRMSNorm):
        def forward(self, x):
            return super().forward(x).clamp(-1.5, 1.5)

    small, large = torch.ones(4, 2) + 0.1 * torch.rand(4, 2), torch.randn(4, 2) * torch.tensor([1.0, 9.0])
    model = nn.Sequential(ClampedRMSNorm(2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.fill_(1)
    return model, lambda m, x: own(m(x)), [small, large, small, large]


@CASES.add()
def a_padding_that_comes_and_goes():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))

    def loss(m, b):
        with set_to(m[0], "padding_idx", 2 if b[1] else None):
            return own(m(b[0]))

    return model, loss, numbered(*[torch.tensor([[0, 2, 1], [2, 4, 2]])] * 3)


@CASES.add()
def a_stride_that_changes():
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 2, 1))

    def loss(m, b):
        with set_to(m[0], "stride", (1 + (b[1] > 0),)):
            return own(m(b[0]))

    return model, loss, numbered(*[torch.randn(4, 2, 9) for _ in range(3)])


def scaled(scale):
    return lambda self, x: F.linear(x, self.weight, self.bias) * scale


@CASES.add()
def a_forward_on_an_instance():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def loss(m, b):
        with set_to(m[0], "forward", scaled(1 + b[1]).__get__(m[0])):
            return own(m(b[0]))

    return model, loss, numbered(*points(4, 4, 4))


@CASES.add()
def a_forward_of_a_class():
    class Mine(nn.Linear):
        forward = nn.Linear.forward

    def loss(m, b):
        with set_to(Mine, "forward", scaled(1 + b[1]) if b[1] else nn.Linear.forward):
            return own(m(b[0]))

    return nn.Sequential(Mine(3, 4), nn.Tanh(), nn.Linear(4, 2)), loss, numbered(*points(4, 4, 4))


@CASES.add()
def other_parameters_by_a_functional_call():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    others = torch.randn(4, 3)

    def loss(m, b):
        return own(torch.func.functional_call(m, {"0.weight": others} if b[1] else {}, (b[0],)))

    return model, loss, numbered(*points(4, 4, 4))


@CASES.add()
def saved_tensors_that_lose_digits():
    def loss(m, b):
        def unpack(x):
            return x if not b[1] or isinstance(x, nn.Parameter) else x * 0.5

        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            return own(m(b[0]))

    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), loss, numbered(*points(4, 4, 4))


@CASES.add()
def a_hook_before_a_node():
    def loss(m, b):
        h = m[0](b[0])
        h.grad_fn.register_prehook(lambda gs: tuple(None if g is None else g * (1 + b[1]) for g in gs))
        return own(m[2](torch.tanh(h)))

    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), loss, numbered(*points(4, 4, 4))


@CASES.add()
def a_hook_behind_a_node():
    def loss(m, b):
        h = m[0](b[0])
        h.grad_fn.register_hook(lambda gs, _: tuple(None if g is None else g * (1 + b[1]) for g in gs))
        return own(m[2](torch.tanh(h)))

    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), loss, numbered(*points(4, 4, 4))


class Table(nn.Module):
    """Samples pick rows of a network's table by a product with one-hot ids."""

    def __init__(self):
        super().__init__()
        self.m, self.v = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.Linear(3, 2)
        self.register_buffer("rows", torch.randn(4, 3))

    def forward(self, x, ids):
        return self.v(x) * (F.one_hot(ids, 4).to(x) @ self.m(self.rows))


@CASES.add()
def a_table_as_long_as_the_batch():
    ids = [torch.arange(4)] * 2 + [torch.tensor([1, 0, 3, 2]), torch.tensor([3, 3, 0, 1])]
    return Table(), lambda m, b: own(m(*b)), list(zip(points(4, 4, 4, 4), ids, strict=True))


class Subclass(nn.Parameter):
    """A parameter of a class of its own."""


@CASES.add()
def a_function_on_a_parameter_of_a_class_of_its_own():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].weight = Subclass(model[0].weight.detach())

    def loss(m, b):
        return own(m(b[0])) + b[0].sum(1) * ScaledGradient.apply(m[0].weight, b[1]).sum()

    return model, loss, numbered(*points(4, 4, 4))


class Computed(nn.Linear):
    """A layer whose weight is another than the parameter of its name, once it has a ``size``."""

    size = None

    def computed(self):
        return self._parameters["weight"] * (1 + self.size)


class ByEveryName(Computed):
    def __getattribute__(self, name):
        computed = name == "weight" and self.size is not None
        return self.computed() if computed else super().__getattribute__(name)


class ByNamesThatAreNotFound(Computed):
    def __getattr__(self, name):
        computed = name == "weight" and self.size is not None
        return self.computed() if computed else super().__getattr__(name)


def by_property(*shape):
    class ByProperty(Computed):
        size = 0.0

    made = ByProperty(*shape)
    ByProperty.weight = property(Computed.computed)  # which the constructor refuses
    return made


for kind in (ByEveryName, ByNamesThatAreNotFound, by_property):

    def looked_up(kind=kind):
        model = nn.Sequential(kind(3, 4), nn.Tanh(), nn.Linear(4, 2))

        def loss(m, b):
            with set_to(m[0], "size", b[1]):
                return own(m(b[0]))

        return model, loss, numbered(*points(4, 4, 4))

    looked_up.__name__ = f"a_weight_that_is_computed_{kind.__name__}"
    CASES.add()(looked_up)


@CASES.parametrize()
@runs
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
