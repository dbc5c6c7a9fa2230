"""One rank of an index: compress, build the Fisher matrix, score; compare with what one process makes of it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dropinf
from dropinf import ranks
from tests.bounds import HOUR

KINDS = ("block", "joint", "diagonal", "kronecker")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_batches(count: int = 23, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    sizes = [3 + i % 4 for i in range(count)]
    return [
        (torch.randn(n, 12, generator=generator).double(), torch.randint(4, (n,), generator=generator)) for n in sizes
    ]


def names(batch) -> list[str]:
    return [f"{float(x):.6f}" for x in batch[0][:, 0]]


def wrapped(kind: str) -> nn.Module:
    model = make_model()
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp2":
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    return model


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def main(kind: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    batches, query = (
        make_batches(),
        dropinf.Compressor(make_model(), dropinf.Dropout(6), loss_fn).compress(make_batches(2, 9)),
    )
    plain = dropinf.Compressor(make_model(), dropinf.Dropout(6), loss_fn).compress(batches)
    compressor = dropinf.Compressor(wrapped(kind), dropinf.Dropout(6), loss_fn)
    for fisher in KINDS:
        out = folder / fisher
        index = compressor.compress(batches, out=out, fisher=fisher, ids=names, group=group)
        assert index.verify() == []
        assert len(list((out / "shards").iterdir())) == len(batches)
        close(index[:].flat, plain.flat)
        assert index.ids() == [name for batch in batches for name in names(batch)]
        expected = dropinf.build_fisher(plain, fisher)
        for found in (index.fisher(), dropinf.build_fisher(index, fisher, group=group)):
            assert found.count == len(plain)
            close(found.solve(query).flat, expected.solve(query).flat)
            close(found.with_damping("auto").solve(query).flat, expected.with_damping("auto").solve(query).flat)
        close(dropinf.score(query, index, found, group=group), dropinf.score(query, plain, expected))
        close(dropinf.self_influence(index, found, group=group), dropinf.self_influence(plain, expected))
        sources = [i % 3 for i in range(len(plain))]
        for by in ({"by": "layer"}, {"by": {"first": "0*", "rest": "*"}}, {"by": "source", "sources": sources}):
            shared = dropinf.score(query, index, found, **by, group=group)
            one = dropinf.score(query, plain, expected, **by)
            assert shared.names == one.names
            close(shared.values, one.values)
        for largest in (True, False):
            best = dropinf.score(query, index, found, top=7, largest=largest, group=group)
            one = dropinf.score(query, plain, expected, top=7, largest=largest)
            close(best.values, one.values)
            assert torch.equal(best.indices, one.indices)
    if dist.get_world_size() > 1:
        with pytest.raises(ValueError, match="by, sources: they differ between ranks"):
            dropinf.score(query, index, kind="dot", by="source", sources=[rank] * len(plain), group=group)
    more = make_batches(5, 4)
    index = compressor.compress(more, out=folder / "block", append=True, fisher="block", ids=names, group=group)
    both = dropinf.Gradients.cat([plain, dropinf.Compressor(make_model(), dropinf.Dropout(6), loss_fn).compress(more)])
    close(index[:].flat, both.flat)
    close(index.fisher().solve(query).flat, dropinf.build_fisher(both, "block").solve(query).flat)
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}, {kind}: {len(index)} samples")
    dist.destroy_process_group()


def part_of(data, each: int, **options) -> dropinf.Parts:
    return dropinf.Parts(DataLoader(data, each, sampler=DistributedSampler(data, shuffle=False, **options)))


def parts(folder: Path) -> None:
    """Each rank has a part of 46 samples; then one of 14 more, and all of it once more."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    generator = torch.Generator().manual_seed(4)
    sets = [
        TensorDataset(torch.randn(n, 12, generator=generator).double(), torch.randint(4, (n,), generator=generator))
        for n in (46, 14)
    ]
    seen: set[str] = set()

    def losses(model, batch):
        seen.update(names(batch))
        return loss_fn(model, batch)

    compressor = dropinf.Compressor(make_model(), dropinf.Dropout(6), losses)
    plain = dropinf.Compressor(make_model(), dropinf.Dropout(6), loss_fn)
    rows = [plain.compress([data.tensors]).flat for data in sets]
    query = plain.compress(make_batches(2, 9))
    for again in range(2):
        for i, (data, each) in enumerate(zip(sets, (3, 2), strict=True)):
            seen.clear()
            batches = part_of(data, each)
            index = compressor.compress(batches, out=folder, append=i > 0, ids=names, fisher="block", group=group)
            assert index.verify() == []
            # Its part and the first batch of all, and of the index; of a finished index, its first and its last besides.
            of_index = 3 if i else 0
            assert len(seen) <= (3 * each if again and not i else len(data) // 2 + each) + of_index, (
                "more than its part"
            )
            want = torch.cat(rows if again else rows[: i + 1])
            close(index[:].flat, want)
            told = [name for part in (sets if again else sets[: i + 1]) for name in names(part.tensors)]
            assert index.ids() == told
    both = dropinf.Gradients.cat([plain.compress([data.tensors]) for data in sets])
    close(index.fisher().solve(query).flat, dropinf.build_fisher(both, "block").solve(query).flat)
    print(f"rank {rank} has {len(index)} samples of its parts")
    dist.destroy_process_group()


