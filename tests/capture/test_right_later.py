"""What the first batch does not show: sums over picked rows, choices and sizes that change from batch to batch."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.right_or_refused import Cases, Multiply, check, doubles, mlp, points, runs, squares  # noqa: F401

CASES = Cases()
ROWS = 6  # of 3 samples


def picked(loss):
    """Rows [R, 3] whose samples stand in order in the first batch, and in no order in the others."""
    orders = [torch.arange(ROWS) // 2, torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([2, 0, 1, 1, 0, 2])]
    return mlp(), loss, [(torch.randn(ROWS, 3), i, torch.zeros(3)) for i in orders]


def rows_of(model, x):
    return model(x).flatten(1).square().sum(1)


PICKS = {
    "product_from_the_right": lambda m, b: rows_of(m, b[0]) @ F.one_hot(b[1], 3).double(),
    "product_from_the_left": lambda m, b: F.one_hot(b[1], 3).double().t() @ rows_of(m, b[0]),
    "matrix_times_vector": lambda m, b: torch.mv(F.one_hot(b[1], 3).double().t(), rows_of(m, b[0])),
    "activations_turned": lambda m, b: (m(b[0]).t() @ F.one_hot(b[1], 3).double()).t().square().sum(1),
    "masked_sum": lambda m, b: (F.one_hot(b[1], 3).double().t() * rows_of(m, b[0])).sum(1),
    "masked_sum_of_columns": lambda m, b: (rows_of(m, b[0])[:, None] * F.one_hot(b[1], 3)).sum(0),
    "masked_one_by_one": lambda m, b: torch.stack([(rows_of(m, b[0]) * (b[1] == k)).sum() for k in range(3)]),
    "chosen_one_by_one": lambda m, b: torch.stack([rows_of(m, b[0])[b[1] == k].sum() for k in range(3)]),
}
for name, loss in PICKS.items():

    def of(loss=loss):
        return picked(loss)

    of.__name__ = name
    CASES.add()(of)


@CASES.add()
def rows_or_flipped_rows():
    def loss(m, b):
        h = torch.tanh(m(b[0]))
        return torch.where(b[1][:, None], h.flip(0), h).square().sum(1)

    flips = [
        torch.zeros(4, dtype=torch.bool),
        torch.ones(4, dtype=torch.bool),
        torch.tensor([True, False, False, True]),
    ]
    return mlp(), loss, list(zip(points(4, 4, 4), flips, strict=True))


@CASES.add()
def solved_for_another_order():
    orders = [torch.arange(4), torch.tensor([1, 0, 3, 2]), torch.tensor([3, 0, 1, 2])]
    return (
        mlp(),
        lambda m, b: torch.linalg.solve(b[1], rows_of(m, b[0])),
        [(x, torch.eye(4)[order]) for x, order in zip(points(4, 4, 4), orders, strict=True)],
    )


@CASES.add()
def dimensions_in_a_list():
    def loss(m, b):
        return m(b[0]).square().sum(b[1])

    return mlp(), loss, [(torch.randn(4, 4, 3), dims) for dims in ([1, 2], [0, 2], [1, 2])]


class Groups(nn.Module):
    """A parameter of one matrix for as many groups as a batch has, and a layer."""

    def __init__(self, product):
        super().__init__()
        self.w, self.l, self.product = nn.Parameter(torch.randn(1, 3, 4)), nn.Linear(4, 2), product

    def forward(self, x):
        return self.l(torch.tanh(self.product(x, self.w)))


@CASES.add()
def one_matrix_for_several_groups():
    return Groups(torch.matmul), squares, [torch.randn(n, g, 5, 3) for n, g in ((4, 1), (4, 3), (2, 2))]


@CASES.add()
def letter_of_size_one():
    by_letters = functools.partial(torch.einsum, "nhd,hdk->nhk")
    return Groups(by_letters), squares, [torch.randn(n, g, 3) for n, g in ((4, 1), (4, 3), (2, 2))]


@CASES.add()
def overlapping_view():
    class Toeplitz(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.l = nn.Parameter(torch.randn(6)), nn.Linear(3, 2)

        def forward(self, x):
            return self.l(torch.tanh(F.linear(x, self.w.unfold(0, 4, 1))))

    first = torch.randn(4, 4) * torch.tensor([1.0, 0, 0, 0])
    return Toeplitz(), squares, [first, torch.randn(4, 4), torch.randn(3, 4)]


def scaled_by_frequency(model, embed):
    """The first batch has every id once."""
    return (
        model,
        lambda m, b: embed(m, b).flatten(1).square().sum(1),
        [
            torch.tensor([[0, 1], [2, 3]]),
            torch.tensor([[0, 0], [0, 1]]),
            torch.tensor([[4, 1], [1, 1]]),
        ],
    )


@CASES.add()
def embedding_scaled_by_frequency():
    return scaled_by_frequency(nn.Embedding(5, 3, scale_grad_by_freq=True), lambda m, b: m(b))


@CASES.add()
def look_up_scaled_by_frequency():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 3))

        def forward(self, x):
            return F.embedding(x, self.w, scale_grad_by_freq=True)

    return scaled_by_frequency(Table(), lambda m, b: m(b))


@CASES.add()
def conv1d_of_ones_own_that_clamps():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.nf, self.weight, self.bias = 4, nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x.clamp(-1, 1) @ self.weight + self.bias

    first = torch.rand(4, 3) * 2 - 1
    return nn.Sequential(Conv1D(), nn.Tanh(), nn.Linear(4, 2)), squares, [first, 5 * torch.randn(4, 3), first[:3]]


class Routed(nn.Module):
    """Experts whose weights a Function takes; not all are reached at first."""

    def __init__(self):
        super().__init__()
        self.a, self.e = nn.Linear(3, 4), nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))

    def forward(self, x, k):
        h = torch.tanh(self.a(x))
        out = torch.zeros_like(h)
        for i, e in enumerate(self.e):
            if (k == i).any():
                out = out.index_put((k == i,), Multiply.apply(h[k == i], e.weight))
        return out


@CASES.add()
def experts_in_a_function_that_are_reached_later():
    routes = [torch.tensor([0, 1, 2, 0]), torch.tensor([3, 1, 3, 0]), torch.tensor([2, 3, 3, 3])]
    return Routed(), squares, [(torch.randn(4, 3), k) for k in routes]


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
