"""Which layers a sample reaches: routed experts, early exits, layers first reached later, calls for some samples alone."""

from __future__ import annotations

import torch
from torch import nn

from tests.capture.right_or_refused import Cases, check, doubles, mlp, points, runs, squares  # noqa: F401

CASES = Cases()
SIZES = (4, 4, 5, 3, 1)


class Route(nn.Module):
    """Tokens are sent to experts by a label."""

    def __init__(self, raw=False):
        super().__init__()
        self.e = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.r = nn.ParameterList(torch.randn(3) for _ in range(3)) if raw else None

    def forward(self, x, k):
        o = torch.zeros_like(x)
        for i, e in enumerate(self.e):
            h = e(x[k == i])
            o = o.index_put((k == i,), h if self.r is None else torch.tanh(h) * self.r[i])
        return o.flatten(1)


def routes(*kinds):
    return [(torch.randn(*k.shape, 3), k) for k in kinds]


@CASES.add()
def routing_balanced_at_first():
    even, odd = torch.tensor([[0, 0, 1, 1]] * 2), torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]])
    return Route(), squares, routes(even, odd, odd.flip(0), torch.randint(0, 3, (3, 4)), torch.tensor([[2, 2, 0, 1]]))


@CASES.add()
def routing_of_raw_experts():
    even, odd = torch.tensor([[0, 0, 1, 1]] * 2), torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]])
    return (
        Route(True),
        squares,
        routes(even, odd, odd.flip(0), torch.randint(0, 3, (3, 4)), torch.tensor([[2, 2, 0, 1]])),
    )


@CASES.add()
def routing_of_whole_samples():
    return (
        Route(),
        squares,
        routes(*(torch.arange(n) % 3 if n == 4 else torch.randint(0, 3, (n,)) for n in (4, 4, 5, 2, 1))),
    )


@CASES.add()
def routing_by_the_model_s_own_choice():
    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.g, self.e = nn.Linear(3, 3), nn.ModuleList(nn.Linear(3, 2) for _ in range(3))

        def forward(self, x):
            flat = x.flatten(0, 1)
            p, k = self.g(flat).softmax(-1).topk(2, -1)
            o = torch.zeros(len(flat), 2)
            for i, e in enumerate(self.e):
                row, slot = (k == i).nonzero(as_tuple=True)
                o = o.index_add(0, row, e(flat[row]) * p[row, slot, None])
            return o.view(*x.shape[:2], 2)

    return Choice(), squares, [torch.randn(n, 4, 3) for n in SIZES]


@CASES.add()
def a_layer_first_reached_later():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.r = nn.Linear(3, 2), nn.Linear(3, 2), nn.Parameter(torch.randn(3))

        def forward(self, x, late):
            y = self.a(x)
            return y + torch.tanh(self.b(x * self.r)) if late else y

    return Late(), squares, [(x, k in (1, 2, 4)) for k, x in enumerate(points())]


@CASES.add()
def a_layer_first_reached_later_by_some():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.r = nn.Linear(3, 2), nn.Linear(3, 2), nn.Parameter(torch.randn(3))

        def forward(self, x, k):
            y = self.a(x)
            if k.any():
                y = y.index_add(0, k.nonzero()[:, 0].flip(0), torch.tanh(self.b(x[k].flip(0) * self.r)))
            return y

    return Late(), squares, [(x, x[:, 0] > (9 if k == 0 else 0)) for k, x in enumerate(points())]


@CASES.add()
def early_exit_by_depth():
    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.ls = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

        def forward(self, x, depth):
            for l in self.ls[:depth]:  # noqa: E741
                x = torch.tanh(l(x))
            return x

    return Depth(), squares, [(x, d) for x, d in zip(points(), (1, 3, 2, 4, 3), strict=True)]


@CASES.add()
def one_call_for_each_sample():
    return mlp(), lambda m, x: torch.stack([m(v).square().sum() for v in x]), points()


@CASES.add()
def one_call_for_each_sample_backwards():
    return mlp(), lambda m, x: torch.stack([m(v[None]).square().sum() for v in x.flip(0)]).flip(0), points()


@CASES.add()
def calls_as_many_as_a_sample_asks():
    def loss(m, b):
        out = []
        for v, k in zip(*b, strict=True):
            h = v[None]
            for _ in range(int(k) + 1):
                h = torch.tanh(m(h))
            out.append(h.square().sum())
        return torch.stack(out)

    return nn.Linear(3, 3), loss, [(x, torch.randperm(len(x))) for x in points()]


@CASES.add()
def pairs_of_samples_in_one_call():
    def loss(m, x):
        return torch.cat([m(p).square().sum(1) for p in x.split(2)])

    return mlp(), loss, points()


@CASES.add()
def chunks_in_another_order():
    def loss(m, x):
        return torch.cat([m(p).square().sum(1) for p in x.split(2)[::-1]][::-1])

    return mlp(), loss, points()


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
