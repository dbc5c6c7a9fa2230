"""Batches that look as an audited one did, and do something else: with other numbers, constants, cuts and norms."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropinf
from tests.capture.right_or_refused import Cases, ScaledGradient, check, doubles, runs, squares  # noqa: F401

CASES = Cases()
D = 4


class Does(nn.Module):
    """Layers and raw parameters, and what a forward does with them: x, and what else the batch holds."""

    def __init__(self, does, **parts):
        super().__init__()
        self.does = does
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *batch):
        return self.does(self, *batch)


def points(*sizes):
    return [torch.randn(n, D, D) for n in sizes]


def then(*given, n=5):
    """Batches of n samples, each with one more value."""
    return [(x, value) for x, value in zip(points(*[n] * len(given)), given, strict=True)]


NUMBERS = {
    "flip": lambda x, k: x.flip(k),
    "roll": lambda x, k: x.roll(1, k),
    "cumsum": lambda x, k: x.cumsum(k),
    "picked": lambda x, k: torch.stack([x, x.flip(0)])[k],
}
for name, moves in NUMBERS.items():

    def numbers(moves=moves):
        model = Does(lambda m, x, k: moves(m.b(torch.tanh(m.a(moves(x.transpose(0, 1), k)))), k).transpose(0, 1))
        return model, squares, then(-1, -1, -2)

    numbers.__name__ = f"minus_one_and_minus_two_{name}"
    CASES.add(right=name != "cumsum")(numbers)  # which mixes samples


@CASES.add(right=False, says="samples . and . .of the 4 samples")
def a_softmax_over_samples_later():
    return Does(lambda m, x, k: m.b(m.a(x).softmax(k))), squares, [(x[:, 0], k) for x, k in then(-1, -2, n=4)]


def attention(m, x):
    k, v = m.a(x), m.b(x)
    return F.scaled_dot_product_attention(m.q.expand(1, -1, -1), k, v, attn_mask=m.mask)


@CASES.add()
def a_constant_mask_as_long_as_the_batch():
    model = Does(attention, q=nn.Parameter(torch.randn(3, D)), mask=nn.Buffer(torch.randn(3, D)))
    return model, squares, points(4, 3, 4)


WITH_A_CONSTANT = {
    "lerp": lambda m, x, c: torch.lerp(x, m.p, weight=c),
    "addcmul": lambda m, x, c: torch.addcmul(x, tensor1=m.p, tensor2=c),
    "where": lambda m, x, c: torch.where(condition=c > 0.5, input=x, other=m.p),
}
for name, op in WITH_A_CONSTANT.items():

    def by_name(op=op):
        model = Does(
            lambda m, x: m.b(op(m, m.a(x), m.c)), p=nn.Parameter(torch.randn(D)), c=nn.Buffer(torch.rand(D, D))
        )
        return model, squares, points(3, 8, D, 3)

    def by_branch(op=op):
        def does(m, x, k):
            return m.b(op(m, m.a(x), x.sigmoid() if k == 0 else m.c))

        model = Does(does, p=nn.Parameter(torch.randn(D)), c=nn.Buffer(torch.rand(D, D)))
        return model, squares, then(0, 1, n=D)

    by_name.__name__, by_branch.__name__ = f"a_constant_in_{name}", f"a_constant_in_place_of_data_in_{name}"
    CASES.add()(by_name)
    CASES.add()(by_branch)


@CASES.add()
def split_where_the_batch_says():
    def does(m, x, i):
        def part(z):
            return torch.tensor_split(torch.cat([z, z.flip(0)]), i)[1]

        return part(torch.tanh(m.a(part(x))))

    return Does(does), squares, then(torch.tensor([0, 6]), torch.tensor([0, 6]), torch.tensor([6, 12]), n=6)


class OwnRMSNorm(nn.Module):
    """By its name, an RMSNorm; ``factor``, ``index`` and ``gate`` change what it does."""

    def __init__(self, width=D, weight=1.0):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight * (1 + 0.3 * torch.randn(width))), 1e-6
        self.factor, self.gate, self.index = 1.0, 1.0, None

    def forward(self, x):
        weight = self.weight if self.index is None else self.weight[self.index]
        out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight * self.factor
        return out if self.gate == 1 else out * self.gate - (out * (self.gate - 1)).detach()


@CASES.add()
def a_norm_that_is_computed_again_in_backward():
    def does(m, x, factor):
        m.n.factor = factor
        order = x[:, 0, 0].argsort()
        y = checkpoint(lambda t: m.b(m.n(t)), m.a(x[order]), use_reentrant=True)
        return torch.zeros_like(y).index_copy(0, order, y)

    return Does(does, n=OwnRMSNorm()), squares, then(1.0, 1.0, 2.0)


for gates in ((1.0, 1.0, 2.0), (2.0, 2.0, 3.0)):  # none at first, and another

    def gated(gates=gates):
        def does(m, x, gate):
            m.n.gate = gate
            return m.b(m.n(m.a(x)))

        return Does(does, n=OwnRMSNorm()), squares, then(*gates)

    gated.__name__ = f"a_norm_with_another_gradient_after_{gates[0]:.0f}"
    CASES.add()(gated)


@CASES.add(layers=["c*"], skips=frozenset({"a.weight", "a.bias"}))
def a_flag_of_what_is_not_tracked():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x, k):
            h = self.a(x)
            return self.c(torch.tanh(h * k if self.a.weight.requires_grad and k else h))

    return Gated(), squares, then(0.0, 0.3, 0.5)


@CASES.add(layers=["c*"], skips=frozenset({"a.weight", "a.bias"}))
def a_flag_of_an_output():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x, k):
            h = torch.tanh(self.a(x))
            return self.c(h * k if not h.is_leaf else h)

    return Gated(), squares, then(1.0, 0.3, 0.5)


@CASES.add()
def weight_decay_of_what_is_trained_that_warms_up():
    model = Does(lambda m, x, _: m.b(m.n(m.a(x))), n=OwnRMSNorm())

    def loss(m, batch):
        decay = [batch[1] * p.square().sum() for p in m.parameters() if p.requires_grad and batch[1]]
        return squares(m, batch) + sum(decay)

    return model, loss, then(0.0, 0.1, 0.2)


class StoppingRMSNorm(OwnRMSNorm):
    """It gives no gradient where ``mask`` is not."""

    mask = None

    def forward(self, x):
        y = super().forward(x)
        return torch.where(self.mask, y, y.detach())


@CASES.add()
def a_norm_that_stops_gradients_of_padding():
    def does(m, x, mask):
        m.n.mask = mask
        return m.b(m.n(m.a(x)))

    every = torch.ones(D, 1, dtype=torch.bool)
    return Does(does, n=StoppingRMSNorm()), squares, then(every, torch.arange(D)[:, None] < 2, every)


@CASES.add()
def a_norm_with_a_hook_that_scales_later():
    class HookedRMSNorm(OwnRMSNorm):
        def forward(self, x):
            y = super().forward(x)
            y.register_hook(lambda g, k=self.factor_of_gradients: g * k)
            return y * 1.0

    def does(m, x, k):
        m.n.factor_of_gradients = k
        return m.b(m.n(m.a(x)))

    return Does(does, n=HookedRMSNorm()), squares, then(1.0, 0.5, 0.25)


class Scaling(OwnRMSNorm):
    """Where: its output, or its weight."""

    where, k = "output", 1.0

    def forward(self, x):
        if self.where == "output":
            return ScaledGradient.apply(super().forward(x), self.k)
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return ScaledGradient.apply(self.weight * 1.0, self.k) * n


class ScalingRMSNorm(Scaling):
    """By its name, one that is hooked; the other is followed through its ops."""


for kind, where in itertools.product((ScalingRMSNorm, Scaling), ("output", "weight")):

    def scaling(kind=kind, where=where):
        def does(m, x, k):
            m.n.k, m.n.where = k, where
            return m.b(m.n(m.a(x)))

        return Does(does, n=kind()), squares, then(1.0, 0.5, 0.25)

    scaling.__name__ = f"a_{kind.__name__}_whose_function_scales_gradients_of_its_{where}"
    CASES.add()(scaling)


class Decay(torch.autograd.Function):
    """Weight decay in a backward."""

    @staticmethod
    def forward(ctx, x, w, size):
        ctx.save_for_backward(w)
        ctx.size = size
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None if ctx.size == 0 else ctx.size * ctx.saved_tensors[0] * g.sum(), None


@CASES.add(right=False)  # whose sample a decay is, is in no row: g.sum() of all samples
def a_weight_of_a_norm_that_a_function_reads_later():
    return (
        Does(lambda m, x, k: m.b(Decay.apply(m.n(m.a(x)), m.n.weight, k)), n=OwnRMSNorm()),
        squares,
        then(0.0, 0.3, 0.5),
    )


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


def test_columns_that_are_not_kept_may_use_a_weight_that_is():
    torch.manual_seed(0)
    norm = OwnRMSNorm(8)
    compressor = dropinf.Compressor(nn.Sequential(norm), dropinf.Dropout(2), squares)
    kept = compressor.layers["0"].out_axis.index[0].tolist()
    first, second = torch.randn(2, 4, 8)
    compressor.compress([first])
    norm.index = torch.tensor([i if i in kept else kept[0] for i in range(8)])
    want = [torch.autograd.grad(squares(norm, x[None]).sum(), norm.weight)[0][kept] for x in second]
    torch.testing.assert_close(compressor.compress([second]).flat, torch.stack(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight", [1.0, 0.02, 1e-6])
def test_a_norm_with_small_weights_that_doubles(dtype, weight):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), OwnRMSNorm(6, weight), nn.Linear(6, 6)).to(dtype)

    def loss_fn(m, batch):
        m[1].factor = batch[1]
        return m(batch[0]).float().square().sum(1)

    batches = [(torch.randn(5, 6, dtype=dtype), factor) for factor in (1.0, 1.0, 2.0)]
    got = dropinf.Compressor(model, dropinf.Identity(), loss_fn).compress(batches)["1"][10:]
    want = torch.stack(
        [torch.autograd.grad(loss_fn(model, (x[None], 2.0)).sum(), model[1].weight)[0] for x in batches[2][0]]
    )
    assert float((got - want.float()).norm() / want.float().norm()) < (0.05 if dtype == torch.bfloat16 else 1e-4)
