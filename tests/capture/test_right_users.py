"""Embeddings with options of their own, users' hooks on parameters, and random models."""

from __future__ import annotations

import itertools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from tests.capture.right_or_refused import (
    Cases,
    check,
    doubles,  # noqa: F401
    mlp,
    plain,
    points,
    runs,
    squares,
    worst,
)

CASES = Cases()


def tokens(*sizes):
    return [torch.randint(0, 5, (n, 6)) for n in sizes or (4, 4, 5, 3, 1)]


def embedded(**options):
    return nn.Sequential(nn.Embedding(5, 3, **options), nn.Linear(3, 2)), squares, tokens()


@CASES.add(right=False)
def scale_grad_by_freq():
    return embedded(scale_grad_by_freq=True)


@CASES.add(right=False)
def scale_grad_by_freq_of_a_function():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.l = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 1)

        def forward(self, i):
            return self.l(F.embedding(i, self.w, scale_grad_by_freq=True))

    return Own(), squares, tokens()


@CASES.add()
def padding_idx():
    return embedded(padding_idx=1)


@CASES.add()
def sparse():
    return embedded(sparse=True)


@CASES.add()
def sparse_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.f = nn.Embedding(5, 3, sparse=True), nn.Embedding(5, 3, sparse=True)
            self.f.weight = self.e.weight

        def forward(self, i):
            return torch.tanh(self.e(i)) * self.f(i.flip(1))

    return Tied(), squares, tokens()


@CASES.add(right=False)
def max_norm():
    return embedded(max_norm=0.5)


@CASES.add(right=False)
def max_norm_of_a_function():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.l = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 1)

        def forward(self, i):
            return self.l(F.embedding(i, self.w, max_norm=0.5))

    return Own(), squares, tokens()


@CASES.add()
def bags():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.l = nn.EmbeddingBag(5, 3, mode="mean"), nn.Linear(3, 2)

        def forward(self, i):
            return self.l(self.e(i))

    return Bag(), squares, tokens()


@CASES.add()
def bags_with_offsets():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.l = nn.EmbeddingBag(5, 3, mode="sum"), nn.Linear(3, 2)

        def forward(self, i, o):
            return self.l(torch.tanh(self.e(i, o)))

    return (
        Bag(),
        squares,
        [
            (torch.randint(0, 5, (n,)), torch.tensor(o))
            for n, o in ((8, [0, 2, 4, 6]), (8, [0, 1, 2, 7]), (4, [0, 2, 3]), (2, [0]))
        ],
    )


def hooked(hook, which=0, raw=False):
    def build():
        m = mlp()
        m[which].weight.register_hook(hook)
        return m, squares, points()

    return build


HOOKS = {
    "doubles": lambda g: 2 * g,
    "masks": lambda g: g * (torch.arange(g.shape[1]) % 2),
    "clamps": lambda g: g.clamp(-0.05, 0.05),
    "signs": lambda g: g.sign(),
    "normalizes": lambda g: g / g.norm().clamp_min(1e-9),
    "looks": lambda g: None,
}
for name, hook in HOOKS.items():
    build = hooked(hook)
    build.__name__ = f"weight_hook_{name}"
    CASES.add(right=name == "looks")(build)


@CASES.add(right=False)
def raw_parameter_hook_doubles():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.l = nn.Parameter(torch.randn(3)), nn.Linear(3, 1)
            self.w.register_hook(lambda g: 2 * g)

        def forward(self, x):
            return self.l(torch.tanh(x * self.w))

    return Raw(), squares, points()


def unhooked():
    return mlp(), squares, points()


@CASES.add(right=False, unhook=unhooked)
def post_accumulate_hook_steps():
    m = mlp()
    steps = {p: torch.optim.SGD([p], 0.1) for p in m.parameters()}

    def step(p):
        steps[p].step()
        steps[p].zero_grad()

    for p in m.parameters():
        p.register_post_accumulate_grad_hook(step)
    return m, squares, points()


@CASES.add(right=False, unhook=unhooked)
def post_accumulate_hook_writes_data():
    m = mlp()

    def step(p):
        p.data.sub_(p.grad)
        p.grad = None

    m[0].weight.register_post_accumulate_grad_hook(step)
    return m, squares, points()


ACCUMULATED = []  # nodes, which live as long as somebody holds them


@CASES.add(unhook=unhooked)
def hooks_where_gradients_are_accumulated():
    m, count = mlp(), itertools.count(1)
    for p in m.parameters():
        ACCUMULATED.append(torch.autograd.graph.get_gradient_edge(p).node)
        ACCUMULATED[-1].register_prehook(lambda gs: tuple(g * next(count) for g in gs))
    return m, squares, points()


@CASES.add(unhook=unhooked)
def gradients_of_the_user():
    m, batches = mlp(), points()
    for p in m.parameters():
        p.grad = torch.randn_like(p)
    return m, squares, batches


@CASES.add()
def generator_of_the_model_that_is_set_back():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.r = nn.Linear(3, 2), nn.Parameter(torch.randn(2))

        def forward(self, x):
            g = torch.Generator().manual_seed(3)
            return torch.tanh(self.l(x)) * torch.rand(len(x), 2, generator=g) * self.r

    return Noise(), squares, points()


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


class Noisy(nn.Module):
    """Draws numbers while it runs."""

    def __init__(self, draw, raw=False):
        super().__init__()
        self.a, self.b, self.draw = nn.Linear(3, 4), nn.Linear(4, 1), draw
        self.r = nn.Parameter(torch.randn(4)) if raw else None

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(self.draw(h if self.r is None else h * self.r))


def shuffled(own):
    def build(h):
        o = torch.randperm(len(h), generator=own())
        return h[o].sin()[o.argsort()] * (o[:, None] + 1)

    return build


def draws():
    own = torch.Generator().manual_seed(7)
    return {
        "dropout": lambda h: F.dropout(h, 0.5),
        "noise": lambda h: h + torch.randn_like(h),
        "depth": lambda h: h * (torch.rand(len(h), 1) > 0.5),
        "shared": lambda h: h * torch.rand(4),
        "shuffle": shuffled(lambda: None),
        "own_shuffle": shuffled(lambda: own),
        "own_noise": lambda h: h + torch.rand(h.shape, generator=own),
        "torchs_named": lambda h: h + torch.rand(h.shape, generator=torch.default_generator),
        "python": lambda h: h * random.random(),
    }


@runs
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", list(draws()))
def test_a_random_model_is_right_for_what_it_draws_first_or_refused(name, raw, sketch, backwards):
    def build():
        random.seed(5)
        return Noisy(draws()[name], raw).train(), squares, points()

    for b in (3, 4) if backwards else (0, 2):
        torch.manual_seed(11)
        model, loss_fn, batches = build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                compressor = dropinf.Compressor(model, sketch(), loss_fn)
                random.seed(5)
                torch.manual_seed(12)
                got = compressor.compress([batches[b]])
            except (ValueError, RuntimeError) as error:  # noqa: PT017, RUF100
                print(f"refused: {type(error).__name__}: {error}")
                assert "own" in name or name == "python", f"refused what is right: {error}"  # noqa: PT017
                assert "layer" in str(error) or "generator" in str(error), str(error)  # noqa: PT017
                continue
        wrong = worst(compressor, got, plain(build, [b]))
        assert not wrong, f"WRONG without an error: {wrong}"
