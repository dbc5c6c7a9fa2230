"""Samples that stay apart in the first batch, because of its data, and meet in a later one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from tests.capture.right_or_refused import Cases, check, doubles, mlp, points, runs  # noqa: F401

CASES = Cases()
MIXES = {"right": False, "says": "mixing=True|depend"}


def far_and_near(scale: float = 10.0):
    """Three batches of four; the numbers of the second and third are large."""
    x = points(4, 4, 4)
    return [x[0] * 0.1, x[1] * scale, x[2] * scale]


def own(m, x):
    return m(x).square().sum(1)


def scripted(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, order) * 2


SCRIPT = torch.jit.script(scripted)


class Clipped(torch.autograd.Function):
    """Leaves activations as they are, and limits the norm of the whole batch's gradient."""

    @staticmethod
    def forward(_, x):
        return x.view_as(x)

    @staticmethod
    def backward(_, g):
        return g * (1 / g.norm()).clamp(max=1)


def clipped_by_a_hook(m, x):
    h = m(x)
    h.register_hook(lambda g: g * (1 / g.norm()).clamp(max=1))
    return h.square().sum(1)


def attended(m, x):
    """Attention over the whole batch, whose mask the data opens."""
    h = m(x)
    allowed = torch.eye(len(x), dtype=torch.bool) | (x.abs().max() > 2)
    return F.scaled_dot_product_attention(h[None], h[None], h[None], attn_mask=allowed)[0].square().sum(1)


LOSSES = {
    "hinge_over_the_batch": lambda m, x: own(m, x) + F.relu(own(m, x).mean() - 0.3),
    "margin_to_the_next_sample": lambda m, x: own(m, x) + F.relu(own(m, x).roll(1) - 0.3),
    "clamped_mean": lambda m, x: own(m, x) * own(m, x).mean().clamp(min=0.3),
    "gate_that_opens": lambda m, x: own(m, x) + (x.abs().max() > 2) * own(m, x).flip(0),
    "mask_that_becomes_full": attended,
    "matrix_that_fills": lambda m, x: (torch.eye(4) + (x.abs().max() > 2) * torch.ones(4, 4)) @ own(m, x),
    "clipped_by_a_hook": clipped_by_a_hook,
    "clipped_by_a_function": lambda m, x: Clipped.apply(m(x)).square().sum(1),
    "running_maximum": lambda m, x: own(m, x) + F.relu(own(m, x).cummax(0).values - own(m, x).detach() - 0.1),
    "normalised_where_large": lambda m, x: torch.where(own(m, x) > 0.3, own(m, x) / own(m, x).sum(), own(m, x)),
    "distances_below_a_radius": lambda m, x: own(m, x) + F.relu(torch.cdist(m(x), m(x)) - 0.5).sum(1),
}
for name, loss in LOSSES.items():

    def of(loss=loss):
        return mlp(), loss, far_and_near()

    of.__name__ = name
    CASES.add(**MIXES)(of)


@CASES.add()
def rows_moved_by_a_script():
    orders = [torch.arange(4), torch.tensor([2, 0, 3, 1]), torch.tensor([3, 2, 1, 0])]
    return mlp(), lambda m, b: SCRIPT(m(b[0]), b[1]).square().sum(1), list(zip(points(4, 4, 4), orders, strict=True))


@CASES.add()
def rows_moved_by_a_call_of_aten():
    def loss(m, b):
        return torch.ops.aten.index_select(m(b[0]), 0, b[1]).square().sum(1)

    orders = [torch.arange(4), torch.tensor([2, 0, 3, 1]), torch.tensor([3, 2, 1, 0])]
    return mlp(), loss, list(zip(points(4, 4, 4), orders, strict=True))


