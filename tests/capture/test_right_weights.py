"""Weights that are reached in other ways than by their module's forward."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.right_or_refused import Cases, check, doubles, mlp, points, runs, squares  # noqa: F401

CASES = Cases()


class Reached(nn.Module):
    """Two layers, and something more that reaches a weight of the first."""

    def __init__(self, reach, keep=lambda m: None):
        super().__init__()
        self.l, self.h = nn.Linear(3, 3), nn.Linear(3, 2)
        self.kept, self.reach = keep(self), reach

    def forward(self, x):
        return self.h(torch.tanh(self.reach(self, torch.tanh(self.l(x)))))


@CASES.add()
def a_list():
    return Reached(lambda m, x: x @ m.kept[0], lambda m: [m.l.weight]), squares, points()


@CASES.add()
def a_list_used_alone():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(3, 3)
            self.ws = [self.l.weight, self.l.bias]

        def forward(self, x):
            return torch.tanh(F.linear(x, *self.ws))

    return Alone(), squares, points()


@CASES.add()
def a_dict_of_tuples():
    return (
        Reached(lambda m, x: x * m.kept["b"][0] + x @ m.kept["w"][0], lambda m: {"b": (m.l.bias,), "w": (m.l.weight,)}),
        squares,
        points(),
    )


@CASES.add()
def a_closure():
    def keep(m):
        w = m.l.weight
        return lambda x: x @ w.T

    return Reached(lambda m, x: m.kept(x), keep), squares, points()


@CASES.add()
def a_closure_in_the_loss():
    m = mlp()
    w = m[0].weight
    return m, lambda _, x: m(x).square().sum(1) + (x @ w.T).square().sum(1), points()


@CASES.add()
def a_partial():
    keep = lambda m: functools.partial(F.linear, weight=m.l.weight, bias=m.l.bias)  # noqa: E731
    return Reached(lambda m, x: m.kept(x), keep), squares, points()


@CASES.add()
def a_bound_method():
    return Reached(lambda m, x: m.kept(x), lambda m: m.l.forward), squares, points()


@CASES.add()
def a_stored_view():
    return Reached(lambda m, x: x @ m.kept, lambda m: m.l.weight.t()), squares, points()


@CASES.add()
def a_stored_slice():
    return Reached(lambda m, x: x * m.kept, lambda m: m.l.weight[0]), squares, points()


@CASES.add()
def a_stored_detached_view():
    return Reached(lambda m, x: x @ m.kept, lambda m: m.l.weight.detach().t()), squares, points()


@CASES.add()
def stored_data():
    return Reached(lambda m, x: x @ m.kept, lambda m: m.l.weight.data), squares, points()


@CASES.add()
def another_module_s_weight():
    return (
        Reached(lambda m, x: F.linear(x, m.l.weight[:, :3], m.h.bias.new_ones(3)) + m.h.bias.sum()),
        squares,
        points(),
    )


@CASES.add()
def a_module_in_a_plain_list():
    return Reached(lambda m, x: m.kept[0](x), lambda m: [m.l]), squares, points()


@CASES.add()
def weight_decay_inside_the_loss():
    return mlp(), lambda m, x: squares(m, x) + 0.1 * sum(p.square().sum() for p in m.parameters()), points()


@CASES.add()
def weight_decay_of_one_weight():
    return mlp(), lambda m, x: squares(m, x) + 0.1 * m[0].weight.norm(), points()


@CASES.add()
def weight_decay_scaled_by_the_sample():
    return mlp(), lambda m, x: squares(m, x) + x[:, 0] * m[2].weight.square().sum(), points()


@CASES.add()
def penalty_on_raw_parameters_alone():
    class Theta(nn.Module):
        def __init__(self):
            super().__init__()
            self.t = nn.Parameter(torch.randn(3))

    return Theta(), lambda m, x: (x - m.t).square().sum(1) + m.t.abs().sum(), points()


@CASES.add()
def tied_linears():
    m = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    m[2].weight = m[0].weight
    return m, squares, points()


@CASES.add()
def tied_transposed():
    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.b = nn.Linear(3, 2), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return F.linear(torch.tanh(self.l(x)), self.l.weight.t(), self.b) - x

    return Auto(), squares, points()


@CASES.add()
def stacked_experts():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.h = nn.ModuleList(nn.Linear(3, 4) for _ in range(3)), nn.Linear(4, 1)

        def forward(self, x):
            w = torch.stack([e.weight for e in self.e])
            return self.h(torch.tanh(torch.einsum("nd,eod->neo", x, w)).sum(1))

    return Stacked(), squares, points()


@CASES.add()
def hyper_network():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.g, self.h = nn.Linear(3, 6), nn.Linear(2, 1)

        def forward(self, x):
            return self.h(torch.tanh(torch.einsum("nod,nd->no", self.g(x).view(-1, 2, 3), x)))

    return Hyper(), squares, points()


@CASES.add()
def hyper_network_of_a_shared_code():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.code, self.g, self.h = nn.Parameter(torch.randn(1, 3)), nn.Linear(3, 6), nn.Linear(2, 1)

        def forward(self, x):
            return self.h(torch.tanh(x @ self.g(self.code).view(2, 3).T))

    return Hyper(), squares, points()


@CASES.add()
def functional_call_inside():
    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.s = nn.Linear(3, 2), nn.Parameter(torch.tensor(0.7))

        def forward(self, x):
            w = {k: self.s * p for k, p in self.l.named_parameters()}
            return torch.func.functional_call(self.l, w, (x,)) + self.l(x).square()

    return Call(), squares, points()


@CASES.add()
def weights_in_the_forward_of_a_loop():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.ws = nn.ParameterList(torch.randn(3, 3) for _ in range(3))

        def forward(self, x):
            for w in self.ws:
                x = torch.tanh(x @ w)
            return x

    return Loop(), squares, points()


@CASES.add()
def gradient_stopped_for_one_of_two_uses():
    return Reached(lambda m, x: m.l(x) + x @ m.l.weight.detach(), lambda m: None), squares, points()


@CASES.add()
def weight_used_out_of_a_no_grad_block():
    def reach(m, x):
        with torch.no_grad():
            scale = m.l.weight.norm()
        return m.l(x) / scale

    return Reached(reach), squares, points()


@CASES.add()
def two_names_and_depths():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.h = nn.Linear(3, 3), nn.Linear(3, 2)
            self.again = nn.ModuleDict({"deep": nn.Sequential(nn.Tanh(), self.a)})

        def forward(self, x):
            return self.h(self.again["deep"](self.a(x)))

    return Two(), squares, points()


@CASES.add()
def two_names_under_one_parent():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a
            self.r = nn.ParameterList([nn.Parameter(torch.randn(3))])
            self.s = self.r

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)) * self.s[0]) + self.r[0]

    return Two(), squares, points()


@CASES.add()
def two_names_of_recurrent_and_attention():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.g = nn.GRU(3, 4, batch_first=True)
            self.again = nn.ModuleDict({"g": self.g})
            self.m = nn.MultiheadAttention(4, 2, batch_first=True)
            self.n = self.m

        def forward(self, x):
            h = self.again["g"](x)[0]
            h = h + self.m(h, h, h)[0]
            return self.n(h, h, h)[0]

    return Two(), squares, [torch.randn(n, 5, 3) for n in (4, 4, 3, 1)]


@CASES.add()
def one_parameter_in_two_modules_of_raw():
    class Part(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.p = p

        def forward(self, x):
            return torch.tanh(x * self.p)

    p = nn.Parameter(torch.randn(3))
    return nn.Sequential(Part(p), Part(p), nn.Linear(3, 1)), squares, points()


class Whole(nn.Module):
    """A layer's weight read off by calling it on the identity, to make another one's: as DoRA does, and merged weights."""

    def __init__(self, use):
        super().__init__()
        self.l, self.h = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.scale, self.use = nn.Parameter(torch.rand(4) + 0.5), use

    def forward(self, x):
        return self.h(torch.tanh(self.use(self, x, self.l(torch.eye(4, dtype=x.dtype)).T)))


def whole(use):
    return Whole(use), squares, [torch.randn(n, 4) for n in (4, 4, 5, 1)]


@CASES.add()
def an_identity_for_a_norm_without_gradient():
    return whole(lambda m, x, w: m.l(x) * (m.scale / w.detach().norm(dim=1)))


@CASES.add()
def an_identity_for_a_norm():
    return whole(lambda m, x, w: m.l(x) * (m.scale / w.norm(dim=1)))


@CASES.add()
def an_identity_for_a_weight():
    return whole(lambda m, x, w: F.linear(x, w * m.scale))


@CASES.add()
def an_identity_for_a_weight_alone():
    return whole(lambda m, x, w: x @ (w + w.T) * m.scale)


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
