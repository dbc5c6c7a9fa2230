"""What retraining does: the loss of every query under models trained on random halves. Resumes where it stopped.

Finished models lie in out/fidelity, one file each; all of a task are gathered in bench/results/fidelity/losses, which
the evaluation reads, and which saves whoever has it the hours.

python -m bench.fidelity.retrain gpt-brown --subsets 100 --seeds 5
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.files import save
from dropinf.metrics import sample_subsets

from .tasks import NAMES, task

OUT = Path("out/fidelity")
GATHERED = Path("bench/results/fidelity/losses")


def _path(name: str, subset: int, seed: int) -> Path:
    return OUT / name / f"{subset:04d}-{seed}.npy"


def one(name: str, subset: int, seed: int) -> None:
    """Train on one subset, and write the queries' losses under a temporary name first."""
    torch.set_num_threads(1)
    found, path = task(name), _path(name, subset, seed)
    kept = sample_subsets(len(found.train[0]), 1, seed=subset)[0]
    losses = found.losses(found.fit(kept, seed)).numpy()
    save(path, losses)


def gather(name: str, subsets: int, seeds: int) -> None:
    """Write the losses of subsets 0 to M - 1 and seeds 0 to S - 1 as one float32 array [M, S, Q]."""
    losses = np.stack([[np.load(_path(name, m, seed)) for seed in range(seeds)] for m in range(subsets)])
    save(GATHERED / f"{name}.npy", losses.astype(np.float32))


def losses_of(name: str) -> tuple[Tensor, Tensor]:
    """(subsets bool [M, N], losses [M, seeds, Q]) of the retrained models of a task."""
    path = GATHERED / f"{name}.npy"
    if not path.exists():
        raise SystemExit(f"no retrained models of {name}; run python -m bench.fidelity.retrain {name}")
    losses = torch.from_numpy(np.load(path))
    masks = [sample_subsets(len(task(name).train[0]), 1, seed=m)[0] for m in range(len(losses))]
    return torch.stack(masks), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    # Whole rounds of subsets, so that what is there is balanced whenever it stops.
    wanted = [
        (m, seed)
        for seed in range(arguments.seeds)
        for m in range(arguments.subsets)
        if not _path(arguments.task, m, seed).exists()
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(one, arguments.task, m, seed) for m, seed in wanted]
        for job in tqdm(jobs, desc=arguments.task, unit="model"):
            job.result()
    gather(arguments.task, arguments.subsets, arguments.seeds)


if __name__ == "__main__":
    main()