class Whitened(nn.Module):
    """Centres its rows over the batch once they are large."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = self.a(x)
        return self.b(h - h.mean(0) * (h.abs().max() > 4))


@CASES.add(**MIXES)
def centred_inside_the_model():
    return Whitened(), lambda m, x: m(x).square().sum(1), far_and_near()


NUMBERS = {
    "rolled_index": lambda h, k: h[torch.arange(12).roll(k)],
    "shifted_index": lambda h, k: h[(torch.arange(12) + k) % 12],
    "slice_of_an_index": lambda h, k: h[torch.arange(24)[k : k + 12] % 12],
    "gathered": lambda h, k: h.gather(0, torch.arange(12).roll(k)),
    "every_kth": lambda h, k: h[torch.arange(12 * k)[:: k or 1][:12] % 12],
    "item": lambda h, k: h[torch.arange(12).roll(k)],
    "list": lambda h, k: h[torch.arange(12).roll(k)],
}
for name, moved in NUMBERS.items():

    def by_numbers(moved=moved, name=name):
        take = {"item": lambda k: k.max().item(), "list": lambda k: k.tolist()[0]}.get(name, int)
        shifts = (1, 5, 7) if name == "every_kth" else (0, 5, 7)
        data = [torch.full((12,), k) if name in ("item", "list") else k for k in shifts]
        return mlp(), lambda m, b: moved(own(m, b[0]), take(b[1])), list(zip(points(12, 12, 12), data, strict=True))

    by_numbers.__name__ = f"rows_moved_by_a_number_{name}"
    CASES.add()(by_numbers)


@CASES.add(**MIXES)
def groups_by_a_number_of_the_batch():
    def loss(m, b):
        return own(m, b[0]).view(b[1], -1).mean(1).repeat_interleave(12 // b[1])

    return mlp(), loss, [(x, k) for x, k in zip(points(12, 12, 12), (12, 6, 12), strict=True)]


class Table(nn.Module):
    """Weights on the left of the data, or of the batch's number of samples."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.rand(2))
        self.inner, self.step = nn.Linear(3, 3), forward

    def forward(self, x):
        return self.step(self, torch.tanh(self.inner(x)))


SAMPLES_LAST = {
    "matmul": lambda m, x: (m.w @ x.t()).t(),
    "method": lambda m, x: m.w.matmul(x.T).T,
    "mm": lambda m, x: torch.mm(m.w, x.t()).t(),
    "linear_turned": lambda m, x: F.linear(m.w, x).t(),
    "view_of_the_weight": lambda m, x: (m.w.t()[:, :3].t() @ x.t()).t(),
}
for name, step in SAMPLES_LAST.items():

    def last(step=step):
        return Table(step), lambda m, x: m(x).square().sum(1) * m.scale.prod(), points(4, 3, 5)

    last.__name__ = f"samples_last_{name}"
    CASES.add()(last)

ROUTES = ("vmap", "alone")
for route in ROUTES:

    def averaged():
        return mlp().train(), lambda m, x: own(m, x) / len(x), points(4, 3, 5)

    def table_as_long_as_a_batch():
        table = torch.randn(3, 3)
        return mlp().train(), lambda m, b: own(m, b[0] + b[1].sum(0)), [(x, table) for x in points(4, 3, 5)]

    for build in (averaged, table_as_long_as_a_batch):
        build.__name__ += f"_by_{route}"
        CASES.add(route={"*": route})(build)


@CASES.parametrize()
@runs
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


class Columns(nn.Module):
    """A raw parameter at an op whose rows are features, its columns samples, which may meet behind it or before."""

    def __init__(self, does, tracked):
        super().__init__()
        self.p, self.does = nn.Parameter(torch.randn(4, 4)), does
        self.l = nn.Linear(4, 4) if tracked else nn.Tanh()

    def forward(self, x, meets):
        h = torch.tanh(self.l(x))
        return own(lambda h: self.does(self.p, (h + meets * h.roll(1, 0)).T).T, h)


COLUMNS = {
    "solve": lambda p, h: torch.linalg.solve(p + 4 * torch.eye(4), h),
    "conv1d": lambda p, h: F.conv1d(h[None], p[:, :, None])[0],
    "triangular": lambda p, h: torch.linalg.solve_triangular(p.tril(-1) + torch.eye(4), h, upper=False),
}


@runs
@pytest.mark.parametrize("meets", [(0.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)], ids=["apart", "late", "met"])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("does", COLUMNS)
def test_samples_in_columns(does, tracked, meets, sketch, backwards):
    def build():
        batches = list(zip(points(5, 5, 5, width=4), meets, strict=True))
        return Columns(COLUMNS[does], tracked), lambda m, batch: m(*batch), batches

    check(build, sketch, backwards, right=not any(meets), says="mixing=True|depend")


@pytest.mark.parametrize("tracked", [True, False])
def test_a_contrastive_loss_of_a_raw_parameter_is_refused(tracked):
    model = Columns(lambda p, h: p @ h, tracked)

    def loss(m, x):
        z = torch.tanh(m.l(x)) @ m.p
        return F.cross_entropy(z @ z.T, torch.arange(len(x)), reduction="none")

    with pytest.raises(dropinf.AttributionError, match="mixing=True"):
        dropinf.Compressor(model, dropinf.Identity(), loss).compress(list(torch.randn(3, 5, 4)))
