"""What acting on the scores does: brittleness (remove a query's top samples and retrain) and tail patch (one more step
on them). Resumes where it stopped.

python -m bench.fidelity.behaviour
"""

from __future__ import annotations

import copy
import csv
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dropinf
from dropinf import metrics

from .baselines import similarity
from .evaluate import RESULTS, calibration
from .tasks import Task, task

OUT = Path("out/fidelity")
QUERIES, COUNTS = 30, (20, 80)  # of brittleness
PATCH, RATE = 10, 0.1  # of tail patch: samples, and the step of plain gradient descent
FIELDS = ("task", "measure", "method", "bytes_per_sample", "count", "value", "low", "high")
DIM = {"mlp-fashion": 32, "gpt-brown": 32}


def methods(found: Task, model: nn.Module, query: list[tuple[Tensor, ...]]) -> Iterator[tuple[str, int | str, Tensor]]:
    """(name, bytes per sample, scores [Q, N]), with dampings that no retraining was asked for."""
    k = DIM[found.name]
    part, batches = calibration(found, 300), found.batches("train")

    def scored(sketch: dropinf.Sketch, kind: str, damping: float | str) -> tuple[int, Tensor]:
        compressor = dropinf.Compressor(model, sketch, found.loss_fn)
        compressor.calibrate(part)
        train = compressor.compress(batches)
        fisher = dropinf.build_fisher(train, kind, damping)
        return train.bytes_per_sample, dropinf.score(compressor.compress(query), train, fisher)

    n = len(found.train[0])
    yield "random", "", torch.rand(len(found.query[0]), n, generator=torch.Generator().manual_seed(0))
    yield "similarity, no model", "", similarity(found)
    yield "uncompressed EK-FAC", *scored(dropinf.Identity(), "kronecker", 0.1)
    size, scores = scored(dropinf.Dropout(k), "block", "auto")
    yield "dropout", size, scores
    yield "dropout, rotated, whitened", *scored(dropinf.Dropout(k, rank=4 * k, whiten=True), "block", "auto")
    chosen = dropinf.choose(model, part, found.loss_fn, budget_bytes=size)
    yield "chosen", *scored(chosen.sketch, "joint", 1.0)
    yield "gaussian", *scored(dropinf.Gaussian(k), "block", "auto")
    yield "pca", *scored(dropinf.PCA(k), "block", "auto")


def brittle(found: Task, scores: Tensor, right: Tensor) -> dict[int, metrics.Estimate]:
    """Queries that the full model classifies rightly, of which a model without their top samples is wrong."""
    inputs, labels = (x[right] for x in found.query)

    def retrain(kept: Tensor) -> Tensor:
        key = hashlib.blake2b(np.packbits(kept.numpy()).tobytes(), digest_size=12).hexdigest()
        path = OUT / "brittleness" / f"{key}.npy"
        if not path.exists():
            correct = found.fit(kept, 0)(inputs).argmax(1) == labels
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, correct.numpy())
            temporary.replace(path)
        return torch.from_numpy(np.load(path))

    return metrics.brittleness(scores[right], retrain, COUNTS)


def patched(found: Task, model: nn.Module, scores: Tensor) -> metrics.Estimate:
    """The mean fall of a query's loss after one step of gradient descent on its top samples."""
    before = found.losses(model)

    def step(rows: Tensor) -> Tensor:
        moved = copy.deepcopy(model)
        loss = found.loss_fn(moved, tuple(x[rows] for x in found.train)).mean()
        with torch.no_grad():
            for parameter, gradient in zip(
                moved.parameters(), torch.autograd.grad(loss, list(moved.parameters())), strict=True
            ):
                parameter -= RATE * gradient
        return found.losses(moved)

    return metrics.tail_patch(scores, before, step, PATCH)


def rows_of(name: str) -> Iterator[list[object]]:
    found = task(name)
    model = found.fit(torch.ones(len(found.train[0]), dtype=torch.bool), 0)
    measure: Callable[[Tensor], dict[int, metrics.Estimate]]
    if name == "mlp-fashion":
        with torch.no_grad():
            right = (model(found.query[0]).argmax(1) == found.query[1]).nonzero().flatten()[:QUERIES]
        what, measure = "brittleness", lambda scores: brittle(found, scores, right)
    else:
        what, measure = "tail patch", lambda scores: {PATCH: patched(found, model, scores)}
    for method, size, scores in methods(found, model, found.batches("query")):
        for count, estimate in measure(scores).items():
            row = [
                name,
                what,
                method,
                size,
                count,
                *(f"{v:.4f}" for v in (estimate.value, estimate.low, estimate.high)),
            ]
            print("|", " | ".join(map(str, row[2:])), "|", flush=True)
            yield row


def main() -> None:
    torch.set_num_threads(1)
    rows = [row for name in DIM for row in rows_of(name)]
    path = RESULTS / "behaviour.csv"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows])
    temporary.replace(path)


if __name__ == "__main__":
    main()
