"""Samples whose gradient is far below another's, in batches whose samples may meet: colours alone would not see them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf
from dropinf.capture.modules import NormUse

BATCHES = 3  # the last is not one that is audited for its place


def model_of(dtype):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def loss(model, batch):
    """Each sample's loss reads the row before its own where its gate is open; a number of the batch decides no path."""
    x, numbers, gate, size = batch
    if int(numbers.sum()) < 0:
        raise ValueError("numbers")
    h = model[1](model[0](x))
    return model[2](h + gate.relu() * h.roll(1, 0)).square().sum(1) * size


def batches_of(dtype, size, gate):
    """Return batches whose samples stay apart; in the last, sample 1 has a loss of ``size`` and a gate of its own."""
    closed, ones = -torch.ones(4, 1, dtype=dtype), torch.ones(4, dtype=dtype)
    of = torch.Generator().manual_seed(6)
    xs = torch.randn(BATCHES, 4, 6, generator=of).to(dtype)
    found = [(x, torch.arange(4), closed, ones) for x in xs]
    opened, sizes = closed.clone(), ones.clone()
    opened[1], sizes[1] = gate, size
    found[-1] = (xs[-1], torch.arange(4), opened, sizes)
    return found


SIZES = [1e-3, 1e-5, 1e-7, 1e-9, 1e-11, 1e-14, 1e-20, 1e-30]
DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_sample_that_meets_a_far_larger_one_is_refused(dtype, size):
    with pytest.raises(dropinf.AttributionError, match=r"samples 0 and 1|do not sum to what plain autograd gives"):
        dropinf.Compressor(model_of(dtype), dropinf.Identity(), loss).compress(batches_of(dtype, size, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES, 0.0])
def test_a_sample_far_below_others_that_stays_apart_is_right(dtype, size):
    model, batches = model_of(dtype), batches_of(dtype, size, -1.0)
    compressor = dropinf.Compressor(model, dropinf.Identity(), loss)
    rows = compressor.compress(batches)["0"][-3].double()
    want = torch.autograd.grad(loss(model, batches[-1])[1], model[0].weight)[0].double().flatten()
    slack = 1e-12 if dtype == torch.float64 else 1e-5
    assert (rows.flatten() - want).norm() <= slack * want.norm()
    asked = [a.why for a in compressor.audits if "far below" in a.why]
    assert len(asked) == (0.0 < size < (1e-9 if dtype == torch.float64 else 1e-3))


def test_samples_of_like_size_are_not_audited_for_it():
    dtype = torch.float32
    compressor = dropinf.Compressor(model_of(dtype), dropinf.Identity(), loss)
    compressor.compress(batches_of(dtype, 1e-2, -1.0))
    assert [a.batch for a in compressor.audits] == [1]


def test_a_clipped_gradient_is_not_said_to_be_mixed():
    model = model_of(torch.float64)
    model[1].register_full_backward_hook(lambda _m, into, _o: (into[0].clamp(-0.1, 0.1),))
    with pytest.raises(dropinf.AttributionError, match="clips or normalises"):
        dropinf.Compressor(model, dropinf.Identity(), lambda m, x: m(x).square().sum(1)).compress(
            [torch.randn(4, 6).double()]
        )


