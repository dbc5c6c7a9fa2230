"""Sizes that a batch's tensors do not show: how many samples, how many rows, a parameter that grew."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from tests.capture.right_or_refused import Cases, check, doubles, runs  # noqa: F401

CASES = Cases()
N = 6
TIMES = (6, 6, 12, 6, 18)


class Grid(nn.Module):
    """A layer on a grid of times that the model makes: [4, T, 2] -> [4, T, 3]."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer, self.norm = kind, nn.Linear(2, 3), nn.LayerNorm(3)
        self.table, self.w, self.scale = (
            nn.Embedding(30, 3),
            nn.Parameter(torch.randn(2, 3)),
            nn.Parameter(torch.ones(3)),
        )
        self.register_buffer("origin", torch.randn(1, 2))

    def forward(self, times):
        grid = torch.stack([torch.stack([(times * k).cos(), (times * k).sin()], -1) for k in (1.0, 0.5, 0.3, 0.2)])
        if self.kind == "norm":
            return self.norm(torch.cat([grid, grid.sum(-1, keepdim=True)], -1).tanh())
        if self.kind == "embedding":
            return self.table(times.long()).expand(4, -1, -1)
        if self.kind == "matmul":
            return torch.tanh(grid @ self.w)
        if self.kind == "product":
            return torch.tanh(torch.cat([grid, grid[..., :1]], -1) * self.scale)
        if self.kind == "linear_op":
            return F.linear(grid, self.w.t())
        return self.layer(grid) + self.layer(self.origin) if self.kind == "shared" else torch.tanh(self.layer(grid))


def last(h, x):
    """Sample i is the i-th of the last times."""
    return (h[:, -len(x) :].sum((0, 2)) * x.sum(1)) ** 2


KINDS = ("linear", "norm", "embedding", "matmul", "product", "linear_op", "shared")
for kind in KINDS:

    def float_of_the_batch(kind=kind):
        def loss(m, batch):
            return last(m(torch.arange(0.0, batch[1])), batch[0])

        return Grid(kind), loss, [(torch.randn(N, 5), float(t)) for t in TIMES]

    def strings(kind=kind):
        def loss(m, batch):
            return last(m(torch.arange(24.0)), torch.from_numpy(np.array([[float(len(text))] for text in batch])))

        return (
            Grid(kind),
            loss,
            [["x" * (1 + (i * 7 + k) % 5) for i in range(n)] for k, n in enumerate((24, 24, 12, 8, 6))],
        )

    def length_of_another_tensor(kind=kind):
        def loss(m, batch):
            return last(m(torch.arange(batch[0].shape[1]) * 1.0), batch[1])

        return Grid(kind), loss, [(torch.randn(40, t), torch.randn(N, 5)) for t in TIMES]

    for build in (float_of_the_batch, strings, length_of_another_tensor):
        build.__name__ += f"_{kind}"
        CASES.add(right=build.__name__ != "strings_shared")(build)  # without tensors nothing shows that they share


@CASES.parametrize()
@runs
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


class Kept(nn.Module):
    """A layer on those of a grid's columns that a buffer names."""

    def __init__(self, n):
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("grid", torch.randn(3, 3 * n, 2))
        self.register_buffer("keep", torch.arange(3 * n) < n)

    def forward(self, x):
        h = torch.tanh(self.layer(self.grid[:, self.keep]))
        return (h.view(3, -1, len(x), 3).mean((0, 1)).sum(1) * x.sum(1)) ** 2


