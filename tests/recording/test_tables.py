"""Tables that all samples share, as of positions, are left out of a recording, and leave training as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf

N, STEPS = 6, 9
TABLES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "added": lambda x, p, _: x + p,
    "in front": lambda x, p, _: x + p[None],
    "dropped out": lambda x, p, _: x + F.dropout(p, 0.1),
    "by its size": lambda x, p, _: x + p / len(p),
    "by its norm, later": lambda x, p, step: x + (p / p.detach().norm() if step > 3 else p),
    "repeated": lambda x, p, _: x + p.repeat(len(x), 1, 1),
    "by its dimensions": lambda x, p, _: x + p * (1 + p.ndim * 1e-3),
    "noise": lambda x, p, _: x + p + 0.01 * torch.randn(p.shape),
    "now and then": lambda x, p, step: x + p if step % 2 else x,
}


class Positions(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(50, 8), nn.Embedding(9, 8), nn.Linear(8, 50)
        nn.init.normal_(self.places.weight, std=0.02)
        self.use = use
        self.register_buffer("std", torch.ones(8))

    def forward(self, ids: Tensor, step: int) -> Tensor:
        x = self.words(ids)
        self.std.mul_(0.9).add_(0.1 * x.detach().std((0, 1)))  # a buffer that backward needs as it is now
        return self.head(self.use(x / self.std, self.places(torch.arange(ids.shape[1])), step).tanh())


@pytest.mark.filterwarnings("ignore:model. ")
@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_all_samples_share_leaves_training_as_it_is(name: str, tmp_path) -> None:
    """It is left out, whatever the forward does with it."""
    finals = []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = Positions(TABLES[name])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        recording = dropinf.record(model, dropinf.Identity(), optimizer, out=tmp_path) if recorded else None
        try:
            with recording or torch.enable_grad():
                for step in range(STEPS):
                    ids = torch.randint(3, 50, (N, 9), generator=torch.Generator().manual_seed(step))
                    optimizer.zero_grad()
                    torch.manual_seed(step)
                    if recording is not None:
                        recording.samples(range(N))
                    F.cross_entropy(model(ids, step).mT, ids).backward()
                    optimizer.step()
        except dropinf.AttributionError:
            if name != "now and then":  # whose table is met behind the first step
                raise
            return
        finals.append([*model.parameters(), model.std, torch.rand(2)])
    assert all(map(torch.equal, *finals))
    assert list(dropinf.Run(tmp_path).shapes) == ["words", "head", "head.bias"]
