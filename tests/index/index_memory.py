"""Peak memory beside a budget, in a process of its own: score, Fisher, self-influence and exports of a large index."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import dropinf

SIDE, BATCH = 32, 2048


def loss_fn(model, batch):
    return (model(batch[0]) * batch[1]).sum(1)


class Batches(Sequence):
    """Made when they are asked for."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, b):
        generator = torch.Generator().manual_seed(b)
        return [torch.randn(BATCH, SIDE, generator=generator) for _ in range(2)]


def status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def peak(job: Callable[[], object]) -> int:
    """Bytes that the process grew by, at most, while `job` ran."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    job()
    return status("VmHWM") - before


def main(folder: Path, budget: int, rows: int, dtype: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    compressor = dropinf.Compressor(nn.Linear(SIDE, SIDE, bias=False), dropinf.Identity(), loss_fn)

    def jobs(index: dropinf.Index, out: Path) -> dict[str, Callable[[], object]]:
        return {
            "score": lambda: dropinf.score(query, index, fisher, top=10),
            "cosine": lambda: dropinf.score(query, index, kind="cosine", top=10),
            "relative": lambda: dropinf.score(query, index, fisher, kind="relative", top=10),
            "self-influence": lambda: dropinf.self_influence(index, fisher),
            "fisher": lambda: dropinf.build_fisher(index),
            "whitened": lambda: index.whitened(out / "rows.npy", fisher),
            "flat": lambda: index.whitened(out / "rows.faiss", fisher),
            "coded": lambda: index.whitened(out / "rows.faiss", fisher, factory="IVF16,PQ16x4"),
        }

    query = compressor.compress([Batches(1)[0]])[:4]
    small = compressor.compress(Batches(3), out=folder / "small", dtype=getattr(torch, dtype))
    fisher = dropinf.build_fisher(small)
    for job in jobs(small, folder).values():
        job()  # libraries that load at their first use
    build = lambda: compressor.compress(Batches(rows // BATCH), out=folder / "large", dtype=getattr(torch, dtype))  # noqa: E731
    print("compress", peak(build))
    index = dropinf.Index.open(folder / "large", memory_bytes=budget)
    print("bytes", index.info()["bytes"])
    for name, job in jobs(index, folder).items():
        print(name, peak(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
