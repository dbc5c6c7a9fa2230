"""Models without a fault in capture, on which rows, moments or the audit's verdict could be wrong all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dropinf
from dropinf.capture.modules import LinearUse
from tests.api.models import Lambda
from tests.api.oracle import assert_equal_gradients, oracle
from tests.capture import mutants_hooks
from tests.capture.mutants_models import N, loss_fn


@pytest.mark.parametrize("part", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_lost_row_is_seen_however_small_it_is(dtype, part, monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Linear(6, 6, bias=False).to(dtype), torch.randn(N, 6, dtype=dtype)
    x[3] *= part
    wanted = dropinf.Compressor(model, dropinf.Dropout(5), first_order, audit="never").compress([x]).flat[3]
    mutants_hooks.gradient_of_a_small_sample_lost(monkeypatch)
    found = dropinf.Compressor(model, dropinf.Dropout(5), first_order).compress([x]).flat[3]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def first_order(model: nn.Module, x: Tensor) -> Tensor:
    """A loss whose gradients are as large as the sample's numbers."""
    return model(x).sum(1)


@pytest.mark.parametrize("kind", ["linear", "raw"])
def test_a_block_in_two_reentrant_checkpoints(kind):
    """Autograd finishes the gradient of a shared weight twice, once in each checkpoint's own backward."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh()) if kind == "linear" else Product()

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(m.block, x, use_reentrant=True)
        return m.head(x)

    model = Lambda(forward, block=block, head=nn.Linear(6, 2)).double()
    x = torch.randn(N, 6, dtype=torch.float64, requires_grad=True)
    wanted = oracle(model, loss_fn, x, N)
    compressor = dropinf.Compressor(model, dropinf.Dropout(3), loss_fn)
    assert_equal_gradients(compressor, compressor.compress([x]), wanted)


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w)


def test_a_layout_that_changes_while_every_shape_stays():
    """The data says whether positions come first; there are as many of them as samples."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        first = float(x[..., 0].min()) > 0
        h = m.b(torch.tanh(m.a(x.transpose(0, 1) if first else x)))
        return h.transpose(0, 1) if first else h

    torch.manual_seed(0)
    x = torch.randn(2, N, N, 6, dtype=torch.float64)
    x[0, ..., 0], x[1, ..., 0] = -1, 1
    model = Lambda(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 3)).double()
    compressor = dropinf.Compressor(model, dropinf.Dropout(3), loss_fn)
    found = compressor.compress(list(x))
    wanted = {n: torch.cat([oracle(model, loss_fn, b, N)[n] for b in x]) for n, _ in model.named_parameters()}
    assert_equal_gradients(compressor, found, wanted)


# Samples whose places depend on the data. None of these calls says so by an index of an activation's rows.


def turned(m: nn.Module, x: Tensor) -> Tensor:
    """The data says which dimension of the input comes first, and over which the output is summed."""
    first = int(float(x.min()) > 0)
    return m.b(torch.tanh(m.a(x.transpose(0, first)))).sum(1 - first)


def stacked(m: nn.Module, x: Tensor) -> Tensor:
    first = int(float(x.min()) > 0)
    return m.b(torch.tanh(m.a(torch.stack(list(x.unbind(1)), 1 - first)))).sum(1 - first)


def einsum(m: nn.Module, x: Tensor) -> Tensor:
    kept, moved = ("ntd->ntd", "ntd->ntd") if float(x.min()) < 0 else ("ntd->tnd", "tnd->ntd")
    return torch.einsum(moved, m.b(torch.tanh(m.a(torch.einsum(kept, x)))))


def halves(m: nn.Module, x: Tensor) -> Tensor:
    """The data says whether the halves of a sample are neighbours."""
    apart = float(x.min()) > 0
    h = m.b(torch.tanh(m.a(x.unflatten(1, (2, -1)).transpose(0, int(apart)).flatten(0, 1))))
    return h.unflatten(0, (2, len(x)) if apart else (len(x), 2)).sum((0, 2) if apart else (1, 2))


