"""Scores against exact leave-one-out retraining: logistic regression on digits, solved to the optimum in float64.

python -m bench.fidelity.loo
"""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import dropinf
from dropinf import metrics

from .evaluate import DAMPINGS, KINDS, RESULTS
from .tasks import classification, task

CACHE = Path("out/fidelity/digits-loo.npz")
DECAY = 0.01  # of half the squared weights, beside the mean loss
CLASSES = 10


def newton(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The minimum of the strictly convex objective, to a gradient below 1e-11."""
    for _ in range(50):
        p = (x @ w.T).softmax(1)
        residual = p - nn.functional.one_hot(y, CLASSES)
        gradient = residual.T @ x / len(x) + DECAY * w
        if float(gradient.abs().max()) < 1e-11:
            return w
        w = w - torch.linalg.solve(hessian(w, x), gradient.flatten()).view_as(w)
    raise RuntimeError("Newton's method did not converge")


def hessian(w: Tensor, x: Tensor) -> Tensor:
    p = (x @ w.T).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    full = torch.einsum("nab,ni,nj->aibj", inner, x, x).reshape(w.numel(), w.numel()) / len(x)
    return full + DECAY * torch.eye(w.numel(), dtype=w.dtype)


def padded(x: Tensor) -> Tensor:
    return torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)


def left_out() -> tuple[Tensor, Tensor]:
    """(the optimum [10, 65], changes [Q, N]: every query's loss without a sample, minus with it)."""
    found = task("digits")
    x, y, qx, qy = padded(found.train[0]), found.train[1], padded(found.query[0]), found.query[1]
    full = newton(torch.zeros(CLASSES, x.shape[1], dtype=torch.float64), x, y)
    if not CACHE.exists():
        base = nn.functional.cross_entropy(qx @ full.T, qy, reduction="none")
        changes = torch.empty(len(qx), len(x), dtype=torch.float64)
        for n in tqdm(range(len(x)), desc="leave one out", unit="model"):
            kept = torch.arange(len(x)) != n
            w = newton(full, x[kept], y[kept])
            changes[:, n] = nn.functional.cross_entropy(qx @ w.T, qy, reduction="none") - base
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        temporary = CACHE.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, changes=changes.numpy())
        temporary.replace(CACHE)
    return full, torch.from_numpy(np.load(CACHE)["changes"])


def sketches(k: int) -> dict[str, dropinf.Sketch]:
    return {
        "dropout": dropinf.Dropout(k),
        "dropout, energy": dropinf.Dropout(k, sampling="energy"),
        "dropout, fold of a half": dropinf.Dropout(k, keep=0.5),
        "dropout, rotated": dropinf.Dropout(k, rank=4 * k),
        "dropout, rotated, whitened": dropinf.Dropout(k, rank=4 * k, whiten=True),
        "gaussian": dropinf.Gaussian(k),
        "pca": dropinf.PCA(k),
        "sjlt": dropinf.SJLT(k),
    }


def scores(model: nn.Module, sketch: dropinf.Sketch) -> dict[tuple[str, str], Tensor]:
    """(kind, damping) -> scores [Q, N]."""
    found = task("digits")
    compressor = dropinf.Compressor(model, sketch, classification)
    compressor.calibrate(found.batches("train"))
    train, query = (compressor.compress(found.batches(which)) for which in ("train", "query"))
    every = {("dot", ""): dropinf.score(query, train, kind="dot")}
    for kind in KINDS:
        fisher = dropinf.build_fisher(train, kind)
        for damping in DAMPINGS:
            with contextlib.suppress(ValueError):
                every[kind, str(damping)] = dropinf.score(query, train, fisher.with_damping(damping))
    return every


def exact(full: Tensor) -> Tensor:
    """Influence with the Hessian itself, [Q, N]."""
    found = task("digits")
    (x, y), (qx, qy) = found.train, found.query
    gradients = []
    for inputs, labels in ((padded(x), y), (padded(qx), qy)):
        residual = (inputs @ full.T).softmax(1) - nn.functional.one_hot(labels, CLASSES)
        gradients.append((residual[:, :, None] * inputs[:, None]).flatten(1))
    return gradients[1] @ torch.linalg.solve(hessian(full, padded(x)), gradients[0].T)


def main() -> None:
    torch.set_num_threads(1)
    full, changes = left_out()
    model = nn.Linear(64, CLASSES).double()
    with torch.no_grad():
        model.weight.copy_(full[:, :-1])
        model.bias.copy_(full[:, -1])
    model = model.float()
    rows = []

    def add(method: str, dim: int | str, size: int | str, every: dict[tuple[str, str], Tensor]) -> None:
        found = {s: metrics.leave_one_out(x, changes) for s, x in every.items()}
        for (kind, damping), estimate in found.items():
            spearman = float(metrics.spearman(every[kind, damping], changes).mean())
            rows.append([method, dim, size, kind, damping, *(f"{v:.4f}" for v in (*bounds(estimate), spearman))])
        best = max(found, key=lambda s: found[s].value)
        auto = ", ".join(f"{k} {e.value:.3f}" for (k, d), e in found.items() if d == "auto")
        print(f"| {method} | {dim} | {size} | {found[best]} | {' '.join(best)} | {auto} |", flush=True)

    add("exact Hessian", "", "", {("influence", ""): exact(full)})
    add("uncompressed", "", 2600, scores(model, dropinf.Identity()))
    for k in (4, 8, 16):
        size = 4 * (min(k, CLASSES) * (k + 1))
        for name, sketch in sketches(k).items():
            add(name, k, size, scores(model, sketch))
        calibration = task("digits").batches("train")
        chosen = dropinf.choose(model, calibration, classification, budget_bytes=size)
        add("chosen", "", chosen.bytes_per_sample, scores(model, chosen.sketch))
    path = RESULTS / "digits-loo.csv"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        header = "method, dim, bytes_per_sample, kind, damping, pearson, low, high, spearman"
        writer.writerows([header.split(", "), *rows])
    temporary.replace(path)


def bounds(estimate: metrics.Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


if __name__ == "__main__":
    main()
