"""The same functions on the same shapes, and yet another computation: what Python, scripts and hooks decide."""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from tests.capture.right_or_refused import Cases, check, doubles, mlp, own, points, runs  # noqa: F401

CASES = Cases()
ORDERS = [list(range(6)), [1, 0, 3, 2, 5, 4], [5, 2, 0, 1, 4, 3]]
GATES = [torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1.0)]


def swapped(h, swap):
    first, second = h.chunk(2)
    return torch.cat([second, first] if swap else [first, second])


PICKS = {
    "branch": lambda h, o: h if o[0] == 0 else h.flip(0) * 1,
    "both_made_one_taken": lambda h, o: {0: h * 1, 1: h.flip(0), 5: h.roll(7, 0)}[o[0]],
    "halves": lambda h, o: swapped(h, o[0] == 5),
    "pieces": lambda h, o: torch.cat([h.split(1)[i] for i in o]),
    "pieces_changed_first": lambda h, o: torch.cat([(p * 1)[None] for p in [h.unbind()[i] for i in o]]),
    "columns": lambda h, o: torch.stack([h.t()[..., i] for i in o]),
    "written": lambda h, o: torch.stack([h * 0], 1)[:, 0].index_add(0, torch.tensor(o), h),
    "cumsum_of_numpy": lambda h, o: h.cumsum(np.int64(1)) if o[0] != 5 else h.cumsum(np.int64(1)).flip(0),
    "roll_of_aten": lambda h, o: torch.ops.aten.roll(h, [7 * o[0]], [0]),
    "padded": lambda h, o: F.pad(h, (0, 0, 7 * o[0] % 6, -(7 * o[0] % 6))),
    "as_strided": lambda h, o: torch.cat([h, h]).as_strided(h.shape, h.stride(), o[0] * h.shape[1]),
}  # fmt: skip
for name, pick in PICKS.items():

    def picked(pick=pick):
        return mlp(), lambda m, b: own(pick(m(b[0]), b[1])), list(zip(points(6, 6, 6), ORDERS, strict=True))

    picked.__name__ = name
    CASES.add()(picked)


def documents(cut):
    lengths = [(6, 6, 6), (4, 9, 5), (7, 5, 6)]
    return mlp(), cut, [[torch.randn(k, 3) for k in three] for three in lengths]


@CASES.add()
def documents_cut_by_slices():
    def cut(m, b):
        h, ends = m(torch.cat(b)[None]), np.cumsum([0, *map(len, b)]).tolist()
        return torch.stack([h[0, i:j].square().sum() for i, j in itertools.pairwise(ends)])

    return documents(cut)


@CASES.add()
def documents_cut_by_split():
    def cut(m, b):
        return torch.stack([p.square().sum() for p in m(torch.cat(b)[None]).split([len(x) for x in b], 1)])

    return documents(cut)


@torch.jit.script
def chosen(h: torch.Tensor, f: torch.Tensor):
    if bool(f > 0.5):
        h = h.flip(0)
    return h * 2


@torch.jit.script
def gated(h: torch.Tensor, f: torch.Tensor):
    return h + f * h.mean(0)


@torch.jit.script
def rolled(h: torch.Tensor, k: int):
    return torch.roll(h, [k], [0])


def through_a_checkpoint(h, f):
    return torch.utils.checkpoint.checkpoint(lambda h: torch.tanh(h + f * h.mean(0)), h, use_reentrant=True)


class Limited(torch.autograd.Function):
    """Losses whose gradient is limited over the whole batch."""

    @staticmethod
    def forward(_, losses):
        return losses.clone()

    @staticmethod
    def backward(_, g):
        return g * (1.5 / g.norm()).clamp(max=1)


def filled(h, f):
    column = f * h.norm()
    h = h * 1
    h[:, 0] = column
    return h


def added(h, f):
    h = h * 1
    torch._foreach_add_([h], [f * h.mean(0)])
    return h


GATED = {
    "a_choice_in_a_script": (chosen, {}),
    "a_gate_in_a_script": (gated, {"right": False}),
    "a_number_of_a_script": (lambda h, f: rolled(h, 5 * int(f)), {}),
    "a_gate_in_a_checkpoint": (through_a_checkpoint, {"right": False}),
    "a_column_that_is_filled": (filled, {"right": False}),
    "a_list_that_is_added_to": (added, {"right": False}),
    "a_branch_of_a_dictionary": (lambda h, f: {0: h, 1: h.flip(0)}[int(f)] * 1, {}),
    "axes_that_hash_alike": (lambda h, f: h[:, None].softmax(-1 - int(f)), {}),
    "a_scale_of_the_batch": (lambda h, f: h / (1 + f * h.square().mean()), {"right": False}),
}
for name, (step, options) in GATED.items():

    def behind(step=step):
        return mlp(), lambda m, b: own(step(m(b[0]), b[1])), list(zip(points(6, 6, 6), GATES, strict=True))

    behind.__name__ = name
    CASES.add(**options)(behind)


@CASES.add(right=False)
def losses_that_a_function_makes():
    return mlp(), lambda m, x: Limited.apply(own(m(x))), points(1, 6, 6)