@pytest.mark.parametrize("forward", [turned, stacked, einsum, halves], ids=lambda f: f.__name__)
def test_a_layout_that_the_data_decides(forward):
    torch.manual_seed(0)
    x = torch.rand(2, N, N, 6, dtype=torch.float64) + 0.1
    x[0] *= -1
    assert_rows(forward, x)


def in_order(back: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Samples are sorted by their first number inside, and put back by a function of rows and of the order."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return back(m.b(torch.tanh(m.a(x[order]))), order)

    return forward


def one_hot(order: Tensor) -> Tensor:
    return F.one_hot(order, len(order)).double().T


WAYS_BACK = {
    "index": lambda h, order: h[order.argsort()],
    "index_copy": lambda h, order: torch.zeros_like(h).index_copy(0, order, h),
    "matmul": lambda h, order: one_hot(order) @ h,
    "bmm": lambda h, order: torch.bmm(one_hot(order)[None], h[None])[0],
    "linear": lambda h, order: F.linear(h.T, one_hot(order)).T,
    "product_and_sum": lambda h, order: (one_hot(order)[:, :, None] * h).sum(1),
    "unbind": lambda h, order: torch.stack([h.unbind()[i] for i in order.argsort().tolist()]),
    "chunk": lambda h, order: torch.cat([h.chunk(len(h))[i] for i in order.argsort().tolist()]),
    "split": lambda h, order: torch.cat([h.split(1)[i] for i in order.argsort().tolist()]),
    "split_with_sizes": lambda h, order: torch.cat(
        [h.split_with_sizes([1] * len(h))[i] for i in order.argsort().tolist()]
    ),
    "vsplit": lambda h, order: torch.cat([torch.vsplit(h, len(h))[i] for i in order.argsort().tolist()]),
}


@pytest.mark.parametrize("back", WAYS_BACK)
def test_samples_that_are_sorted_inside(back):
    """Those of the first batch are in order already."""
    torch.manual_seed(0)
    x = torch.randn(2, N, 6, dtype=torch.float64)
    x[0] = x[0][x[0, :, 0].argsort()]
    x[1] = x[1][x[1, :, 0].argsort().flip(0)]
    assert_rows(in_order(WAYS_BACK[back]), x)


def assert_rows(forward: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> None:
    model = Lambda(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 3)).double()
    compressor = dropinf.Compressor(model, dropinf.Dropout(3), loss_fn)
    found = compressor.compress(list(x))
    wanted = {n: torch.cat([oracle(model, loss_fn, b, N)[n] for b in x]) for n, _ in model.named_parameters()}
    assert_equal_gradients(compressor, found, wanted)


def test_calibration_takes_the_layout_that_its_audit_finds():
    """The moments of two batches are the mean of each one's, though the second has another layout."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        first = float(x.min()) > 0
        h = m.b(torch.tanh(m.a(x.permute((1, 2, 0, 3) if first else (1, 0, 2, 3)).flatten(0, 1))))
        return h.unflatten(0, (2, -1)).sum((0, 1) if first else (0, 2))

    torch.manual_seed(0)
    model = Lambda(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 3)).double()
    x = torch.rand(2, N, 2, N, 6, dtype=torch.float64) + 0.1
    x[0] *= -1

    def moment(*batches: Tensor) -> Tensor:
        compressor = dropinf.Compressor(model, dropinf.Dropout(3, sampling="energy"), loss_fn, audit="every")
        compressor.calibrate(batches)
        return compressor.moments("a.bias")["out"]

    torch.testing.assert_close(moment(x[0], x[1]), (moment(x[0]) + moment(x[1])) / 2)


# Gradients that are zero but for rounding.


def attention(m: nn.Module, x: Tensor) -> Tensor:
    """The keys' bias moves every score of a query alike, so its gradient is zero."""
    q, k, v = (part[:, None] for part in (m.q(x), m.k(x), m.v(x)))
    return m.o(F.scaled_dot_product_attention(q, k, v)[:, 0])


def pooled(m: nn.Module, x: Tensor) -> Tensor:
    """So does a bias in front of a softmax over positions."""
    return torch.softmax(m.a(x), 1).square().mean(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("forward", [attention, pooled], ids=lambda f: f.__name__)
def test_a_layer_whose_gradient_is_rounding_is_not_refused(forward, dtype):
    for seed in range(6):
        torch.manual_seed(seed)
        parts = {n: nn.Linear(16, 16) for n in ("qkvo" if forward is attention else "a")}
        compressor = dropinf.Compressor(Lambda(forward, **parts).to(dtype), dropinf.Dropout(8), squared_in_float32)
        try:
            compressor.compress([torch.randn(2 * N, 64, 16).to(dtype)])
        except dropinf.AttributionError as error:
            # In float16 all that a sum of small numbers leaves is rounding.
            assert dtype == torch.float16 and "half precision" in str(error)  # noqa: PT017, PT018
        else:
            assert set(compressor._sweep.ladder.rungs.values()) == {"hook"}


def squared_in_float32(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out.to(torch.promote_types(out.dtype, torch.float32)).square().flatten(1).sum(1)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_gradients_in_half_precision_are_not_taken_for_mixed_samples(dtype, scale):
    """Those of float16 are rounded to multiples of 6e-8: no power of two multiplies them exactly."""
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype), torch.randn(2 * N, 16)
    compressor = dropinf.Compressor(model, dropinf.Dropout(8), lambda m, x: scale * squared_in_float32(m, x))
    try:
        compressor.compress([x.to(dtype)])
    except dropinf.AttributionError as error:
        assert scale == 1e-6 and dtype == torch.float16 and "half precision" in str(error)  # noqa: PT017, PT018


@pytest.mark.parametrize("scale", [1e3, 1e4, 2.5e4])
def test_large_gradients_in_half_precision_are_audited_though_their_sum_overflows(scale):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).half()
    x = [torch.randn(5, 8).half() for _ in range(5)]

    def loss(m, batch):
        return scale * squared_in_float32(m, batch)

    compressor = dropinf.Compressor(model, dropinf.Identity(), loss, audit="every")
    rows = compressor.compress(x)
    each = [torch.autograd.grad(losses, model[0].weight, retain_graph=True)[0] for b in x for losses in loss(model, b)]
    want = torch.stack(each).float()
    assert want.isfinite().all()
    assert float((rows["0"].float() - want).norm() / want.norm()) < 0.01
    assert [audited.batch for audited in compressor.audits] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_of_little_gradient_is_audited_in_half_precision(dtype, monkeypatch):
    """Its rows are the next sample's; its gradient is a hundredth of the largest."""
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype), torch.randn(2 * N, 16)
    with torch.no_grad():
        model[2].weight.mul_(0.02)
    compressor = dropinf.Compressor(model, dropinf.Identity(), squared_in_float32)
    want = compressor.compress([x.to(dtype)])["0"]
    right = LinearUse.emit_weight
    monkeypatch.setattr(
        LinearUse,
        "emit_weight",
        lambda use, layer, *rest: right(use, layer, *rest).roll(int(layer.name == "0"), 0),
    )
    faulty = dropinf.Compressor(model, dropinf.Identity(), squared_in_float32)
    got = faulty.compress([x.to(dtype)])
    assert float(got["0"].norm() / got["2"].norm()) < 0.02
    assert faulty._sweep.ladder.rungs["0"] != "hook"
    assert float((got["0"] - want).norm() / want.norm()) < 0.02


def test_a_float64_model_that_computes_in_float32_inside_is_not_refused():
    def forward(m, x):
        h = m.a(x).float()
        return m.b((1e3 * h - 999 * h).to(x.dtype))  # three digits fewer than float32 has

    for seed in range(6):
        torch.manual_seed(seed)
        model = Lambda(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16)).double()
        compressor = dropinf.Compressor(model, dropinf.Identity(), lambda m, x: m(x).square().flatten(1).sum(1))
        compressor.compress([torch.randn(2 * N, 64, 16).double()])
        assert set(compressor._sweep.ladder.rungs.values()) == {"hook"}
