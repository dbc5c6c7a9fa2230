"""A small model and its batches, of which the tests of an index make their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import dropinf

KINDS = ("block", "joint", "diagonal", "kronecker")


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_batches(count: int = 9, seed: int = 1, rows: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows + i % 3, 12, generator=generator).double(),
            torch.randint(4, (rows + i % 3,), generator=generator),
        )
        for i in range(count)
    ]


def names(batch):
    return [f"é{float(x):.6f}" for x in batch[0][:, 0]]


def make_compressor(seed: int = 0, **options) -> dropinf.Compressor:
    return dropinf.Compressor(make_model(seed), dropinf.Dropout(6, **options), loss_fn)


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }
