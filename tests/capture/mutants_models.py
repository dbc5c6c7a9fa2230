"""The small float64 models on which faults in capture act, with their batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from dropinf.workload import map_tensors
from tests.api.models import Lambda, squared

N = 4


def squares() -> tuple[nn.Module, list[Any]]:
    """Three linears of one square shape."""
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), [torch.randn(N, 6)]


def many_batches() -> tuple[nn.Module, list[Any]]:
    return squares()[0], list(torch.randn(17, N, 6))


def unequal() -> tuple[nn.Module, list[Any]]:
    """The gradients of the last sample are about a thousandth of the others'."""
    return nn.Linear(6, 6, bias=False), [torch.randn(N, 6) * torch.tensor([[1], [1], [1], [1e-3]])]


def twice() -> tuple[nn.Module, list[Any]]:
    return Lambda(lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(6, 6), b=nn.Linear(6, 2)), list(
        torch.randn(3, N, 3, 6)
    )


def sequence() -> tuple[nn.Module, list[Any]]:
    """A linear on [N, T, d] gives a view, and the ReLU changes it in place."""
    return nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.Linear(6, 5)), [
        torch.randn(N, 3, 7)
    ]


def own_hook() -> tuple[nn.Module, list[Any]]:
    """A forward hook of the user's changes what a layer gives."""
    model, batches = squares()
    model[2].register_forward_hook(lambda module, args, out: out * 3)
    return model, batches


def tokens() -> tuple[nn.Module, list[Any]]:
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=0), nn.RMSNorm(6), nn.Linear(6, 5))
    with torch.no_grad():
        model[0].weight[0].normal_()
    return model, [torch.tensor([[0, 3, 3, 4], [1, 0, 1, 5], [7, 7, 7, 0], [2, 2, 6, 8]])]


def tied() -> tuple[nn.Module, list[Any]]:
    model = Lambda(
        lambda m, ids: m.head(torch.tanh(m.tokens(ids))),
        tokens=nn.Embedding(6, 6),
        head=nn.Linear(6, 6, bias=False),
    )
    model.head.weight = model.tokens.weight
    return model, [torch.randint(0, 6, (N, 3))]


def images() -> tuple[nn.Module, list[Any]]:
    """Convolutions in groups, padded unevenly and by reflection, with both kinds of norm."""
    model = nn.Sequential(
        nn.Conv2d(4, 6, 2, padding="same", groups=2),
        nn.GroupNorm(2, 6),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Conv2d(6, 4, 2, stride=2, bias=False),
        nn.Flatten(),
    )
    with torch.no_grad():
        model[4].running_mean.normal_()
        model[4].running_var.uniform_(0.5, 2)
    return model, [torch.randn(N, 4, 4, 4)]


def two_views() -> tuple[nn.Module, list[Any]]:
    """Two images a sample, one behind the other."""
    return Lambda(
        lambda m, x: m.head(torch.tanh(m.conv(x.flatten(0, 1))).flatten(1)).reshape(len(x), -1),
        conv=nn.Conv2d(2, 3, 2),
        head=nn.Linear(12, 3),
    ), [torch.randn(N, 2, 2, 3, 3)]


def halves() -> tuple[nn.Module, list[Any]]:
    """Two views of a sample at places i and i + N."""
    return Lambda(
        lambda m, x: torch.cat(m.b(torch.tanh(m.a(torch.cat([x[:, 0], x[:, 1]])))).chunk(2), 1),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 3),
    ), list(torch.randn(2, N, 2, 6))


def time_first() -> tuple[nn.Module, list[Any]]:
    """As many positions as samples, positions first."""
    return Lambda(
        lambda m, x: m.b(torch.tanh(m.a(x.transpose(0, 1)))).transpose(0, 1), a=nn.Linear(6, 6), b=nn.Linear(6, 3)
    ), [torch.randn(N, N, 6)]


def scattered() -> tuple[nn.Module, list[Any]]:
    """Rows of all samples in no regular order, in a linear and in a convolution."""
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if len(x) != N:  # one sample alone has its rows in order
            return m.b(torch.tanh(m.conv(x.flatten(0, 1))).flatten(1)).reshape(len(x), -1)
        rows = m.b(torch.tanh(m.conv(x.flatten(0, 1)[order])).flatten(1))
        return rows[order.argsort()].reshape(len(x), -1)

    return Lambda(forward, conv=nn.Conv1d(2, 3, 2), b=nn.Linear(9, 6)), [torch.randn(N, 2, 2, 4)]


