"""Packed documents that are equally long in the first batch, and not in later ones, through every kind of module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.right_or_refused import check, doubles, runs  # noqa: F401

D = 6
# By whom each position, or each document, is taken for itself: as an image, a sequence, a row.
MODULES = {
    "conv1d": (lambda: nn.Conv1d(1, 1, 3, padding=1), lambda m, x: m(x[:, None])[:, 0]),
    "conv1d_channels": (lambda: nn.Conv1d(2, 3, 2, groups=1), lambda m, x: m(x.view(-1, 2, 3)).flatten(1)),
    "conv1d_groups": (lambda: nn.Conv1d(2, 2, 2, groups=2), lambda m, x: m(x.view(-1, 2, 3)).flatten(1)),
    "conv2d": (lambda: nn.Conv2d(1, 2, 2), lambda m, x: m(x.view(-1, 1, 2, 3)).flatten(1)),
    "conv3d": (lambda: nn.Conv3d(1, 1, (1, 2, 2)), lambda m, x: m(x.view(-1, 1, 1, 2, 3)).flatten(1)),
    "transposed": (lambda: nn.ConvTranspose1d(1, 1, 2), lambda m, x: m(x[:, None])[:, 0]),
    "linear": (lambda: nn.Linear(D, 3), lambda m, x: m(x)),
    "heads": (lambda: nn.Linear(3, 3), lambda m, x: m(x.view(-1, 2, 3)).flatten(1)),
    "heads_first": (lambda: nn.Linear(3, 3), lambda m, x: m(x.view(-1, 2, 3).transpose(0, 1)).transpose(0, 1).flatten(1)),
    "layer_norm": (lambda: nn.LayerNorm(D), lambda m, x: m(x)),
    "group_norm": (lambda: nn.GroupNorm(1, 2), lambda m, x: m(x.view(-1, 2, 3)).flatten(1)),
    "batch_norm": (lambda: nn.BatchNorm1d(D).eval(), lambda m, x: m(x)),
    "embedding": (lambda: nn.Embedding(9, 3), lambda m, x: m((x.abs() * 9).long() % 9).flatten(1)),
    "embedding_bag": (lambda: nn.EmbeddingBag(9, 3), lambda m, x: m((x.abs() * 9).long() % 9)),
    "bilinear": (lambda: nn.Bilinear(D, D, 2), lambda m, x: m(x, x.sin())),
    "prelu": (lambda: nn.PReLU(D), lambda m, x: m(x)),
    "gru_cell": (lambda: nn.GRUCell(D, 3), lambda m, x: m(x)),
    "lstm": (lambda: nn.LSTM(2, 3, batch_first=True), lambda m, x: m(x.view(-1, 3, 2))[0].flatten(1)),
    "attention": (
        lambda: nn.MultiheadAttention(2, 1, batch_first=True),
        lambda m, x: m(*3 * [x.view(-1, 3, 2)])[0].flatten(1),
    ),
}  # fmt: skip
LENGTHS = {
    "equal_at_first": ([2, 2], [1, 3], [3, 1]),
    "a_total_of_the_same_size": ([2, 3, 1], [3, 2, 1], [1, 4, 1], [4, 1, 1], [6, 1, 2]),
    "one_each": ([1, 1], [1, 3], [2, 2]),
    "one_with_many": ([3, 3], [5, 1], [3, 1]),
}


class Net(nn.Module):
    def __init__(self, make, use):
        super().__init__()
        self.module, self.use = make(), use
        self.last = nn.LazyLinear(1)

    def forward(self, x):
        return self.last(torch.tanh(self.use(self.module, x)))[:, 0]


def loss(model, batch):
    x, cu = batch
    owner = torch.repeat_interleave(torch.arange(len(cu) - 1), cu.diff())
    return torch.zeros(len(cu) - 1, dtype=x.dtype).index_add(0, owner, model(x).square())


@runs
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", MODULES)
def test_documents_of_other_lengths(name, lengths, sketch, backwards):
    def build():
        model = Net(*MODULES[name])
        model(torch.randn(4, D))
        bounds = [F.pad(torch.tensor(x).cumsum(0), (1, 0)) for x in LENGTHS[lengths]]
        return model, loss, [(torch.randn(int(cu[-1]), D), cu) for cu in bounds]

    check(build, sketch, backwards, cu_seqlens=lambda batch: batch[1])


# Windows of four positions: as many as documents, which have one each in the first batch alone.
WINDOWS = {
    "patches": lambda m, x: m.conv(x.transpose(1, 2)).mT,
    "pointwise": lambda m, x: m.point(x.transpose(1, 2)).mT,
    "added": lambda m, x: x + m.w,
    "multiplied": lambda m, x: x * m.w,
    "linear": lambda m, x: m.linear(x),
    "norm_of_windows": lambda m, x: m.norm(x),
    "scores": lambda m, x: x @ m.w.T,
    "einsum": lambda m, x: torch.einsum("btd,td->btd", x, m.w),
    "table": lambda m, x: x + F.embedding(torch.arange(4), m.w),
}


class Windows(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.does = does
        self.conv, self.point = nn.Conv1d(D, D, 3, padding=1), nn.Conv1d(D, D, 1)
        self.w, self.linear = nn.Parameter(torch.randn(4, D)), nn.Linear(D, D)
        self.norm, self.last = nn.LayerNorm((4, D)), nn.LazyLinear(1)

    def forward(self, x):
        h = self.does(self, x.view(-1, 4, D))
        return self.last(torch.tanh(h)).flatten()


@runs
@pytest.mark.parametrize(
    "windows", [((1, 1, 1), (2, 1, 0), (0, 0, 3)), ((1, 1), (2, 0), (0, 2)), ((2, 2), (1, 1), (0, 2))]
)
@pytest.mark.parametrize("does", WINDOWS)
def test_windows_of_documents(does, windows, sketch, backwards):
    def build():
        model = Windows(WINDOWS[does])
        model(torch.randn(4, D))
        bounds = [F.pad(4 * torch.tensor(x).cumsum(0), (1, 0)) for x in windows]
        return model, loss, [(torch.randn(int(cu[-1]), D), cu) for cu in bounds]

    check(build, sketch, backwards, cu_seqlens=lambda batch: batch[1])
