"""The most harmful samples removed, and the model trained again: ResNet-9 on Fashion-MNIST with wrong labels.

A stand-in for the paper's ResNet-9 on CIFAR-10 with wrong labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.fidelity import data
from bench.fidelity.tasks import ResNet9, Task, classification

from . import rows
from .methods import NAMES, Scored, Setup, each, scored
from .training import fit

EXPERIMENT = "removal"
SEEDS, TRAIN, VALIDATION, TEST = 4, 2000, 400, 2000
NOISES = (10, 20)  # percent of the labels
REMOVED = 0.05  # of the samples
SETUP = Setup(budget=8192)
NONE = "none removed"


def task(noise: int, seed: int) -> tuple[Task, Tensor]:
    """Return images of which some have another class's label, clean validation images, and which labels are wrong."""
    x, y = data.fashion_mnist("train")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(x), generator=generator)[: TRAIN + VALIDATION]
    train, valid = chosen[:TRAIN], chosen[TRAIN:]
    wrong = torch.zeros(TRAIN, dtype=torch.bool)
    wrong[torch.randperm(TRAIN, generator=generator)[: TRAIN * noise // 100]] = True
    other = (y[train] + torch.randint(1, 10, (TRAIN,), generator=generator)) % 10
    noisy = (x[train], torch.where(wrong, other, y[train]))
    made = Task(EXPERIMENT, noisy, (x[valid], y[valid]), lambda: ResNet9(8), classification, 8, 64, 1e-2, 0.001)
    return made, wrong


def accuracy(made: Task, seed: int, kept: Tensor | None = None) -> float:
    """Train on some of the samples, and return the accuracy on test images."""
    x, y = (part[:TEST] for part in data.fashion_mnist("t10k"))
    model = fit(made, seed, kept).model
    with torch.no_grad():
        return float(
            torch.cat([model(a).argmax(1) == b for a, b in zip(x.split(250), y.split(250), strict=True)])
            .double()
            .mean()
        )


def scores(noise: int, seed: int) -> tuple[Task, Tensor, Callable[[str], Scored]]:
    """Return the task, which labels are wrong, and what scores its samples by a method's name."""
    made, wrong = task(noise, seed)
    return made, wrong, scored(made, seed, SETUP, f"{EXPERIMENT}/{noise}")


def without(made: Task, seed: int, wrong: Tensor, found: Scored | None) -> dict[str, float]:
    """Return the accuracy without the samples of the lowest scores, and how many of these have a wrong label."""
    if found is None:
        return {"refused": float("nan")}
    order = found.values[0].argsort()
    count = round(REMOVED * len(order))
    kept = order[count:].sort().values
    share = float(wrong[order[:count]].double().mean())
    return {"test accuracy": accuracy(made, seed, kept), f"wrong labels among {count} removed": share}


def run(seed: int) -> None:
    """Write the rows of a seed that are missing."""
    for noise in NOISES:
        setting = f"{noise} % wrong labels"
        done = rows.done(EXPERIMENT, setting, seed)
        made, wrong, score = scores(noise, seed)
        if NONE not in done:
            rows.add(EXPERIMENT, setting, seed, NONE, {"test accuracy": accuracy(made, seed)}, 0.0)
        for method, found in each(score, tuple(n for n in NAMES if n not in done)):
            seconds = float("nan") if found is None else found.seconds
            rows.add(EXPERIMENT, setting, seed, method, without(made, seed, wrong, found), seconds)
