"""What neither the functions of a forward nor its labels show at first: picks among tensors, writes behind autograd,
classes of tensors, truth values, and parts of samples that colours could lose."""

from __future__ import annotations

import enum

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropinf
from tests.capture.right_or_refused import Cases, check, doubles, mlp, points, runs, squares  # noqa: F401

CASES = Cases()
N = 4
MIXES = {"right": False, "says": "samples . and . .of the 4 samples|differ from the batch's|do not sum to what"}
PICKS = [0, 1, 0]  # what Python picks in each batch


class Layout(enum.StrEnum):
    ROWS = "nd,nm->nd"
    MOVED = "nd,nm->md"


def flipped(k):
    return (torch.arange(N), torch.arange(N).flip(0))[k]


def cut(m, b):
    h = m(b[0])
    return torch.cat((h, torch.zeros_like(h)) if b[1] == 0 else (torch.zeros_like(h), h))[:N].square().sum(1)


def losses_flipped(m, b):
    found = m(b[0]).square().sum(1)
    return (found, found.flip(0))[b[1]]


def losses_centred(m, b):
    found = m(b[0]).square().sum(1)
    centred = found - found.mean()
    return (found, centred)[b[1]]


def checkpointed(m, b):
    return checkpoint(lambda x: m(x)[flipped(b[1])], b[0].clone().requires_grad_(), use_reentrant=True).square().sum(1)


def of_a_distance(m, b):
    def distance(a, c):
        return (a - c).square().sum(-1)[flipped(b[1])]

    return F.triplet_margin_with_distance_loss(
        m(b[0]), m(b[0] + 1), m(b[0] * 2), distance_function=distance, reduction="none", margin=50.0
    )


def behind_functions(m, b):
    h = m(b[0].unsqueeze(1).expand(N, N, 3))
    with torch._C.DisableTorchFunction():
        h = h.transpose(0, b[1])
    return h.square().sum((1, 2))


class Operator:
    """Multiplies by a matrix that it has."""

    def __init__(self, k):
        self.k = k

    @classmethod
    def __torch_function__(cls, _function, _types, args=(), kwargs=None):
        x, operator = args
        return x[flipped(operator.k)]


class Marked(torch.Tensor):
    """Data that says how it is multiplied."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        k = next((getattr(a, "k", None) for a in args if isinstance(a, Marked)), None)
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.mul and k is not None:
                return args[1][flipped(k)]
            return function(*args, **(kwargs or {}))


def marked(m, b):
    data = b[0].as_subclass(Marked)
    data.k = b[1]
    return torch.mul(data, m(b[0])).square().sum(1)


PICKED = {
    "index": lambda m, b: m(b[0])[flipped(b[1])].square().sum(1),
    "index_by_a_truth_value": lambda m, b: m(b[0])[flipped(bool(b[1] > 0))].square().sum(1),
    "cut": cut,
    "product": lambda m, b: (torch.eye(N).flip(0) if b[1] else torch.eye(N)).mm(m(b[0])).square().sum(1),
    "losses": losses_flipped,
    "losses_that_are_centred": losses_centred,
    "equation": lambda m, b: (
        torch.einsum((Layout.ROWS, Layout.MOVED)[b[1]], m(b[0]), torch.eye(N).flip(0)).square().sum(1)
    ),
    "numbers_that_are_floats": lambda m, b: (
        m(b[0])[torch.arange(0.0, 4.0 + 8 * b[1], 1.0 + 2 * b[1]).long() % N].square().sum(1)
    ),
    "inside_a_checkpoint": checkpointed,
    "inside_a_function": of_a_distance,
    "behind_functions": behind_functions,
    "by_another_type": lambda m, b: torch.matmul(m(b[0]), Operator(b[1])).square().sum(1),
    "by_data_of_a_class": marked,
}
for name, loss in PICKED.items():

    def of(loss=loss):
        torch.manual_seed(3)
        return nn.Linear(3, N), loss, list(zip(points(N, N, N), PICKS, strict=True))

    of.__name__ = f"picked_{name}"
    CASES.add(**(MIXES if name == "losses_that_are_centred" else {}))(of)


def written(write):
    def loss(m, b):
        h = m(b[0])
        mix = h.mean(0, keepdim=True).expand_as(h).clone()
        write(mix, h)
        return (h + b[1] * mix).square().sum(1)

    return loss


def copied(mix, h):
    with torch.no_grad():
        mix.copy_(h)


def filled(mix, _h):
    with torch.no_grad():
        mix.fill_(1.0)


def put(mix, h):
    with torch.no_grad():
        mix[torch.arange(len(h))] = h


def set_data(mix, h):
    mix.data = h.detach().clone()


def set_slice(mix, h):
    mix.detach()[:] = h.detach()


WRITES = [copied, filled, put, set_data, set_slice, lambda mix, _: mix.detach().zero_()]
for i, write in enumerate(WRITES):

    def of_write(write=write):
        gates = [torch.zeros(N, 1), torch.zeros(N, 1), torch.tensor([[0.0], [1.0], [0.0], [0.0]])]
        return mlp(), written(write), list(zip(points(N, N, N), gates, strict=True))

    of_write.__name__ = f"written_without_autograd_{i}"
    CASES.add(**MIXES)(of_write)


class Clamped(nn.Parameter):
    """A weight whose layer clamps what it reads."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear:
                return function(args[0].clamp(-1, 1), *args[1:], **(kwargs or {}))
            return function(*args, **(kwargs or {}))


@CASES.add()
def weight_of_a_class():
    model = mlp()
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    first.weight = Clamped(first.weight.detach())
    return model, squares, [x * scale for x, scale in zip(points(N, N, N), (0.1, 10, 10), strict=True)]


def gated(m, x):
    h = m.b(m.a(x)[0])[:, -1]
    return (h.detach() if x.mean() > 0 else h).square().sum(1) + h.sum(1) * 0


def sized(m, x):
    h = m.b(m.a(x)[0])[:, -1]
    return (h.detach() + (h - h.detach()) / max(len(x), N)).square().sum(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)


@CASES.add()
def gate_of_the_batch_where_samples_are_taken_alone():
    xs = [torch.randn(N, 5, 3).abs() * sign for sign in (-1, 1, -1)]
    for x in xs:
        x[0] *= -0.1
    return Recurrent(), gated, xs


@CASES.add()
def size_of_the_batch_where_samples_are_taken_alone():
    return Recurrent(), sized, [torch.randn(n, 5, 3) for n in (N, 2 * N, N)]


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


COLUMNS = {
    "product": lambda w, x: (w[:, None] * x.t()).t(),
    "sum": lambda w, x: torch.addmm(w[:, None], x.t() @ x.new_ones(N, 1) * 0, x.new_ones(1, N)).t() + x,
    "choice": lambda w, x: (torch.where(x.t() > 0, w[:, None], 2 * w[:, None]) * x.t()).t(),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_samples_in_columns_do_not_mix(name):
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return COLUMNS[name](self.w, x)

    model, loss, batches = Columns(), squares, points(N, N, N)
    rows = dropinf.Compressor(model, dropinf.Identity(), loss).compress(batches)["w"]
    want = [torch.autograd.grad(loss(model, x)[n], model.w)[0] for x in batches for n in range(N)]
    torch.testing.assert_close(rows.reshape(-1, 3), torch.stack(want))