def stop(kind: str, folder: Path) -> None:
    """Do half a minute's work on each rank, and say how it ends. Rank 1 does what ``kind`` says."""
    if kind != "fail":
        ranks.PATIENCE = 3.0
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    calls = 0

    def losses(model, batch):
        nonlocal calls
        calls += 1
        odd = rank == 1 and calls >= 12  # some of its batches are done
        if kind == "fail" and odd:
            raise ValueError("this batch has a hole")
        if kind == "hangs" and odd:
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "waits" and odd:
            dist.barrier()
        if kind == "computes" and rank == 1 and calls == 12:
            time.sleep(8)
        time.sleep({"fail": 0.5, "slow": 2}.get(kind, 0.01))
        return loss_fn(model, batch)

    odd = rank == 1
    fisher = None if kind == "fisher" and odd else "block"
    model, batches = make_model(), make_batches()
    if kind == "model" and odd:
        model[0].weight.data += 0.1
    if kind == "sampler":
        data = TensorDataset(torch.randn(48, 12).double(), torch.randint(4, (48,)))
        batches = DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=False))
    if kind == "padded":
        batches = part_of(TensorDataset(torch.randn(47, 12).double(), torch.randint(4, (47,))), 4)
    if kind == "replicas":
        data = TensorDataset(torch.randn(48, 12).double(), torch.randint(4, (48,)))
        batches = part_of(data, 4, num_replicas=3, rank=rank)
    if kind == "uneven":
        data = TensorDataset(torch.randn(48, 12).double(), torch.randint(4, (48,)))
        batches = dropinf.Parts(DataLoader(data, 4, sampler=range(0, 48, 2) if odd else range(1, 40, 2)))
    if kind == "batch" and odd:
        batches[9] = make_batches(23, 2)[9]
    if kind == "neighbours":
        batches = make_batches(140)
        if odd:
            batches[100], batches[101] = batches[101], batches[100]
    scale = 1e-5 * (1 + odd) if kind == "loss" else 1  # small losses differ as much
    ids = None if kind != "ids" else lambda batch: [f"{x:.{5 + odd}f}" for x in batch[0][:, 0].tolist()]
    loss = losses if kind == "source" and odd else lambda m, b: scale * losses(m, b)
    try:
        index = dropinf.Compressor(model, dropinf.Dropout(6, seed=kind == "sketch" and odd), loss).compress(
            batches,
            out=folder,
            fisher=fisher,
            ids=ids,
            group=dist.group.WORLD,
            dtype=torch.int32 if kind == "options" and odd else None,
        )
        print(f"rank {rank} ends with {len(index)} samples", flush=True)
    except (ValueError, RuntimeError) as error:
        print(f"rank {rank} ends: {type(error).__name__}: {error}", flush=True)
    os._exit(3)  # torchrun is not there to end the other


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.PATIENCE = HOUR
    if sys.argv[1] == "parts":
        parts(Path(sys.argv[2]))
        sys.exit()
    if sys.argv[1] not in ("plain", "ddp", "fsdp2"):
        stop(sys.argv[1], Path(sys.argv[2]))
    main(sys.argv[1], Path(sys.argv[2]))