class Windows(nn.Module):
    """Attention in windows of four of all tokens: of one sample where its length is a multiple of four."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = self.q(x).reshape(-1, 4, 12).chunk(3, -1)
        return self.o(F.scaled_dot_product_attention(q, k, v).reshape(*x.shape[:2], 4))


@CASES.add(right=False)
def windows_that_other_lengths_share():
    return Windows(), lambda m, x: own(m(x)), [torch.randn(2, 8, 3), torch.randn(2, 6, 3), torch.randn(4, 10, 3)]


@CASES.add(right=False)
def groups_of_a_sixth():
    def loss(m, x):
        h = m(x)
        n, g = len(h), max(1, len(h) // 6)
        spread = (h.reshape(n // g, g, -1).square().mean(1, keepdim=True) + 1).sqrt()
        return own(h + spread.expand(n // g, g, -1).reshape(n, -1))

    return mlp(), loss, points(6, 12, 6)


@CASES.add(right=False)
def a_recurrent_layer_that_mixes_straight_through():
    def loss(m, b):
        h = m(b[0])[0]
        mean = h.mean(0)
        return own(h + b[1] * (mean - mean.detach()))

    model = nn.GRU(3, 2, batch_first=True)
    return model, loss, list(zip([torch.randn(4, 3, 3) for _ in range(3)], GATES, strict=True))


class Tower(nn.Module):
    """A network over a table; the batch says which of its rows are whose."""

    def __init__(self, take, size=16):
        super().__init__()
        self.m, self.v, self.take = mlp(), nn.Linear(3, 3), take
        self.register_buffer("x", torch.randn(size, 3))

    def forward(self, x, ids):
        return self.v(x) * self.take(self.m(self.x), ids)


TAKES = {
    "index": lambda h, i: h[i],
    "index_select": lambda h, i: h.index_select(0, i),
    "gather": lambda h, i: h.gather(0, i[:, None].expand(-1, h.shape[1])),
    "embedding": lambda h, i: F.embedding(i, h),
}
for name, take in TAKES.items():

    def table(take=take):
        ids = [torch.arange(4), torch.tensor([6, 9, 5, 13]), torch.tensor([3, 0, 3, 1])]
        return Tower(take), lambda m, b: own(m(*b)), list(zip(points(4, 4, 4), ids, strict=True))

    table.__name__ = f"a_network_over_a_table_by_{name}"
    CASES.add()(table)


def clamped(m, b):
    order = b[2].argsort()
    h = torch.tanh(m(b[0][order]))
    h.register_hook(lambda g: g.clamp(-1, 1))
    return own(h[order.argsort()] * b[1])


@CASES.add(right=False)
def gradients_that_a_clamp_makes_alike():
    scales = (1e-3, 1e-3, 1e3)
    return mlp(), clamped, [(torch.randn(4, 3), torch.tensor(s), torch.tensor([3, 1, 4, 2])) for s in scales]


@CASES.add()
def samples_without_gradient_at_first():
    def loss(m, b):
        h = m(torch.cat([b[0][:3], b[0][3:].flip(0)]))
        return F.relu(own(torch.cat([h[:3], h[3:].flip(0)])) - b[1])

    rest = torch.tensor([0, 0, 0, 9e9, 9e9, 9e9])
    return mlp(), loss, list(zip(points(6, 6, 6), [rest, torch.zeros(6), torch.zeros(6)], strict=True))


@CASES.add()
def one_of_two_indices():
    def loss(m, b):
        return own(m(b[0])[{"plain": torch.arange(4), "given": b[1]}[b[2]]])

    return (
        mlp(),
        loss,
        [(x, torch.tensor([2, 0, 3, 1]), k) for x, k in zip(points(4, 4, 4), ("plain", "given", "given"), strict=True)],
    )


@CASES.add()
def many_losses_in_another_order():
    orders = [list(range(300)), [*range(256), *range(299, 255, -1)]]

    def loss(m, b):
        pieces = own(m(b[0])).unbind(0)
        return torch.stack([pieces[i] for i in b[1]])

    return mlp(), loss, list(zip(points(300, 300), orders, strict=True))


@CASES.add()
def numbers_of_numpy():
    labels = [np.array([0, 1, 1, 0]), np.array([1, 1, 0, 0])]
    return (
        nn.Linear(3, 2),
        lambda m, b: F.cross_entropy(m(b[0])[np.array([0, 1, 2, 3])], torch.as_tensor(b[1]), reduction="none"),
        list(zip(points(4, 4), labels, strict=True)),
    )


def other_strides(make):
    """Batches of one shape, the first contiguous, the others not."""
    return [make(3), *(make(3).transpose(0, 1).contiguous().transpose(0, 1) for _ in range(2))]


class Taken(nn.Module):
    """What takes elements by where they lie, of activations that lie as the batch does."""

    def __init__(self, take):
        super().__init__()
        self.w, self.out, self.take = nn.Parameter(torch.randn(4)), nn.Linear(4, 2), take

    def forward(self, x):
        return self.out(self.take(torch.tanh(x * self.w)))


TAKES = {
    "strided": lambda h: h.as_strided((3, 2, 4), (20, 4, 1)),
    "strided_function": lambda h: torch.as_strided(h, (3, 2, 4), (20, 4, 1)),
    "strided_of_aten": lambda h: torch.ops.aten.as_strided(h, [3, 2, 4], [20, 4, 1]),
    "strided_copy": lambda h: torch.as_strided_copy(h, (3, 2, 4), (20, 4, 1)),
}
for name, take in TAKES.items():

    def taken(take=take):
        make = lambda n: torch.randn(n, 5, 4)  # noqa: E731
        return Taken(take), lambda m, x: own(m(x).flatten(1)), other_strides(make)

    taken.__name__ = name
    CASES.add()(taken)


@CASES.parametrize()
@runs
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
