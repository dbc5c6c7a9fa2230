"""Batches whose samples are all alike: nothing tells what they share from what is a sample's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from tests.capture.right_or_refused import Cases, check, doubles, runs  # noqa: F401

CASES = Cases()


class Positions(nn.Module):
    """Tokens and positions, which all samples share, and a pooled head."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.tokens, self.head = kind, nn.Embedding(7, 4), nn.Linear(4, 7)
        self.positions, self.scale = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, ids):
        there = self.positions(torch.arange(ids.shape[1]))
        there = self.scale(there) if self.kind == "scaled" else there
        return self.head(torch.tanh(self.tokens(ids) + there))


def text(m, ids):
    return F.cross_entropy(m(ids).transpose(1, 2), ids, reduction="none").sum(1)


def regression(m, batch):
    x, y = batch
    there = m.positions(torch.arange(3)).sum()
    return (m.scale(x).sum(1) + there - y) ** 2


ROWS = {"several ids": [1, 3, 2], "one id": [4, 4, 4], "none": [0, 0, 0], "there and back": [2, 5, 2]}
for name, row in ROWS.items():
    for kind in ("plain", "scaled"):

        def same(row=row, kind=kind):
            alike = torch.tensor([row] * 4)
            return Positions(kind), text, [alike, torch.randint(7, (4, 3)), alike[:3], alike]

        same.__name__ = f"{name.replace(' ', '_')}_{kind}"
        CASES.add(right=name != "none")(same)


@CASES.add()
def numbers():
    alike = torch.ones(4, 4), torch.ones(4)
    return Positions("plain"), regression, [alike, (torch.randn(4, 4), torch.randn(4)), alike]


@CASES.parametrize()
@runs
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_samples_that_meet_are_refused_though_they_are_alike(row):
    model = Positions("plain")

    def centred(m, ids):
        h = m.tokens(ids).mean(1)
        return m.head(h - h.mean(0)).square().sum(1) + m.head(h).sum(1)

    with pytest.raises(dropinf.AttributionError):
        dropinf.Compressor(model, dropinf.Identity(), centred, layers=["tokens", "head"]).compress(
            [torch.tensor([row] * 4), torch.randint(7, (4, 3))]
        )


def test_a_row_that_all_samples_take_from_one_is_refused_though_all_are_alike():
    model = Positions("plain")

    def taken(m, x):
        return (m.scale(x) * m.scale(x[-1:])).sum(1)

    for batches in ([torch.ones(4, 4)], [torch.ones(4, 4), torch.randn(4, 4)]):
        with pytest.raises(dropinf.AttributionError):
            dropinf.Compressor(model, dropinf.Identity(), taken, layers=["scale"]).compress(batches)
