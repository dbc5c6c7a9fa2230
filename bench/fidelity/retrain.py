"""What retraining does: the loss of every query under models trained on random halves. Resumes where it stopped.

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

from dropinf.metrics import sample_subsets

from .tasks import NAMES, task

OUT = Path("out/fidelity")


def _path(name: str, subset: int, seed: int) -> Path:
    return OUT / name / f"{subset:04d}-{seed}.npy"


def one(name: str, subset: int, seed: int) -> None:
    """Train on one subset, and write the queries' losses under a temporary name first."""
    torch.set_num_threads(1)
    found, path = task(name), _path(name, subset, seed)
    kept = sample_subsets(len(found.train[0]), 1, seed=subset)[0]
    losses = found.losses(found.fit(kept, seed)).numpy()
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, losses)
    temporary.replace(path)


def losses_of(name: str) -> tuple[Tensor, Tensor]:
    """(subsets bool [M, N], losses [M, seeds, Q]) of the subsets that are finished for as many seeds as the first."""
    by_subset: dict[int, list[Path]] = {}
    for path in sorted((OUT / name).glob("*.npy")):
        by_subset.setdefault(int(path.stem.split("-")[0]), []).append(path)
    if not by_subset:
        raise SystemExit(f"no retrained models of {name}; run python -m bench.fidelity.retrain {name}")
    seeds = max(map(len, by_subset.values()))
    whole = [(m, paths) for m, paths in by_subset.items() if len(paths) == seeds]
    losses = np.stack([[np.load(path) for path in paths] for _, paths in whole])
    masks = torch.stack([sample_subsets(len(task(name).train[0]), 1, seed=m)[0] for m, _ in whole])
    return masks, torch.from_numpy(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    (OUT / arguments.task).mkdir(parents=True, exist_ok=True)
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


if __name__ == "__main__":
    main()
