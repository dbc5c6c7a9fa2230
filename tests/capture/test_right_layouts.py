"""Whose row is it: orders, views and shapes that change from batch to batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.right_or_refused import Cases, check, doubles, mlp, points, runs, squares  # noqa: F401

CASES = Cases()
SIZES = (4, 4, 5, 3, 1)


class Around(nn.Module):
    """Two layers and a raw parameter, with something done to the rows before and after them."""

    def __init__(self, there, back, raw=True):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.r = nn.Parameter(torch.randn(4)) if raw else None
        self.there, self.back = there, back

    def forward(self, x, *more):
        h = torch.tanh(self.a(self.there(x, *more)))
        return self.back(self.b(h if self.r is None else h * self.r), *more)


def labelled(label, sizes=SIZES, shape=(3,)):
    return [(torch.randn(n, *shape), label(n, k)) for k, n in enumerate(sizes)]


def permutation(n, k):
    return torch.arange(n) if k == 0 else torch.randperm(n)


def parity_kept(n, k):
    """An order that keeps even samples at even places."""
    return torch.arange(n).roll(2) if n % 2 == 0 else torch.arange(n).flip(0)


ORDERS = {
    "sorted": (lambda x, o: x[o], lambda y, o: y[o.argsort()], permutation),
    "sorted_parity": (lambda x, o: x[o], lambda y, o: y[o.argsort()], parity_kept),
    "permutation_matrix": (lambda x, o: torch.eye(len(x))[o] @ x, lambda y, o: torch.eye(len(y))[o].T @ y, permutation),
    "unbound": (lambda x, o: torch.stack([x.unbind()[i] for i in o]), lambda y, o: torch.stack([y.unbind()[i] for i in o.argsort()]), permutation),
    "flipped": (lambda x, o: x.flip(0), lambda y, o: y.flip(0), permutation),
    "flipped_by_turns": (lambda x, o: x.flip(0) if o[0] == 0 else x, lambda y, o: y.flip(0) if o[0] == 0 else y, permutation),
    "rolled": (lambda x, o: x.roll(int(o[0]), 0), lambda y, o: y.roll(-int(o[0]), 0), permutation),
    "rolled_by_two": (lambda x, o: x.roll(2, 0), lambda y, o: y.roll(-2, 0), permutation),
    "scattered": (lambda x, o: torch.zeros_like(x).index_copy(0, o, x), lambda y, o: y[o], permutation),
    "gathered": (lambda x, o: x.gather(0, o[:, None].expand_as(x)), lambda y, o: torch.zeros_like(y).index_add(0, o, y), permutation),
    "halves_swapped": (lambda x, o: torch.cat([x[len(x) // 2 :], x[: len(x) // 2]]), lambda y, o: torch.cat([y[(len(y) + 1) // 2 :], y[: (len(y) + 1) // 2]]), permutation),
    "evens_then_odds": (lambda x, o: torch.cat([x[::2], x[1::2]]), lambda y, o: torch.stack([y[: (len(y) + 1) // 2], F.pad(y[(len(y) + 1) // 2 :], (0, 0, 0, len(y) % 2))], 1).flatten(0, 1)[: len(y)], permutation),
    "twice": (lambda x, o: torch.cat([x, x.flip(1)]), lambda y, o: torch.cat(y.chunk(2), 1), permutation),
    "twice_reversed": (lambda x, o: torch.cat([x, x.flip(0)]), lambda y, o: y[: len(o)] + y[len(o) :].flip(0).square(), permutation),
    "repeated": (lambda x, o: x.repeat_interleave(3, 0) * torch.arange(1, 3 * len(x) + 1)[:, None], lambda y, o: y.view(-1, 6), permutation),
    "repeated_by_the_label": (lambda x, o: x.repeat_interleave(o + 1, 0), lambda y, o: torch.stack([c.square().sum(0) for c in y.split((o + 1).tolist())]), permutation),
    "unique": (lambda x, o: x[torch.unique(o, return_inverse=True)[1]], lambda y, o: y, permutation),
    "some_dropped": (lambda x, o: x[o > 0], lambda y, o: torch.zeros(len(o), 2).index_put((o.gt(0).nonzero()[:, 0],), y), permutation),
    "padded": (lambda x, o: F.pad(x, (0, 0, 1, 2)), lambda y, o: y[1:-2], permutation),
    "extra_dimension": (lambda x, o: x[None], lambda y, o: y[0], permutation),
    "columns": (lambda x, o: x.view(1, len(x), 1, 3), lambda y, o: y.view(len(o), 2), permutation),
    "in_python": (lambda x, o: x[o.tolist()], lambda y, o: torch.stack([y[o.tolist().index(i)] for i in range(len(o))]), permutation),
}  # fmt: skip
for name, (there, back, label) in ORDERS.items():
    for raw in (False, True):

        def order(there=there, back=back, label=label, raw=raw):
            return Around(there, back, raw), squares, labelled(label)

        order.__name__ = f"{name}_raw" if raw else name
        CASES.add()(order)


TIMES = {
    "time_first": (lambda x, o: x.transpose(0, 1), lambda y, o: y.transpose(0, 1)),
    "time_first_flipped": (lambda x, o: x.transpose(0, 1).flip(0, 1), lambda y, o: y.flip(0, 1).transpose(0, 1)),
    "flat": (lambda x, o: x.flatten(0, 1), lambda y, o: y.unflatten(0, (len(o), -1))),
    "flat_time_first": (lambda x, o: x.transpose(0, 1).flatten(0, 1), lambda y, o: y.unflatten(0, (-1, len(o))).transpose(0, 1)),
    "masked": (lambda x, o: x[x[..., 0] > 0], lambda y, o: y),
    "time_sorted": (lambda x, o: x[o].flatten(0, 1), lambda y, o: y.unflatten(0, (len(o), -1))[o.argsort()]),
    "windows": (lambda x, o: x.roll(1, 1).unflatten(1, (2, 2)).flatten(0, 1), lambda y, o: y.unflatten(0, (len(o), 2)).flatten(1, 2).roll(-1, 1)),
    "one_position": (lambda x, o: x[:, -1], lambda y, o: y),
    "position_by_label": (lambda x, o: x[torch.arange(len(o)), o % 4], lambda y, o: y),
}  # fmt: skip
for name, (there, back) in TIMES.items():
    if name == "masked":

        def back(y, o):
            return y

    for steps in (4, 5) if name in ("flat", "time_first", "flat_time_first") else (4,):

        def times(there=there, back=back, steps=steps, name=name):
            batches = labelled(permutation, shape=(steps, 3))
            if name != "masked":
                return Around(there, back), squares, batches
            m = Around(there, back)

            def loss(m, b):
                x, o = b
                owner = torch.arange(len(x))[:, None].expand(len(x), steps)[x[..., 0] > 0]
                return torch.zeros(len(x)).index_add(0, owner, m(x, o).square().sum(1))

            return m, loss, batches

        times.__name__ = f"{name}_of_{steps}"
        CASES.add()(times)


@CASES.add()
def two_views_half_a_batch_apart():
    def loss(m, x):
        a, b = m(torch.cat([x, x.flip(1)])).chunk(2)
        return (a - b).square().sum(1) + a[:, 0]

    return mlp(last=2), loss, points()


@CASES.add(right=False)
def two_views_given_as_one_batch():
    def loss(m, x):
        a, b = torch.tanh(m(x)).chunk(2)
        return (a - b).square().sum(1) + a[:, 0]

    return mlp(last=2), loss, points(8, 8, 10, 6, 2)


@CASES.add(right=False)
def two_views_interleaved():
    def loss(m, x):
        y = torch.tanh(m(x)).view(-1, 2, 2)
        return (y[:, 0] - y[:, 1]).square().sum(1) + y[:, 0, 0]

    return mlp(last=2), loss, points(8, 8, 10, 6, 2)


@CASES.add(right=False)
def two_views_of_raw_parameters():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return torch.tanh(x @ self.w)

    def loss(m, x):
        a, b = m(x).chunk(2)
        return (a - b).square().sum(1) + a[:, 0]

    return Raw(), loss, points(8, 8, 10, 6, 2)


def triplets(m, b):
    a, p, n = torch.tanh(m(torch.cat(b))).chunk(3)
    return F.relu((a - p).square().sum(1) - (a - n).square().sum(1) + 1e-6)


@CASES.add()
def triplets_at_rest_in_the_first_batch():
    x = torch.randn(4, 3)
    return mlp(), triplets, [(x, x, -x), (x, -x, x + 0.1), (x[:3], -x[:3], x[:3] + 0.1), (x[:1], -x[:1], x[:1])]


@CASES.add()
def hinge_at_rest_in_the_first_batch():
    def loss(m, b):
        return F.relu(m(b[0])[:, 0] * b[1])

    m = mlp()
    xs = points(4, 4, 3, 1)
    return m, loss, [(x, (-1.0 if k == 0 else 1.0) * m(x)[:, 0].detach()) for k, x in enumerate(xs)]


@CASES.add()
def hinge_at_rest_for_all_but_one():
    def loss(m, b):
        return F.relu(m(b[0][b[1]])[b[1].argsort(), 0] * b[2])

    xs = points(4, 4, 4, 1)
    return (
        mlp(),
        loss,
        [(x, permutation(len(x), k), F.one_hot(torch.tensor(k % len(x)), len(x)).double()) for k, x in enumerate(xs)],
    )


@CASES.add()
def zero_weights_of_samples():
    return (
        mlp(),
        lambda m, b: squares(m, b[0]) * b[1],
        [(x, torch.zeros(len(x)) if k == 0 else (x[:, 0] > 0).double()) for k, x in enumerate(points())],
    )


class Positions(nn.Module):
    """An embedding of positions that are shared by the batch, or each sample's own."""

    def __init__(self):
        super().__init__()
        self.e, self.p, self.h = nn.Embedding(7, 3), nn.Embedding(8, 3), nn.Linear(3, 2)

    def forward(self, x, p=None):
        p = torch.arange(x.shape[1])[None] if p is None else p
        return self.h(torch.tanh(self.e(x) + self.p(p)))