class Two(nn.Module):
    """Two layers whose rows are sorted by a batch's ``order``."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, order):
        return self.a(x)[order].square().sum(1), self.b(x)[order].square().sum(1)


def sorted_batches(dtype, factors, n=6):
    """Return five batches that are sorted by data; in the last, samples meet by ``factors`` [n]."""
    of = torch.Generator().manual_seed(8)
    usual, turned = torch.arange(n), torch.tensor([3, 1, 0, 2, 5, 4])
    orders, none = [usual, turned, turned, usual, usual], torch.zeros(n, dtype=dtype)
    xs = torch.randn(5, n, 6, generator=of).to(dtype)
    return [(x, o, factors.to(dtype) if i == 4 else none) for i, (x, o) in enumerate(zip(xs, orders, strict=True))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("factor", "apart"), [(0.5, 2), (0.25, 4), (0.125, 3), (1.0, 1)])
def test_parts_of_two_samples_are_not_taken_for_a_third(dtype, factor, apart):
    def losses(model, batch):
        first, second = model(*batch[:2])
        return first + batch[2] * first.roll(apart) + second

    torch.manual_seed(1)
    factors = torch.zeros(6)
    factors[5] = factor  # one row alone is of two samples
    batches = sorted_batches(dtype, factors)
    with pytest.raises(dropinf.AttributionError):
        dropinf.Compressor(Two().to(dtype), dropinf.Identity(), losses).compress(batches)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-3)])
def test_a_sample_that_is_small_in_one_layer_alone_is_not_lost(dtype, factor):
    own = torch.ones(6, dtype=dtype)
    own[3] = 0

    def losses(model, batch):
        first, second = model(*batch[:2])
        return first * torch.where(batch[2].any(), own, 1) + batch[2] * first.roll(1) + second

    torch.manual_seed(1)
    factors = torch.zeros(6)
    factors[3] = factor
    with pytest.raises(dropinf.AttributionError):
        dropinf.Compressor(Two().to(dtype), dropinf.Identity(), losses).compress(sorted_batches(dtype, factors))


@pytest.mark.parametrize("size", [1.0, 0.1, 0.02])
def test_small_gradients_in_float16_are_of_their_own_samples(size):
    n, tokens, d = 8, 16, 64
    torch.manual_seed(2)
    model = nn.ModuleDict({"a": nn.Linear(d, d), "o": nn.Linear(d, 10)}).half()
    turned = torch.tensor([3, 1, 0, 2, 5, 4, 7, 6])
    batches = [
        (torch.randn(n, tokens, d).half(), torch.randint(0, 10, (n * tokens,)), order)
        for order in (torch.arange(n), turned, turned)
    ]

    def losses(model, batch):
        z = model["o"](torch.tanh(model["a"](batch[0]))[batch[2]])
        each = nn.functional.cross_entropy(z.flatten(0, 1).float(), batch[1], reduction="none")
        return each.view(n, tokens).mean(1) * size

    rows = dropinf.Compressor(model, dropinf.Identity(), losses).compress(batches)
    exact = copy.deepcopy(model).float()
    for i, (x, y, order) in enumerate(batches):
        found = losses(exact, (x.float(), y, order))
        for j in range(n):
            for name, p in (("a", exact["a"].weight), ("a.bias", exact["a"].bias)):
                want = torch.autograd.grad(found[j], p, retain_graph=True)[0].flatten()
                assert (rows[name][i * n + j].flatten() - want).norm() <= 0.1 * want.norm(), (name, i, j)


class Narrow(nn.Module):
    """A float64 model that attends in float32, as transformers' models do: by a cast, or by ``dtype=`` of a function."""

    def __init__(self, by):
        super().__init__()
        self.q, self.k, self.v, self.by = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), by

    def forward(self, x):
        scores = self.q(x) @ self.k(x).mT
        weights = scores.float().softmax(-1) if self.by == "cast" else scores.softmax(-1, dtype=torch.float32)
        return weights.to(x.dtype) @ self.v(x)


@pytest.mark.parametrize("by", ["cast", "dtype"])
@pytest.mark.parametrize("n", [4, 40])  # of which colours need powers that float32 does not hold
def test_a_float64_model_that_computes_in_float32_inside(by, n):
    torch.manual_seed(7)
    model, x = Narrow(by).double(), torch.randn(n, 5, 6, dtype=torch.float64)
    compressor = dropinf.Compressor(model, dropinf.Identity(), lambda m, x: m(x).square().sum((1, 2)))
    rows = compressor.compress([x])
    assert set(compressor._sweep.ladder.rungs.values()) == {"hook"}
    want = [torch.autograd.grad(model(row[None]).square().sum(), model.k.weight)[0] for row in x]
    torch.testing.assert_close(rows["k"], torch.stack(want), rtol=1e-4, atol=1e-5)


class Faint(nn.Module):
    """A raw parameter that shares little of the loss, at an op that reads what all samples share."""

    def __init__(self, faint, op, shape):
        super().__init__()
        self.l, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(*shape))
        self.faint, self.op = faint, op

    def forward(self, x, t):
        return self.l(x).square().sum((1, 2)) + self.faint * self.op(x, t, self.w).square().sum((1, 2))


OPS = {
    "einsum": ((4, 5), lambda x, t, w: torch.einsum("ntd,t,de->nte", x, t, w)),
    "addcmul": ((4,), lambda x, t, w: torch.addcmul(x, t[:, None], w)),
    "lerp": ((4,), lambda x, t, w: torch.lerp(x, w, t[:, None])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("faint", [1e-3, 1e-5, 1e-7, 1e-10])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rung", ["op", "vmap", "alone"])
def test_a_layer_far_below_others_is_held_against_its_own_rounding(dtype, faint, op, rung):
    torch.manual_seed(3)
    model = Faint(faint, OPS[op][1], OPS[op][0]).to(dtype)
    batches = [(torch.randn(4, 4, 4).to(dtype), t.to(dtype)) for t in (torch.ones(4), torch.rand(4), torch.rand(4))]
    compressor = dropinf.Compressor(model, dropinf.Identity(), lambda m, batch: m(*batch), route={"w": rung})
    rows = compressor.compress(batches)["w"].double()
    model = model.double()
    losses = [model(*(x.double() for x in batch)) for batch in batches]
    want = [torch.autograd.grad(x, model.w, retain_graph=True)[0].flatten() for loss in losses for x in loss]
    assert (rows - torch.stack(want)).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * torch.stack(want).norm()


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(4) + 0.5), 1e-6

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(self.eps).rsqrt() * self.weight


class Normed(nn.Module):
    def __init__(self, faint):
        super().__init__()
        self.l, self.norm, self.faint = nn.Linear(4, 4), OwnRMSNorm(), faint

    def forward(self, x):
        h = self.l(x)
        return h.square().sum((1, 2)) + self.faint * self.norm(h).pow(3).sum((1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("faint", [1.0, 1e-4, 1e-9])
def test_rows_of_a_norm_are_held_against_its_gradient_in_every_batch(monkeypatch, dtype, faint):
    begun, emit = [], NormUse.emit_weight

    def loss(model, x):
        begun.append(x)
        return model(x)

    def doubled(*given):
        return emit(*given) * (1 + int(begun[-1] is batches[-1]))

    monkeypatch.setattr(NormUse, "emit_weight", doubled)
    batches = list(torch.randn(BATCHES, 4, 4, 4, dtype=dtype))
    compressor = dropinf.Compressor(Normed(faint).to(dtype), dropinf.Identity(), loss)
    compressor.compress(batches[:-1])
    assert [audit.why for audit in compressor.audits] == ["first batch"]
    with pytest.raises(dropinf.AttributionError, match="layer norm: its per-sample"):
        compressor.compress(batches)


class Keyed(nn.Module):
    """Attention whose key bias changes nothing, so that its gradient is rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.head((x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("sketch", [dropinf.Dropout(6, whiten=True), dropinf.PCA(6, whiten=True)], ids=["mask", "pca"])
def test_whitened_rounding_is_no_fault(sketch) -> None:
    """As large as others once it is whitened, it differs wholly from backward to backward, and that is all it does."""
    torch.manual_seed(0)
    model = Keyed()
    batches = [(torch.randint(0, 50, (8, 12)), torch.randint(0, 3, (8,))) for _ in range(20)]
    compressor = dropinf.Compressor(model, sketch, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    compressor.calibrate(batches[:5])
    rows = compressor.compress(batches)
    assert {layer.route for layer in compressor.layers.values()} == {"hook"}
    assert max(audit.worst for audit in compressor.audits) < 1e-3
    assert len(rows) == 160