def sorted_rows() -> tuple[nn.Module, list[Any]]:
    """Samples sorted by their first number inside; those of the first batch are in order."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return m.b(torch.tanh(m.a(x[order])))[order.argsort()]

    x = torch.randn(4, N, 6)
    x[0] = x[0][x[0, :, 0].argsort()]
    x[1] = x[1][x[1, :, 0].argsort().flip(0)]
    return Lambda(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 3)), list(x)


def sorted_positions() -> tuple[nn.Module, list[Any]]:
    """Samples sorted inside and behind as many positions; the order of the first batch is another one."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        order = x[:, 0, 0].argsort()
        return m.b(torch.tanh(m.a(x[order].transpose(0, 1)))).transpose(0, 1)[order.argsort()]

    x = torch.randn(4, N, N, 6)
    x[0] = x[0][x[0, :, 0, 0].argsort()]
    x[1] = x[1][x[1, :, 0, 0].argsort().flip(0)]
    x[2] = x[2][x[2, :, 0, 0].argsort()[[2, 0, 3, 1]]]
    return Lambda(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 3)), list(x)


def either_way() -> tuple[nn.Module, list[Any]]:
    """The data says whether positions come first, or one half of each sample comes behind the other."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if float(x.max()) < 0:
            return m.b(m.a(x.transpose(0, 1))).transpose(0, 1)
        halves = x.unflatten(1, (2, -1)).transpose(0, 1)
        h = m.b(m.a(halves.flatten(0, 1)))
        return h.unflatten(0, (2, -1)).transpose(0, 1).flatten(1, 2)

    x = torch.rand(2, N, 2 * N, 6) + 0.1
    return Lambda(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 3)), [-x[0], x[1]]


class Views(nn.Module):
    """Parameters that ops read in parts: the thirds of a fused matrix, its columns, its transpose, one expert."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "fused": (12, 6),
            "columns": (6, 8),
            "turned": (6, 6),
            "experts": (3, 6, 6),
            "shift": (2, 6),
        }.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.fused.chunk(2)
        x = torch.tanh(F.linear(x, q)) * F.linear(x, k)
        x = torch.tanh(x @ self.columns[:, 2:])
        x = torch.tanh(F.linear(x, self.turned.T))
        return torch.tanh(x @ self.experts[1]) + self.shift[1]


def views() -> tuple[nn.Module, list[Any]]:
    return Views(), [torch.randn(N, 3, 6)]


class Tables(nn.Module):
    """Raw tables, looked up by two functions, and a bias that a functional linear adds."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"words": (9, 6), "places": (5, 6), "weight": (6, 6), "bias": (6,)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.words, padding_idx=0) + self.places[ids % 5]
        return torch.tanh(F.linear(x, self.weight, self.bias))


def tables() -> tuple[nn.Module, list[Any]]:
    return Tables(), [torch.tensor([[0, 3, 3, 4], [1, 0, 1, 5], [7, 7, 7, 0], [2, 2, 6, 8]])]


def grouped_mm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """torch's function of this name, which takes no float64: groups of rows, each with its own matrix."""
    if has_torch_function((x, w, offs)):
        return handle_torch_function(grouped_mm, (x, w, offs), x, w, offs=offs)
    edges = [0, *offs.tolist()]
    return torch.cat([x[i:j] @ m for i, j, m in zip(edges[:-1], edges[1:], w, strict=True)])


def grouped() -> tuple[nn.Module, list[Any]]:
    """Rows of all samples, sorted by expert."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        expert = (rows[:, :2] > 0).sum(1)
        order = expert.argsort(stable=True)
        ends = expert.bincount(minlength=3).cumsum(0).to(torch.int32)
        return torch.tanh(grouped_mm(rows[order], m.experts, offs=ends))[order.argsort()].view(len(x), -1)

    return Lambda(forward, experts=nn.Parameter(torch.randn(3, 6, 6))), [torch.randn(N, 5, 6)]


def in_parts() -> tuple[nn.Module, list[Any]]:
    """A block in two reentrant checkpoints: autograd finishes its gradients twice, once in each one's own backward."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.first(x)
        for _ in range(2):
            x = checkpoint(m.block, x, use_reentrant=True)
        return x

    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    return Lambda(forward, first=nn.Linear(6, 6), block=block), [torch.randn(N, 6)]