def tokens(n, t=4):
    return torch.randint(0, 7, (n, t))


@CASES.add()
def positions_shared_then_each():
    own = lambda n: (tokens(n), torch.randint(0, 8, (n, 4)))  # noqa: E731
    return Positions(), squares, [(tokens(4),), own(4), (tokens(3),), own(3), own(1), (tokens(1),)]


@CASES.add(right=False)  # as many positions as samples in the first batch look like samples
def positions_of_one_row_of_a_batch():
    row = lambda: torch.randint(0, 8, (1, 4))  # noqa: E731
    return (
        Positions(),
        squares,
        [
            (tokens(4), row()),
            (tokens(4), torch.randint(0, 8, (4,))),
            (tokens(4), torch.randint(0, 8, (4, 4))),
            (tokens(4), torch.randint(0, 8, (4, 1))),
            (tokens(1), row()),
        ],
    )


@CASES.add()
def as_many_positions_as_samples():
    return Positions(), squares, [(tokens(n, t),) for n, t in ((4, 4), (5, 5), (5, 4), (4, 5), (1, 1))]


@CASES.add()
def raw_positions_as_many_as_samples():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.c, self.h = (
                nn.Parameter(torch.randn(5, 3)),
                nn.Parameter(torch.randn(1, 1, 3)),
                nn.Linear(3, 2),
            )

        def forward(self, x):
            x = torch.cat([self.c.expand(len(x), -1, -1), x], 1)
            return self.h(torch.tanh(x + self.p[: x.shape[1]]))

    return Raw(), squares, [torch.randn(n, t, 3) for n, t in ((4, 4), (4, 3), (5, 4), (3, 2), (1, 4))]