def compared(compressor, model, batches):
    """The largest error of rows, of batches that are made anew for the oracle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = compressor.compress(batches())["layer"]
    want = [torch.autograd.grad(one, model.layer.weight, retain_graph=True)[0] for x in batches() for one in model(x)]
    return float((got - torch.stack(want)).abs().max())


@pytest.mark.parametrize("n", [3, 4, 6])
def test_a_buffer_that_is_written_between_batches_picks_more_rows(n):
    torch.manual_seed(0)
    model, data = Kept(n), [torch.randn(n, 5) for _ in range(5)]

    def batches():
        for x, parts in zip(data, (1, 1, 2, 1, 3), strict=True):
            model.keep.copy_(torch.arange(3 * n) < parts * n)
            yield x

    assert compared(dropinf.Compressor(model, dropinf.Identity(), lambda m, x: m(x)), model, batches) < 1e-9


@pytest.mark.parametrize("n", [3, 4, 6])
def test_a_buffer_that_is_longer_in_the_next_call(n):
    torch.manual_seed(0)
    model, x = Kept(n), torch.randn(n, 5)
    compressor = dropinf.Compressor(model, dropinf.Identity(), lambda m, x: m(x))
    for parts in (1, 2, 1, 3):
        model.grid, model.keep = torch.randn(3, parts * n, 2), torch.ones(parts * n, dtype=torch.bool)
        assert compared(compressor, model, lambda: [x]) < 1e-9


SKETCHES = {
    "whole": dropinf.Identity(),
    "mask": dropinf.Dropout(2),
    "flat": dropinf.Dropout(4, mode="flat"),
    "sums": dropinf.SJLT(2),
    "rotated": dropinf.Dropout(2, rank=3),
}


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("when", ["between calls", "between batches"])
@pytest.mark.parametrize("name", ["layer.weight", "table.weight", "w"])
def test_a_parameter_that_grew_is_refused(name, when, sketch):
    torch.manual_seed(0)
    model = Grid("linear")

    def loss(m, x):
        h = m.layer(x) + m.table(torch.arange(len(x))) + x @ m.w
        return h.square().sum(1)

    def grown():
        yield torch.randn(4, 2)
        p = model.get_parameter(name)
        p.data = torch.cat([p.data, p.data])
        yield torch.randn(4, 2)

    compressor = dropinf.Compressor(model, SKETCHES[sketch], loss)
    compressor.calibrate([torch.randn(4, 2)])
    batches = grown()
    if when == "between calls":
        compressor.compress([next(batches)])
        batches = [next(batches)]
    with pytest.raises(ValueError, match=rf"its parameter {name} is \[.*and was \[.*; make a new Compressor"):
        compressor.compress(batches)


class Builds(nn.Module):
    """A model that makes a module, or a parameter, the first time it runs."""

    def __init__(self, what):
        super().__init__()
        self.a, self.what, self.made = nn.Linear(4, 3), what, None

    def forward(self, x):
        if self.made is None:
            del self.made
            self.made = nn.Linear(3, 3).requires_grad_(False) if self.what == "module" else nn.Parameter(torch.ones(3))
        h = self.a(x)
        return self.made(h) if self.what == "module" else self.made * h


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("what", ["module", "parameter"])
def test_what_the_first_forward_makes_is_refused_and_taken_out(what, count):
    model, batches = Builds(what), [torch.randn(5, 4) for _ in range(count)]

    def loss(m, x):
        return m(x).square().sum(1)

    with pytest.raises(
        ValueError, match=r"its forward makes 'made', a module or parameter, .* call the model once before"
    ):
        dropinf.Compressor(model, dropinf.Identity(), loss).compress(batches)
    assert model.made is None
    assert list(model._modules) == ["a"]
    assert not model._parameters
    model(batches[0])
    rows = dropinf.Compressor(model, dropinf.Identity(), loss).compress(batches)
    w = model.a.weight
    want = [torch.autograd.grad(one, w, retain_graph=True)[0] for x in batches for one in loss(model, x)]
    torch.testing.assert_close(rows["a"], torch.stack(want))


class Bank(nn.Module):
    """What a layer gives, behind some rows of a bank and before all of them: where it begins, only their number says."""

    def __init__(self, take, tracked):
        super().__init__()
        self.a, self.b, self.take = nn.Linear(5, 6), nn.Linear(6, 1), take
        self.register_buffer("bank", torch.randn(40, 6))
        self.w = nn.Parameter(torch.randn(6)) if tracked else None

    def forward(self, x, k):
        h = torch.tanh(self.a(x))
        h = h if self.w is None else h * self.w
        rows = torch.cat([self.take(self.bank, k), h, self.bank])
        return self.b(rows[20 : 20 + len(x)]).squeeze(-1) ** 2


TAKES = {
    "mask": lambda bank, k: bank[torch.arange(40) < torch.tensor(float(k))],
    "nonzero": lambda bank, k: bank[(torch.arange(40) < torch.tensor(float(k))).nonzero().squeeze(1)],
    "masked_select": lambda bank, k: bank.masked_select((torch.arange(40) < torch.tensor(float(k)))[:, None]).view(
        -1, 6
    ),
    "repeat_interleave": lambda bank, k: bank[:1].repeat_interleave(torch.tensor([k]), 0),
    "array": lambda bank, k: torch.as_tensor(np.ones((k, 6))),
    "range": lambda bank, k: bank[torch.tensor(range(k))],
    "arange": lambda bank, k: bank[torch.arange(0.0, float(k)).long()],
    "interpolate": lambda bank, k: F.interpolate(bank[:10].t()[None], scale_factor=k / 10)[0].t(),
}
BANKS = Cases()
for name, take in TAKES.items():
    for tracked in (False, True):

        def rows_of_a_bank(take=take, tracked=tracked):
            def loss(m, batch):
                return m(batch[0], int(batch[1]))

            data = [(torch.randn(16, 5), np.array(k)) for k in (20, 20, 23, 20, 22)]
            return Bank(take, tracked), loss, data

        rows_of_a_bank.__name__ = f"{name}_{'tracked' if tracked else 'given'}"
        BANKS.add()(rows_of_a_bank)


@BANKS.parametrize()
@runs
def test_where_rows_begin_is_in_no_shape_of_the_batch(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


def test_a_bank_that_is_longer_in_the_next_call():
    torch.manual_seed(0)
    model = Bank(lambda bank, _: bank[:-20], tracked=False)
    compressor = dropinf.Compressor(model, dropinf.Identity(), lambda m, x: m(x, 0))
    for length in (40, 43, 40, 42):
        model.bank, x = torch.randn(length, 6), torch.randn(16, 5)
        got = compressor.compress([x])["a"]
        want = [torch.autograd.grad(one, model.a.weight, retain_graph=True)[0] for one in model(x, 0)]
        torch.testing.assert_close(got, torch.stack(want))


def test_cu_seqlens_that_begin_to_contradict_the_loss():
    torch.manual_seed(0)
    model, windows = nn.Linear(3, 2), torch.tensor([0, 4, 8, 12, 16])
    other = torch.tensor([0, 3, 8, 12, 16])
    batches = [(torch.randn(16, 3), windows), (torch.randn(16, 3), other), (torch.randn(16, 3), windows)]

    def loss(m, batch):
        return m(batch[0]).square().view(4, -1).sum(1)

    rows = dropinf.Compressor(model, dropinf.Identity(), loss, cu_seqlens=lambda b: b[1]).compress(batches)["weight"]
    want = [torch.autograd.grad(one, model.weight, retain_graph=True)[0] for b in batches for one in loss(model, b)]
    torch.testing.assert_close(rows.flatten(1), torch.stack(want).flatten(1))
