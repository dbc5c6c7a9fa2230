"""What has no part in the first batch, and has one later: losses, branches, hooks and uses multiplied by zero at first."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropinf
from tests.capture.right_or_refused import Cases, Multiply, check, doubles, later, mlp, own, points, runs  # noqa: F401

CASES = Cases()


@torch.jit.script
def scripted(h: torch.Tensor, w: torch.Tensor):
    return h @ w.t()


def in_a_thread(m, h):
    found = []
    thread = threading.Thread(target=lambda: found.append(F.linear(h, m[2].weight)))
    thread.start()
    thread.join()
    return found[0]


def unseen_by_modes(m, h):
    with torch._C.DisableTorchFunction():
        return F.linear(h, m[2].weight)


USES = {
    "a_function": lambda m, h: Multiply.apply(h, m[2].weight),
    "a_script": lambda m, h: scripted(h, m[2].weight),
    "a_reentrant_checkpoint": lambda m, h: checkpoint(lambda z: F.linear(z, m[2].weight), h, use_reentrant=True),
    "a_thread": in_a_thread,
    "no_mode": unseen_by_modes,
    "a_stored_view": lambda m, h: h @ m[2].turned,
}
for name, use in USES.items():

    def used(use=use):
        def loss(m, b):
            h = m[1](m[0](b[0]))
            return own(m[2](h)) + b[1] * own(use(m, h))

        model = mlp(5, 2)
        model[2].turned = model[2].weight.t()
        return model, loss, later()

    used.__name__ = f"used_by_{name}"
    CASES.add(right=False)(used)


@CASES.add()
def a_penalty_on_the_input_gradient():
    def loss(m, b):
        x = b[0].clone().requires_grad_()
        out = m(x)
        (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return own(out) + b[1] * own(g)

    return mlp(5, 2), loss, later()


@CASES.add()
def a_penalty_by_torch_func():
    def loss(m, b):
        g = torch.func.grad(lambda x: m(x).square().sum())(b[0])
        return own(m(b[0])) + b[1] * own(g)

    return mlp(5, 2), loss, later()


@CASES.add(right=False)
def a_hook_that_limits_a_weight():
    def loss(m, b):
        return own(m(b[0])) * (0.01 + b[1])

    model = mlp(5, 2)
    model[2].weight.register_hook(lambda g: g.clamp(-0.3, 0.3))
    return model, loss, later()


@CASES.add()
def flags_that_the_loss_sets():
    def loss(m, b):
        for p in m[0].parameters():
            p.requires_grad_(b[1] == 0)
        try:
            return own(m(b[0]))
        finally:
            for p in m[0].parameters():
                p.requires_grad = True

    return mlp(5, 2), loss, later()


class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x, p=0.0):
        return self.b(F.dropout(self.a(x, x, x)[0], p, training=True).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 4)

    def forward(self, x):
        return self.b(self.a(x)[0].mean(1))


def sequences(*sizes):
    return [torch.randn(n, 3, 4) for n in sizes]


@CASES.add()
def weights_of_classes_by_their_counts():
    labels = [torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 1]), torch.tensor([1, 1, 2, 2])]

    def loss(m, b):
        losses = F.cross_entropy(m(b[0]) + torch.tensor([0.0, 30, 0, 0]), b[1], reduction="none")
        return losses / torch.bincount(b[1], minlength=4)[b[1]]

    return Attended(), loss, list(zip(sequences(4, 4, 4), labels, strict=True))


for model in (Attended, Recurrent, mlp):

    def written(model=model):
        def loss(m, x):
            x.mul_(1 / 255).sub_(0.5)
            return own(m(x))

        shape = (3,) if model is mlp else (3, 4)
        return model(), loss, [torch.randint(0, 256, (4, *shape)).double() for _ in range(3)]

    written.__name__ = f"a_batch_written_in_place_by_{model.__name__}"
    CASES.add(right=False)(written)


@CASES.add(right=False)
def differences_of_partners():
    def loss(m, b):
        s = m[1](m[0](b[0])).sum(1)
        return own(m[2](torch.tanh(b[0] @ torch.ones(3, 5)))) + b[1] * (s - s.flip(0))

    return mlp(5, 2), loss, later()


class Scaled(nn.Module):
    """A parameter on rows in another order."""

    def __init__(self):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

    def forward(self, x):
        h = torch.cat([x[:2], x[2:].flip(0)]) * self.g
        return self.b(torch.cat([h[:2], h[2:].flip(0)]))


@CASES.add()
def a_parameter_on_rows_that_are_turned():
    at_first = [torch.tensor([1.0, 1, 0, 0]), torch.ones(4), torch.ones(4)]
    return Scaled(), lambda m, b: own(m(b[0])) * b[1], list(zip(points(4, 4, 4), at_first, strict=True))


class Table(nn.Module):
    """A table made of a parameter, whose rows the batch lets to its samples."""

    def __init__(self):
        super().__init__()
        self.r, self.b = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

    def forward(self, x, mask):
        table = (self.r + torch.zeros(4, 3))[None]
        return self.b(torch.tanh(x[:, None] * mask[..., None] * table).sum(1))


@CASES.add()
def a_table_under_a_mask_that_opens():
    masks = [torch.eye(4), torch.ones(4, 4), torch.ones(4, 4)]
    return Table(), lambda m, b: own(m(*b)), list(zip(points(4, 4, 4), masks, strict=True))


class Filtered(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.q, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.b(torch.fft.ifft(torch.fft.fft(x, dim=1) * torch.complex(self.p, self.q), dim=1).real)


@CASES.add()
def a_complex_filter():
    return Filtered(), lambda m, b: own(m(b[0])) * b[1], later()


@CASES.add(but=frozenset({"training"}))
def statistics_of_one_batch():
    def loss(m, b):
        m[0].train(b[1] == 1)
        try:
            return own(m(b[0]))
        finally:
            m[0].eval()

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    return model, loss, list(zip(points(4, 4, 4), (0, 1, 0), strict=True))


@CASES.add()
def a_hook_put_before_all_others():
    def loss(m, b):
        handle = m[0].register_forward_hook(lambda _m, _x, out: out * (1 + b[1]), prepend=True)
        try:
            return own(m(b[0]))
        finally:
            handle.remove()

    return mlp(5, 2), loss, later()


@CASES.add()
def a_padding_counted_from_the_end():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2))
    model[0].padding_idx = -1
    return model, lambda m, x: own(m(x)), [torch.randint(0, k, (4, 3)) for k in (5, 6, 6)]


@CASES.add()
def indices_that_numpy_fills():
    def loss(m, b):
        there, back = torch.arange(4), torch.arange(4)
        np.from_dlpack(there)[:] = b[1]
        np.from_dlpack(back)[:] = np.argsort(b[1])
        return own(m[2](torch.tanh(m[0](b[0][there]))[back]))

    return mlp(5, 2), loss, list(zip(points(4, 4, 4), ([0, 1, 2, 3], [2, 0, 3, 1], [1, 3, 0, 2]), strict=True))


@pytest.mark.parametrize("model", [Attended, Recurrent])
def test_numbers_drawn_later_are_those_of_the_batch(model):
    def loss(m, b):
        return own(F.dropout(m(b[0]), b[1], training=True))

    batches = list(zip(sequences(4, 4, 4), (0.0, 0.5, 0.5), strict=True))
    model, rows = model(), []
    for route in (None, {"*": "backward"}):
        torch.manual_seed(3)
        rows.append(dropinf.Compressor(model, dropinf.Identity(), loss, route=route).compress(batches).flat)
    assert torch.allclose(*rows, 1e-9, 1e-12)


@CASES.parametrize()
@runs
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
