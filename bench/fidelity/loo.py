"""Scores against exact leave-one-out retraining: logistic regression on digits, solved to the optimum in float64.

python -m bench.fidelity.loo    # 500 models once, cached in out/fidelity; rows that the table has are skipped
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import dropinf
from bench.files import read_rows, save, write_rows
from dropinf import metrics

from .evaluate import KINDS, RESULTS
from .tasks import classification, task

CACHE = Path("out/fidelity/digits-loo.npy")
TABLE = RESULTS / "loo.csv"
FIELDS = (
    "task", "method", "dim", "bytes_per_sample", "kind", "damping", "pearson", "low", "high", "spearman", "masks",
    "pearson_least", "pearson_most",
)  # fmt: skip
DAMPINGS: tuple[float | str, ...] = (*(10.0**e for e in range(-4, 3)), "auto")
DECAY = 0.01  # of half the squared weights, beside the mean loss
TOLERANCE = 1e-11  # of the gradient's norm
CLASSES = 10
COLD = 25  # left-out models that are solved from zero too
DIMS = (4, 8, 16)
MASKS = 10  # seeds of each random sketch: small ones differ from mask to mask by more than from method to method
Scores = dict[tuple[str, str], Tensor]


def gradient(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    residual = (x @ w.T).softmax(1) - nn.functional.one_hot(y, CLASSES)
    return residual.T @ x / len(x) + DECAY * w


def hessian(w: Tensor, x: Tensor) -> Tensor:
    p = (x @ w.T).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    full = torch.einsum("nab,ni,nj->aibj", inner, x, x).reshape(w.numel(), w.numel()) / len(x)
    return full + DECAY * torch.eye(w.numel(), dtype=w.dtype)


def newton(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The minimum of the strictly convex objective."""
    for _ in range(50):
        slope = gradient(w, x, y)
        if float(slope.norm()) < TOLERANCE:
            return w
        w = w - torch.linalg.solve(hessian(w, x), slope.flatten()).view_as(w)
    raise RuntimeError("Newton's method did not converge")


def zeros() -> Tensor:
    return torch.zeros(CLASSES, 65, dtype=torch.float64)


def padded(x: Tensor) -> Tensor:
    return torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)


