"""What single samples do not show, and what a parameter goes through: at rest, or faint, in the first batch."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropinf
from tests.capture.right_or_refused import Cases, check, doubles, own, points, runs  # noqa: F401

CASES = Cases()
N = D = 4


class Does(nn.Module):
    """A linear layer, a raw parameter of some shape, and what a forward does with them."""

    def __init__(self, does, *shape):
        super().__init__()
        self.does, self.l, self.w = does, nn.Linear(D, D), nn.Parameter(torch.randn(*shape) * 0.5)

    def forward(self, *batch):
        return self.does(self, *batch)


def then(*given, tokens=N, n=N):
    return [(torch.randn(n, tokens, D), *more) for more in given]


def times(resting):
    """A tensor as long as the batch that all samples share, the same throughout at first."""
    return then(*((x,) for x in (resting, torch.rand_like(resting), torch.rand_like(resting))))


SHARED = {
    "einsum": ((D, 5), torch.ones(N), lambda m, x, t: own(torch.einsum("ntd,t,de->nte", m.l(x), t, m.w))),
    "addcmul": ((D,), torch.ones(N, 1), lambda m, x, t: own(torch.addcmul(m.l(x), t, m.w))),
    "lerp": ((D,), torch.full((N, 1), 0.5), lambda m, x, t: own(torch.lerp(m.l(x), m.w, t))),
    "attention": (
        (N, D),
        torch.zeros(N, N),
        lambda m, x, t: own(F.scaled_dot_product_attention(m.l(x), m.w[None], m.w[None], attn_mask=t)),
    ),
}
for name, (shape, resting, does) in SHARED.items():

    def shared(shape=shape, resting=resting, does=does):
        return Does(does, *shape), lambda m, b: m(*b), times(resting.double())

    shared.__name__ = f"what_all_share_as_long_as_the_batch_{name}"
    CASES.add()(shared)


BLOCKS = {
    "gain": ((D,), lambda m, h: torch.tanh(h * m.w.exp())),
    "gate": ((D, D), lambda m, h: F.silu(F.linear(h, m.w)) * h),
    "product": ((D, D), lambda m, h: (h @ m.w).softmax(-1) * h),
}
for name, (shape, block) in BLOCKS.items():
    for faint in (1e-7, 1.0):

        def checkpointed(shape=shape, block=block, faint=faint):
            def does(m, x, c):
                h = m.l(x)
                again = checkpoint(lambda h: block(m, h), h, use_reentrant=False)
                return block(m, h).square().sum((1, 2)) + c * again.sum((1, 2))

            return Does(does, *shape), lambda m, b: m(*b), then((faint,), (1.0,), (0.5,))

        checkpointed.__name__ = f"a_checkpoint_around_a_parameter_{name}_{faint}"
        CASES.add()(checkpointed)


class Scale(torch.autograd.Function):
    """A view of what it is given, whose gradient is scaled."""

    @staticmethod
    def forward(ctx, w, k):
        ctx.k = k
        return w.view_as(w)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.k, None


class Estimator(torch.autograd.Function):
    """A rounded weight, whose backward is no linear function of its gradient."""

    @staticmethod
    def forward(ctx, w, k):
        q = (w * 4).round() / 4
        ctx.save_for_backward(w - q)
        ctx.k = k
        return q

    @staticmethod
    def backward(ctx, g):
        return g * (1 + ctx.k * g.sign() * ctx.saved_tensors[0]), None


def hooked(w, k):
    w.register_hook(lambda g: g * (1 + k))
    return w


def recurrent(m, x, k):
    w, h = Estimator.apply(m.w, k), x.new_zeros(len(x), D)
    for t in range(x.shape[1]):
        h = torch.tanh(m.l(x[:, t]) + F.linear(h, w))
    return h.square().sum(1)


def clipped(w):
    w.register_hook(lambda g: g.clamp(-1, 1))
    return w


NUMBERS = [torch.tensor(x) for x in ([0, 0, 0, 0], [0, 1, 2, 1], [2, 1, 0, 0])]  # alike at first
GRAPHS = [torch.eye(N), torch.rand(N, N, generator=torch.Generator().manual_seed(1)), torch.ones(N, N)]


def zeroed(m):
    nn.init.zeros_(m.w)
    return m


def numpys(does, *shape):
    model = Does(does, *shape)
    return model, lambda m, b: m(*b).flatten(1).square().sum(1), [(torch.randn(N, D), i.numpy()) for i in NUMBERS]


LOOKS = {
    "rows_of_numpy": ((3, D), lambda m, x, k: m.l(x) * m.w[torch.from_numpy(k), :]),
    "tables_of_numpy": ((3, D, D), lambda m, x, k: torch.einsum("ni,nio->no", m.l(x), m.w[torch.from_numpy(k)])),
    "computed_of_numpy": ((3, D), lambda m, x, k: m.l(x) * torch.tanh(m.w)[torch.from_numpy(k)]),
    "embedding_of_numpy": ((3, D), lambda m, x, k: m.l(x) * F.embedding(torch.from_numpy(k), m.w.exp())),
}
for name, (shape, does) in LOOKS.items():

    def looked_up(shape=shape, does=does):
        return numpys(does, *shape)

    looked_up.__name__ = f"numbers_that_nobody_marked_{name}"
    CASES.add()(looked_up)


@CASES.add()
def a_graph_that_has_no_edges_at_first():
    def does(m, x, a):
        return (m.l(x) + torch.einsum("nm,mi,io->no", a, x, m.w) + 1).square().sum(1)

    return zeroed(Does(does, D, D)), lambda m, b: m(*b), [(torch.randn(N, D), a.double()) for a in GRAPHS]


@CASES.add()
def a_look_up_of_two_numbers():
    def does(m, x, a, z):
        return own(m.l(x) * m.w[a, z, None])

    pairs = [(torch.randint(0, 5, (N, N)), z) for z in NUMBERS]
    return Does(does, 5, 3), lambda m, b: m(*b), then(*pairs)


@CASES.add()
def a_mask_beside_what_is_infinite():
    def does(m, x, z):
        far = F.pad(m.l(x), (0, 1), value=-float("inf"))
        return (torch.addcmul(far, m.w, z).softmax(-1) + 1).square().sum((1, 2))

    masks = [(z,) for z in (torch.ones(N, D + 1), *torch.rand(2, N, D + 1).round())]
    return Does(does, D + 1), lambda m, b: m(*b), then(*masks)


VIEWS = {
    "function_on_a_gain": ((D,), lambda m, x, k: own(m.l(x) * Scale.apply(m.w, 1 + k))),
    "function_on_a_position": ((N, D), lambda m, x, k: own(m.l(x) + Scale.apply(m.w, 1 + k))),
    "function_on_a_matrix": ((D, D), lambda m, x, k: own(m.l(x) @ Scale.apply(m.w, 1 + k))),
    "hook_on_a_view": ((D, D), lambda m, x, k: own(m.l(x) @ hooked(m.w.t(), k))),
    "hook_on_a_copy": ((D, D), lambda m, x, k: (0.001 + 5 * k) * own(m.l(x) @ clipped(m.w.clone()))),
    "estimator_used_again": ((D, D), recurrent),
}
for name, (shape, does) in VIEWS.items():

    def viewed(shape=shape, does=does):
        return Does(does, *shape), lambda m, b: m(*b), then((0.0,), (0.5,), (0.7,))

    viewed.__name__ = f"between_a_parameter_and_its_use_{name}"
    CASES.add(right=False)(viewed)


@CASES.add()
def a_source_that_goes_on_where_the_sample_before_ended():
    def does(m, x, mask, c):
        h = m.l(x)
        return own(h * m.w[:D]) + c * own(h.masked_scatter(mask, m.w))

    masks = [(torch.rand(N, N, D) > 0.8, c) for c in (1e-9, 1.0, 0.5)]
    return Does(does, N * N * D), lambda m, b: m(*b), then(*masks)


@CASES.parametrize()
@runs
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


def kept_in(place):
    """A tensor, and what holds it."""
    tensor = torch.zeros(D)
    places = {
        "list": lambda: [tensor],
        "nested": lambda: {"a": [(tensor,)]},
        "ordered": lambda: OrderedDict(a=tensor),
        "default": lambda: defaultdict(list, a=[tensor]),
        "namespace": lambda: SimpleNamespace(a=tensor),
        "module": lambda: [nn.ParameterList([nn.Parameter(tensor, requires_grad=False)])],
    }
    return tensor, places[place]()


@pytest.mark.parametrize("place", ["list", "nested", "ordered", "default", "namespace", "module"])
def test_each_batch_finds_the_tensors_in_what_modules_hold(place):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D))
    state, model.bank = kept_in(place)

    def loss_fn(m, batch):
        x, momentum = batch
        y = m(x)
        with torch.no_grad():
            state.lerp_(y.mean(0), momentum)
        return (y - state).square().sum(1)

    batches = [(x, k) for x, k in zip(torch.randn(3, N, D), (0.0, 0.1, 0.1), strict=True)]
    compressor = dropinf.Compressor(model, dropinf.Identity(), loss_fn)
    together = compressor.compress(batches)
    assert not state.any()
    alone = torch.cat([compressor.compress([batch]).flat for batch in batches])
    torch.testing.assert_close(together.flat, alone, rtol=1e-12, atol=1e-12)


def test_counts_in_modules_are_put_back():
    model = nn.Sequential(nn.Linear(D, D))
    model.counts = Counter(), OrderedDict(a=[0])

    def loss_fn(m, x):
        m.counts[0]["calls"] += 1
        m.counts[1]["a"].append(1)
        return own(m(x)) * m.counts[0]["calls"] * len(m.counts[1]["a"])

    x = torch.randn(2, N, D)
    compressor = dropinf.Compressor(model, dropinf.Identity(), loss_fn)
    first, second = compressor.compress([x[0]]).flat, compressor.compress([x[1]]).flat
    torch.testing.assert_close(compressor.compress(list(x)).flat, torch.cat([first, second]), rtol=1e-12, atol=1e-12)
    assert model.counts == (Counter(), OrderedDict(a=[0]))