@CASES.add()
def class_weights_as_many_as_samples():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.l = nn.Parameter(torch.randn(3)), nn.Linear(3, 4)

        def forward(self, x):
            return self.l(x * self.p)

    def loss(m, b):
        return F.cross_entropy(m(b[0]), b[1], weight=b[2], reduction="none")

    return Raw(), loss, [(x, torch.randint(0, 4, (len(x),)), torch.rand(4)) for x in points(4, 4, 3, 5, 1)]


@CASES.add()
def losses_below_a_thousandth():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.l = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

        def forward(self, x):
            return self.l(torch.tanh(x * self.p))

    return Raw(), lambda m, b: 1e-4 * squares(m, b[0]) * b[1].sum(), [(x, torch.arange(4.0)) for x in points()]


@CASES.add()
def losses_of_very_different_sizes():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.l = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

        def forward(self, x, o):
            return self.l(torch.tanh(x[o] * self.p))[o.argsort()]

    def loss(m, b):
        return squares(m, b) * 10.0 ** torch.linspace(-3, 3, len(b[0]))

    return Raw(), loss, labelled(permutation)


@CASES.add()
def tiny_losses_of_layers():
    return mlp(), lambda m, x: 1e-9 * squares(m, x), points()


@CASES.add()
def mean_over_the_batch():
    """Each loss is over the size of its batch: data alone, no other sample's loss."""
    return mlp(), lambda m, x: squares(m, x) / len(x), points()


@CASES.add()
def weights_by_all_labels_of_the_batch():
    def loss(m, b):
        return squares(m, b[0]) * b[1] / b[1].sum()

    return mlp(), loss, [(x, torch.arange(1.0, len(x) + 1)) for x in points()]


@CASES.add(right=False)
def graphs_by_index_add():
    class Graphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, owner, n):
            h = torch.tanh(self.a(x))
            return self.b(torch.zeros(n, 4).index_add(0, owner, h))

    return (
        Graphs(),
        squares,
        [
            (torch.randn(len(o), 3), torch.tensor(o), max(o) + 1)
            for o in ([0, 0, 1, 1], [0, 1, 1, 2, 2, 2], [2, 0, 1, 0], [0])
        ],
    )


@CASES.add()
def packed_sequences():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.g, self.h = nn.Linear(3, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x, lengths):
            p = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            p = nn.utils.rnn.PackedSequence(self.a(p.data), *p[1:])
            return self.h(self.g(p)[1][-1])

    return Packed(), squares, [(torch.randn(n, 5, 3), torch.randint(1, 6, (n,))) for n in SIZES]


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
