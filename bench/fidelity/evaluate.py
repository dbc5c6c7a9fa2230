"""Scores of every method against retraining (LDS) and against uncompressed influence (agreement), damping swept.

python -m bench.fidelity.evaluate gpt-brown --dims 8 16 32
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import dropinf
from dropinf import metrics

from .retrain import losses_of
from .tasks import NAMES, Task, task

Damping = float | Literal["auto"]
RESULTS = Path("bench/results/fidelity")
KINDS = ("block", "joint", "kronecker")
DAMPINGS: tuple[Damping, ...] = (*(10.0**e for e in (-4, -3, -2, -1, 0, 1, 2)), "auto")
# Scores of one trained model are noisy: those of several are averaged, for every method alike.
MODELS = 2


@dataclass(frozen=True)
class Method:
    sketch: Callable[[int], dropinf.Sketch]
    layers: tuple[type, ...] | None = None  # all parameters, or modules of these types


METHODS = {
    "uncompressed": Method(lambda _: dropinf.Identity()),
    "dropout": Method(lambda k: dropinf.Dropout(k)),
    "dropout, runs of 8": Method(lambda k: dropinf.Dropout(k, group=8)),
    "dropout, energy": Method(lambda k: dropinf.Dropout(k, sampling="energy")),
    "dropout, fold of half": Method(lambda k: dropinf.Dropout(k, keep=0.5)),
    "dropout, flat": Method(lambda k: dropinf.Dropout(k * k, mode="flat")),
    "dropout, rotated": Method(lambda k: dropinf.Dropout(k, rank=4 * k)),
    "dropout, rotated, runs of 8": Method(lambda k: dropinf.Dropout(k, rank=4 * k, group=8)),
    "dropout, rotated, energy": Method(lambda k: dropinf.Dropout(k, rank=4 * k, sampling="energy")),
    "gaussian": Method(lambda k: dropinf.Gaussian(k)),
    "pca": Method(lambda k: dropinf.PCA(k)),
    "sjlt": Method(lambda k: dropinf.SJLT(k)),
    "logra (gaussian, linears only)": Method(lambda k: dropinf.Gaussian(k), (nn.Linear,)),
}
FIELDS = (
    "task", "method", "dim", "bytes_per_sample", "kind", "damping", "lds", "lds_low", "lds_high",
    "agreement", "compress_ms_per_sample", "calibrate_ms_per_sample", "subsets", "seeds", "models",
)  # fmt: skip


@dataclass(frozen=True)
class Compressed:
    """One method's gradients of one model, and what they cost."""

    train: dropinf.Gradients
    query: dropinf.Gradients
    compress: float  # seconds per sample
    calibrate: float


def compressed(found: Task, model: nn.Module, method: Method, dim: int) -> Compressed:
    layers = method.layers
    if layers is not None:  # as rivals do, without the output layer
        names = [n for n, m in model.named_modules() if isinstance(m, layers)]
        layers = [n for n in names if n != "head"]
    compressor = dropinf.Compressor(model, method.sketch(dim), found.loss_fn, layers=layers)
    batches, n = found.batches("train"), len(found.train[0])
    start = time.perf_counter()
    compressor.calibrate(batches)
    calibrated = time.perf_counter()
    train = compressor.compress(batches)
    done = time.perf_counter()
    return Compressed(
        train, compressor.compress(found.batches("query")), (done - calibrated) / n, (calibrated - start) / n
    )


def swept(parts: list[Compressed], kind: str) -> dict[Damping, Tensor]:
    """Damping -> scores [Q, N], averaged over models; none where a Fisher matrix is singular with it."""
    if kind == "dot":
        return {0.0: torch.stack([dropinf.score(p.query, p.train, kind="dot") for p in parts]).mean(0)}
    fishers = [dropinf.build_fisher(p.train, kind) for p in parts]
    found = {}
    for damping in DAMPINGS:
        with contextlib.suppress(ValueError):
            pairs = zip(parts, fishers, strict=True)
            found[damping] = torch.stack(
                [dropinf.score(p.query, p.train, f.with_damping(damping)) for p, f in pairs]
            ).mean(0)
    return found


def evaluate(found: Task, models: list[nn.Module], name: str, dim: int, reference: Tensor | None) -> list[dict]:
    """Rows of the table for one method and size, over all kinds of Fisher matrix and dampings."""
    subsets, by_seed = losses_of(found.name)
    losses = by_seed.mean(1)
    parts = [compressed(found, model, METHODS[name], dim) for model in models]
    rows = []
    for kind in ("dot", *KINDS):
        all_scores = swept(parts, kind)
        values = {
            d: metrics.spearman(*metrics.datamodel(s, subsets, losses)).mean().item() for d, s in all_scores.items()
        }
        # An interval takes a thousand resamples: for what is reported alone.
        reported = {"auto", max((d for d in values if d != "auto"), key=lambda d: values[d], default="auto")}
        for damping, found_scores in all_scores.items():
            interval = metrics.lds(found_scores, subsets, losses) if damping in reported else None
            low, high = ("", "") if interval is None else (f"{interval.low:.4f}", f"{interval.high:.4f}")
            near = "" if reference is None else f"{metrics.spearman(found_scores, reference).mean():.4f}"
            row = (
                found.name, name, dim, parts[0].train.flat.shape[1] * 4, kind, damping, f"{values[damping]:.4f}",
                low, high, near,
                f"{1e3 * parts[0].compress:.3f}", f"{1e3 * parts[0].calibrate:.3f}",
                len(subsets), by_seed.shape[1], len(models),
            )  # fmt: skip
            rows.append(dict(zip(FIELDS, row, strict=True)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = task(arguments.task)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{found.name}.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(r["method"], int(r["dim"])) for r in rows}
    models = [found.fit(torch.ones(len(found.train[0]), dtype=torch.bool), seed) for seed in range(MODELS)]
    whole = [compressed(found, model, METHODS["uncompressed"], 0) for model in models]
    reference = swept(whole, "kronecker")[0.1]
    for name in arguments.methods:
        for dim in arguments.dims if name != "uncompressed" else [0]:
            if (name, dim) in done:
                continue
            rows += evaluate(found, models, name, dim, reference)
            temporary = path.with_suffix(".tmp")
            with temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            temporary.replace(path)
            best = max((r for r in rows if (r["method"], int(r["dim"])) == (name, dim)), key=lambda r: float(r["lds"]))
            print({key: best[key] for key in FIELDS[1:11]}, flush=True)


if __name__ == "__main__":
    main()
