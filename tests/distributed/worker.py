"""One rank: compress with a wrapped model, compare with the plain one, and train a step."""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dropinf


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(F.relu(self.up(self.norm(x)), inplace=True))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), Block(), Block(), nn.Flatten(), nn.Linear(40, 3))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def wrap(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    for block in (model[1], model[2]):
        fully_shard(block)
    return fully_shard(model)


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def step(model: nn.Module, batch) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_fn(model, batch).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [whole(p.detach()).clone() for p in model.parameters()]


def main(kind: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    plain = make_model()
    never_compressed = wrap(kind, copy.deepcopy(plain))
    wrapped = wrap(kind, copy.deepcopy(plain))
    generator = torch.Generator().manual_seed(rank)
    data = [
        (torch.randint(0, 11, (n, 5), generator=generator), torch.randint(0, 3, (n,), generator=generator))
        for n in (4, 3)
    ]
    step(wrapped, data[0])  # a model that has trained, with weights that have required gradients
    step(never_compressed, data[0])
    with torch.no_grad():
        for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
            p.copy_(whole(q.detach()))
    sketch = dropinf.Dropout(dim=4)
    before = [(p.requires_grad, p.grad, whole(p.detach()).clone()) for p in wrapped.parameters()]
    expected, found = (dropinf.compress(m, data, loss_fn, sketch) for m in (plain, wrapped))
    found.check_same_sketch(expected)
    torch.testing.assert_close(found.flat, expected.flat, rtol=1e-5, atol=1e-7)
    assert float(expected.flat.abs().sum()) > 0
    for p, (flag, grad, value) in zip(wrapped.parameters(), before, strict=True):
        assert p.requires_grad == flag
        assert p.grad is None
        assert grad is None
        assert torch.equal(whole(p.detach()), value)
    for a, b in zip(step(wrapped, data[1]), step(never_compressed, data[1]), strict=True):
        assert torch.equal(a, b)
    print(f"rank {rank} of {kind}: {found}", flush=True)
    # DDP's reducer must go before the process group that it uses.
    del wrapped, never_compressed
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
