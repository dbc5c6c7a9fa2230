"""What acting on the scores does: brittleness (remove a query's top samples and retrain) and tail patch (one more step
on them). Retrained models lie in out/fidelity/brittleness, rows in the table; both are kept on a re-run.

python -m bench.fidelity.behaviour
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dropinf
from bench.files import read_rows, save, write_rows
from dropinf import metrics

from .baselines import bm25, similarity
from .evaluate import METHODS, RESULTS, calibration
from .tasks import Task, task

OUT = Path("out/fidelity")
QUERIES, COUNTS = 30, (20, 80)  # of brittleness
PATCH = 10  # samples of a step of tail patch
# Plain gradient descent, and Adam's step without momentum: its second moments are those of the training batches at the
# finished model, so that it is neither the sign of the gradient nor the history of one run.
RATES = {"tail patch, sgd": 0.1, "tail patch, adam": 1e-3}
EPSILON = 1e-8
CHOSEN = {"mlp-fashion": (2856, "block"), "gpt-brown": (65536, "kronecker")}  # bytes and Fisher matrix
FIELDS = ("task", "measure", "method", "dim", "count", "value", "low", "high")
DIMS = {"mlp-fashion": (16,), "gpt-brown": (16, 32)}
Row = dict[str, str]


# The Fisher matrix of each, with a damping that no retraining was asked for; plain dot products where there is none.
UNSIZED = {"uncompressed dot": "", "uncompressed EK-FAC": "kronecker"}
SIZED = ("dropout", "dropout, rotated", "dropout, rotated, whitened", "gaussian", "pca")


def scores_of(found: Task, model: nn.Module, name: str, dim: int) -> Tensor:
    """Scores [Q, N] of one method."""
    train, query = found.train[0], found.query[0]
    if name == "random":
        return torch.rand(len(query), len(train), generator=torch.Generator().manual_seed(0))
    if name == "pixel cosine":
        return similarity(found)
    if name == "BM25":
        return bm25(*(list(x.numpy()) for x in (train, query)))
    part = calibration(found, 300)
    if name == "chosen":
        budget, kind = CHOSEN[found.name]
        sketch: dropinf.Sketch = dropinf.choose(model, part, found.loss_fn, budget_bytes=budget).sketch
    elif name in UNSIZED:
        sketch, kind = dropinf.Identity(), UNSIZED[name]
    else:
        sketch, kind = METHODS[name].sketch(dim), "block"
    compressor = dropinf.Compressor(model, sketch, found.loss_fn)
    compressor.calibrate(part)
    gradients = compressor.compress(found.batches("train"))
    asked = compressor.compress(found.batches("query"))
    if not kind:
        return dropinf.score(asked, gradients, kind="dot")
    return dropinf.score(asked, gradients, dropinf.build_fisher(gradients, kind, "auto"))


def methods(name: str) -> Iterator[tuple[str, int]]:
    """(method, dim) of a task; 0 where there is no dim."""
    yield "random", 0
    yield ("pixel cosine" if name == "mlp-fashion" else "BM25"), 0
    for method in UNSIZED:
        yield method, 0
    for method in SIZED:
        for dim in DIMS[name]:
            yield method, dim
    yield "chosen", 0


def correct_without(found: Task, kept: Tensor) -> Tensor:
    """Which queries a model trained on the mask bool [N] classifies rightly, bool [Q]; kept on disk."""
    key = hashlib.blake2b(np.packbits(kept.numpy()).tobytes(), digest_size=12).hexdigest()
    path = OUT / "brittleness" / f"{found.name}-all-{key}.npy"
    if not path.exists():
        model = found.fit(kept, 0)
        with torch.no_grad():
            right = model(found.query[0]).argmax(1) == found.query[1]
        save(path, right.numpy())
    return torch.from_numpy(np.load(path))


def brittle(found: Task, scores: Tensor) -> dict[tuple[str, int], metrics.Estimate]:
    """Queries that the full model classifies rightly, of which a model without their top samples is wrong."""
    everything = torch.ones(len(found.train[0]), dtype=torch.bool)
    right = correct_without(found, everything).nonzero().flatten()[:QUERIES]
    by_count = metrics.brittleness(scores[right], lambda kept: correct_without(found, kept)[right], COUNTS)
    return {("brittleness", count): estimate for count, estimate in by_count.items()}


@cache
def finished(name: str) -> nn.Module:
    """The model trained on all samples, with seed 0."""
    found = task(name)
    return found.fit(torch.ones(len(found.train[0]), dtype=torch.bool), 0)


@cache
def second_moments(name: str) -> tuple[Tensor, ...]:
    """The mean square of the training batches' gradients at the finished model, per parameter."""
    found, model = task(name), finished(name)
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    order = torch.randperm(len(found.train[0]), generator=torch.Generator().manual_seed(0)).split(found.batch)
    for rows in order:
        loss = found.loss_fn(model, tuple(x[rows] for x in found.train)).mean()
        for mean, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            mean += gradient.square() / len(order)
    return tuple(total)


def stepped(found: Task, measure: str, rows: Tensor) -> nn.Module:
    """The finished model after one step on some training samples."""
    moved = copy.deepcopy(finished(found.name))
    parameters = list(moved.parameters())
    loss = found.loss_fn(moved, tuple(x[rows] for x in found.train)).mean()
    gradients = torch.autograd.grad(loss, parameters)
    if measure == "tail patch, adam":
        moments = second_moments(found.name)
        gradients = tuple(g / (v.sqrt() + EPSILON) for g, v in zip(gradients, moments, strict=True))
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= RATES[measure] * gradient
    return moved


def patched(found: Task, scores: Tensor) -> dict[tuple[str, int], metrics.Estimate]:
    """The mean fall of a query's loss after one step on its top samples."""
    before = found.losses(finished(found.name))
    return {
        (measure, PATCH): metrics.tail_patch(
            scores, before, lambda rows, m=measure: found.losses(stepped(found, m, rows)), PATCH
        )
        for measure in RATES
    }


def rows_of(name: str, method: str, dim: int) -> Iterator[Row]:
    found = task(name)
    scores = scores_of(found, finished(name), method, dim)
    measured = brittle(found, scores) if name == "mlp-fashion" else patched(found, scores)
    for (measure, count), estimate in measured.items():
        numbers = (f"{v:.4f}" for v in (estimate.value, estimate.low, estimate.high))
        values = (name, measure, method, str(dim or ""), str(count), *numbers)
        yield dict(zip(FIELDS, values, strict=True))


def main() -> None:
    torch.set_num_threads(1)
    path = RESULTS / "behaviour.csv"
    rows = read_rows(path)
    done = {(r["task"], r["method"], r["dim"]) for r in rows}
    for name in ("gpt-brown", "mlp-fashion"):
        for method, dim in methods(name):
            if (name, method, str(dim or "")) in done:
                continue
            start = time.perf_counter()
            new = list(rows_of(name, method, dim))
            rows += new
            write_rows(path, FIELDS, rows)
            for row in new:
                print(" | ".join(row.values()), f"| {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
