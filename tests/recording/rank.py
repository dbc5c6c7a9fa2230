"""One rank of a recorded DistributedDataParallel run."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dropinf

STEPS, SAMPLES = 6, 8


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 5)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 5, (SAMPLES,), generator=generator)


def train(net: nn.Module, out: str, rank: int, world: int) -> dropinf.Run:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    size = SAMPLES // world
    with dropinf.record(net, dropinf.Dropout(5), optimizer, out=out) as run:
        for step in range(STEPS):
            x, y = (t[rank * size : (rank + 1) * size] for t in batch(step))
            optimizer.zero_grad()
            run.samples(f"{step}.{i}" for i in range(rank * size, (rank + 1) * size))
            F.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.3)
            optimizer.step()
    return run


if __name__ == "__main__":
    rank, world, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    train(DistributedDataParallel(model()), out, rank, world)
    dist.destroy_process_group()
    os._exit(
        0
    )  # threads of torch.distributed's are at times torn down too early, which would abort a rank that is done
