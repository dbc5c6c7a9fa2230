"""What picks nothing in the batches that are audited, and something later."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.right_or_refused import Cases, check, doubles, runs  # noqa: F401

CASES = Cases()
MIXES = {"right": False, "says": "mixing=True|depend"}


class Picks(nn.Module):
    def __init__(self, pick):
        super().__init__()
        self.a, self.b, self.pick = nn.Linear(3, 4), nn.Linear(4, 2), pick

    def forward(self, x, mask):
        return self.b(self.pick(torch.tanh(self.a(x)), mask))


def loss(m, batch):
    return m(*batch).square().sum(1)


def added(h, mask):
    i = mask.nonzero()[:, 0]
    return h.index_add(0, i, h.roll(1, 0)[i])


def written(h, mask):
    h = h.clone()
    h[mask] = h.flip(0)[mask]
    return h


PICKS = {
    "copied": lambda h, k: h.index_copy(0, k.nonzero()[:, 0], h.roll(1, 0)[k.nonzero()[:, 0]]),
    "added": added,
    "written": written,
    "put": lambda h, k: h.index_put(torch.where(k), h.flip(0)[k]),
    "attended": lambda h, k: h + torch.softmax(h @ h[k].T, 1) @ h[k],
    "summed": lambda h, k: h + h[k].sum(0),
    "selected": lambda h, k: h + h.masked_select(k[:, None]).sum(),
    "scattered": lambda h, k: h.masked_scatter(k[:, None], h.flip(0)[k]),
    "repeated": lambda h, k: h + h.repeat_interleave(k.long(), 0).sum(0),
    "largest": lambda h, k: h + torch.cat([torch.zeros(1, 4), h[k]]).amax(0),
    "product": lambda h, k: h + torch.einsum("ki,kj->ij", h[k], h[k]).sum(0),
    "unique": lambda h, k: h + h[k.nonzero().unique()].sum(0),
    "its_own_rows": lambda h, k: h.index_add(0, k.nonzero()[:, 0], h[k]),
}
for name, pick in PICKS.items():

    def of(pick=pick):
        masks = [torch.zeros(4, dtype=torch.bool)] * 4 + [torch.tensor([True, False, True, False])] * 2
        return Picks(pick), loss, [(torch.randn(4, 3), mask) for mask in masks]

    of.__name__ = name
    CASES.add(**({} if name == "its_own_rows" else MIXES))(of)


@CASES.add(**MIXES)
def pairs_of_a_class():
    def of_pairs(m, batch):
        z = m(batch[0])
        i, j = torch.where((batch[1][:, None] == batch[1]).triu(1))
        return F.cross_entropy(z, batch[1], reduction="none").index_add(0, i, (z[i] - z[j]).square().sum(1))

    labels = [torch.arange(4)] * 4 + [torch.tensor([0, 1, 1, 3])] * 2
    return nn.Sequential(nn.Linear(3, 4)), of_pairs, [(torch.randn(4, 3), y) for y in labels]


@CASES.add(**MIXES)
def a_mask_of_the_model_that_its_user_fills():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("mask", torch.zeros(4, dtype=torch.bool))

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h + h[self.mask].sum(0))

    def of_filled(m, batch):
        with torch.no_grad():
            m.mask.copy_(batch[1])
        return m(batch[0]).square().sum(1)

    masks = [torch.zeros(4, dtype=torch.bool)] * 4 + [torch.tensor([True, False, True, False])] * 2
    return Masked().eval(), of_filled, [(torch.randn(4, 3), mask) for mask in masks]


@runs
@CASES.parametrize()
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)