def samples() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and labels, query inputs and labels; float64 with a column of ones."""
    found = task("digits")
    return padded(found.train[0]), found.train[1], padded(found.query[0]), found.query[1]


def left_out(full: Tensor) -> Tensor:
    """changes [Q, N]: every query's loss without a sample, minus with it. Written once, then read."""
    if CACHE.exists():
        return torch.from_numpy(np.load(CACHE))
    x, y, qx, qy = samples()
    base = nn.functional.cross_entropy(qx @ full.T, qy, reduction="none")
    changes = torch.empty(len(qx), len(x), dtype=torch.float64)
    cold = 0.0
    for n in tqdm(range(len(x)), desc="leave one out", unit="model"):
        kept = torch.arange(len(x)) != n
        w = newton(full, x[kept], y[kept])
        if n % (len(x) // COLD) == 0:
            cold = max(cold, float((newton(zeros(), x[kept], y[kept]) - w).abs().max()))
        changes[:, n] = nn.functional.cross_entropy(qx @ w.T, qy, reduction="none") - base
    print(f"largest difference of {COLD} models from a cold start: {cold:.1e}")
    assert cold < 1e-6, cold
    save(CACHE, changes.numpy())
    return changes


def optimum(full: Tensor) -> nn.Module:
    model = nn.Linear(64, CLASSES)
    with torch.no_grad():
        model.weight.copy_(full[:, :-1])
        model.bias.copy_(full[:, -1])
    return model


def sketches(k: int, seed: int) -> dict[str, dropinf.Sketch]:
    return {
        "dropout": dropinf.Dropout(k, seed=seed),
        "dropout, energy": dropinf.Dropout(k, sampling="energy", seed=seed),
        "dropout, fold of a half": dropinf.Dropout(k, keep=0.5, seed=seed),
        "dropout, rotated": dropinf.Dropout(k, rank=4 * k, seed=seed),
        "dropout, rotated, whitened": dropinf.Dropout(k, rank=4 * k, whiten=True, seed=seed),
        "gaussian": dropinf.Gaussian(k, seed=seed),
        "pca": dropinf.PCA(k, seed=seed),
        "sjlt": dropinf.SJLT(k, seed=seed),
    }


def chosen(model: nn.Module, size: int, seed: int) -> dropinf.Sketch:
    batches = task("digits").batches("train")
    return dropinf.choose(model, batches, classification, budget_bytes=size, seed=seed).sketch


def scores(model: nn.Module, sketch: dropinf.Sketch) -> tuple[int, Scores]:
    """(bytes per sample, (kind, damping) -> scores [Q, N])."""
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
        # What the regulariser adds to the Hessian, where the coordinates keep their lengths.
        every[kind, f"{DECAY} absolute"] = dropinf.score(query, train, fisher.with_damping(DECAY, absolute=True))
    return train.bytes_per_sample, every


def exact(full: Tensor) -> Scores:
    """Influence with the Hessian itself."""
    x, y, qx, qy = samples()
    train, query = (
        (((a @ full.T).softmax(1) - nn.functional.one_hot(b, CLASSES))[:, :, None] * a[:, None]).flatten(1)
        for a, b in ((x, y), (qx, qy))
    )
    return {("influence", ""): query @ torch.linalg.solve(hessian(full, x), train.T)}


def interval(per_query: Tensor) -> tuple[float, float]:
    """The 95 % percentile bootstrap of a mean over queries."""
    chosen = torch.randint(len(per_query), (1000, len(per_query)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(per_query[chosen].mean(1), torch.tensor([0.025, 0.975], dtype=per_query.dtype)).tolist()
    return low, high


def measured(
    name: str, dim: int | str, size: int | str, masks: list[Scores], changes: Tensor
) -> list[dict[str, object]]:
    """A row per setting: means over masks, the interval over queries, and the least and most of the masks."""
    rows = []
    for kind, damping in masks[0]:
        found = [every[kind, damping] for every in masks if (kind, damping) in every]
        per_mask = torch.stack([metrics.leave_one_out(x, changes).per_query for x in found])  # [masks, Q]
        spearman = torch.stack([metrics.spearman(x, changes).mean() for x in found]).mean()
        ends = per_mask.mean(1).min(), per_mask.mean(1).max()
        values = [f"{float(v):.4f}" for v in (per_mask.mean(), *interval(per_mask.mean(0)), spearman, *ends)]
        about = ("digits", name, dim, size, kind, damping, *values[:4], len(found), *values[4:])
        rows.append(dict(zip(FIELDS, about, strict=True)))
    return rows


def shown(rows: list[dict[str, object]]) -> str:
    """A line of the table: per kind of Fisher matrix the best of the sweep, and "auto"."""
    cells = [str(rows[0][field]) for field in ("method", "dim", "bytes_per_sample")]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        most = max(int(str(r["masks"])) for r in rows)
        # A setting that is singular for some masks would be judged by the others alone.
        swept = [
            r for r in own if not str(r["damping"]).endswith(("auto", "absolute")) and int(str(r["masks"])) == most
        ]
        best = max(swept, key=lambda r: float(str(r["pearson"])))
        auto = [f", auto {float(str(r['pearson'])):.3f}" for r in own if r["damping"] == "auto"]
        at = f" at {float(str(best['damping'])):g}" if best["damping"] else ""
        cells.append(f"{kind} {float(str(best['pearson'])):.3f}{at}{''.join(auto)}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    torch.set_num_threads(1)
    x, y, *_ = samples()
    full = newton(zeros(), x, y)
    changes, model = left_out(full), optimum(full)
    rows = read_rows(TABLE)
    done = {(row["method"], str(row["dim"])) for row in rows}

    def add(name: str, dim: int | str, make: Callable[[], list[tuple[int | str, Scores]]]) -> None:
        if (name, str(dim)) not in done:
            found = make()
            rows.extend(measured(name, dim, found[0][0], [every for _, every in found], changes))
            write_rows(TABLE, FIELDS, rows)
        print(shown([r for r in rows if (r["method"], str(r["dim"])) == (name, str(dim))]), flush=True)

    add("exact Hessian", "", lambda: [("", exact(full))])
    add("uncompressed", "", lambda: [scores(model, dropinf.Identity())])
    for k in DIMS:
        for name in sketches(k, 0):
            seeds = range(1 if name == "pca" else MASKS)
            add(name, k, lambda k=k, name=name, seeds=seeds: [scores(model, sketches(k, s)[name]) for s in seeds])
        size = 4 * (min(k, CLASSES) * k + min(k, CLASSES))
        add("chosen", k, lambda size=size: [scores(model, chosen(model, size, s)) for s in range(MASKS)])


if __name__ == "__main__":
    main()