def resting() -> tuple[nn.Module, list[Any]]:
    """Positions first, and no gradient in the first batch but that of the last layer's bias."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        on = (x[:, 0, :1] > 0).to(x)[:, None]
        return m.head(m.a(x.transpose(0, 1)).transpose(0, 1) * on)

    x = torch.randn(2, N, N, 6)
    x[0, :, 0, 0], x[1, :, 0, 0] = -1, 1
    return Lambda(forward, a=nn.Linear(6, 6), head=nn.Linear(6, 3)), list(x)


def packed() -> tuple[nn.Module, list[Any]]:
    """Documents of 2, 3, 4 and 3 rows behind one another."""
    lengths = torch.tensor([0, 2, 5, 9, 12], dtype=torch.int32)

    def forward(m: nn.Module, x: Tensor, cu: Tensor) -> Tensor:
        out = m.b(torch.tanh(m.a(x)))
        return torch.stack([out[i:j].sum(0) for i, j in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)])

    return Lambda(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 3)), [(torch.randn(12, 6), lengths)]


class Raw(nn.Module):
    """Parameters that ops read: a sum, a difference, products, a table, a token, and weights that are computed."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "shift": (3, 6), "bias": (6,), "scale": (6,), "gate": (3, 1), "left": (6, 6), "right": (6, 6), "mixed": (6, 6),
            "doubled": (6, 6), "v": (6, 6), "g": (6, 6), "token": (1, 1, 6),
            "slope": (3,),
        }.items():  # fmt: skip
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh((x - self.shift) * self.scale + self.bias) * self.gate
        x = torch.tanh(x @ self.left)
        x = torch.tanh(F.linear(x, self.right))
        x = torch.tanh(torch.einsum("nti,ij->ntj", x, self.mixed))
        x = torch.tanh(F.linear(x, 2 * self.doubled))
        x = torch.tanh(F.linear(x, torch.tanh(self.v) * self.g))
        x = torch.tanh(F.prelu(x, self.slope))
        x = torch.cat([self.token.expand(len(x), -1, -1) * x[:, :1], x], 1)
        return self.head(x)


def raw() -> tuple[nn.Module, list[Any]]:
    return Raw(), [torch.randn(N, 3, 6)]


def ranks() -> tuple[nn.Module, list[Any]]:
    """The second batch has a dimension more."""
    return squares()[0], [torch.randn(N, 6), torch.randn(N, 3, 6)]


def sizes() -> tuple[nn.Module, list[Any]]:
    """The last batch is one sample."""
    return squares()[0], [torch.randn(N, 6), torch.randn(1, 6)]


def branches() -> tuple[nn.Module, list[Any]]:
    """The third batch is the first to reach a module."""
    x = torch.rand(3, N, 6) + 0.1
    return Lambda(
        lambda m, x: m.head(m.a(x) if float(x.min()) > 0 else m.b(x)),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
    ), [x[0], x[1], -x[2]]


def detached() -> tuple[nn.Module, list[Any]]:
    """Both batches call both modules; in the first one's losses one of them has no part."""
    x = torch.rand(2, N, 6) + 0.1
    return Lambda(
        lambda m, x: m.a(x) + (m.b(x) if float(x.min()) < 0 else m.b(x).detach()), a=nn.Linear(6, 6), b=nn.Linear(6, 6)
    ), [x[0], -x[1]]


MODELS = {
    f.__name__: f
    for f in (
        squares, many_batches, unequal, twice, sequence, own_hook, tokens, tied, images, two_views, halves, time_first,
        scattered, sorted_rows, sorted_positions, either_way, in_parts, resting, packed, raw, views, tables, grouped, ranks,
        sizes, branches, detached,
    )
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, list[Any]]:
    """Return a model in float64 and eval mode, and its batches."""
    torch.manual_seed(3)
    model, batches = MODELS[name]()
    return model.double().eval(), [
        map_tensors(lambda t: t.double() if t.is_floating_point() else t, b) for b in batches
    ]


def cu_seqlens(model: str) -> Callable[[Any], Tensor] | None:
    """Return what says where the documents of a model's batches are, if they are packed."""
    return (lambda batch: batch[1]) if model == "packed" else None


def singles(batch: Any) -> list[Any]:
    """Return the samples of a batch, as batches of one."""
    if isinstance(batch, Tensor):
        return list(batch.split(1))
    x, cu = batch
    return [(x[i:j], torch.tensor([0, j - i])) for i, j in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]


loss_fn = squared
