"""Scores of every method against retraining (LDS) and against uncompressed influence (agreement), at equal bytes.

python -m bench.fidelity.evaluate gpt-brown --bytes 4096 16384 65536
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import dropinf
from bench.files import read_rows, write_rows
from dropinf import metrics

from .baselines import similarity
from .retrain import losses_of
from .tasks import NAMES, Task, task

Damping = float | Literal["auto", "crossed", ""]
Scores = dict[tuple[str, Damping], Tensor]
RESULTS = Path("bench/results/fidelity")
KINDS = ("block", "joint", "diagonal", "kronecker")
DAMPINGS: tuple[Damping, ...] = (*(10.0**e for e in (-3, -2, -1, 0, 1)), "auto")
# Scores of one trained model are noisy: those of several are averaged, for every method alike.
MODELS = 2
CALIBRATION = 300  # training samples, drawn at random, unless said otherwise


@dataclass(frozen=True)
class Method:
    sketch: Callable[[int], dropinf.Sketch]
    layers: tuple[type, ...] | None = None  # all parameters, or modules of these types but the output layer


METHODS = {
    "uncompressed": Method(lambda _: dropinf.Identity()),
    "dropout": Method(lambda k: dropinf.Dropout(k)),
    "dropout, runs of 8": Method(lambda k: dropinf.Dropout(k, group=8)),
    "dropout, runs of 16": Method(lambda k: dropinf.Dropout(k, group=16)),
    "dropout, energy": Method(lambda k: dropinf.Dropout(k, sampling="energy")),
    "dropout, fold of a quarter": Method(lambda k: dropinf.Dropout(k, keep=0.25)),
    "dropout, flat": Method(lambda k: dropinf.Dropout(k * k, mode="flat")),
    "dropout, rotated": Method(lambda k: dropinf.Dropout(k, rank=4 * k)),
    "dropout, rotated, runs of 8": Method(lambda k: dropinf.Dropout(k, rank=4 * k, group=8)),
    "dropout, whitened": Method(lambda k: dropinf.Dropout(k, whiten=True)),
    "dropout, rotated, whitened": Method(lambda k: dropinf.Dropout(k, rank=4 * k, whiten=True)),
    "gaussian": Method(lambda k: dropinf.Gaussian(k)),
    "gaussian, whitened": Method(lambda k: dropinf.Gaussian(k, whiten=True)),
    "pca": Method(lambda k: dropinf.PCA(k)),
    "pca, whitened": Method(lambda k: dropinf.PCA(k, whiten=True)),
    "sjlt": Method(lambda k: dropinf.SJLT(k)),
    "logra (gaussian, linears only)": Method(lambda k: dropinf.Gaussian(k), (nn.Linear,)),
    "logra (pca, linears only)": Method(lambda k: dropinf.PCA(k), (nn.Linear,)),
}
# What dropinf.choose makes of the same bytes, and without each of its parts.
CHOICES = {
    "chosen": {},
    "chosen, not whitened": {"whiten": False},
    "chosen, not rotated": {"oversample": 1},
    "chosen, equal sizes": {"allocate": "equal"},
}
BASELINE = "similarity, no model"
FIELDS = (
    "task", "method", "budget", "dim", "bytes_per_sample", "kind", "damping", "lds", "lds_low", "lds_high",
    "agreement", "compress_ms_per_sample", "calibrate_ms_per_sample", "subsets", "seeds", "models", "calibration",
)  # fmt: skip


@dataclass(frozen=True)
class Compressed:
    """One method's gradients of one model, and what they cost."""

    train: dropinf.Gradients
    query: dropinf.Gradients
    compress: float  # seconds per sample
    calibrate: float  # seconds per sample of the calibration


def calibration(found: Task, count: int) -> list[tuple[Tensor, ...]]:
    """Training samples in random order."""
    rows = torch.randperm(len(found.train[0]), generator=torch.Generator().manual_seed(0))[:count]
    return list(zip(*(x[rows].split(50) for x in found.train), strict=True))


def tracked(model: nn.Module, method: Method) -> list[str] | None:
    """As rivals do, without the output layer, where a method names types of layers."""
    if method.layers is None:
        return None
    return [n for n, m in model.named_modules() if isinstance(m, method.layers)][:-1]


def stored(model: nn.Module, sketch: dropinf.Sketch, loss_fn: Callable, layers: list[str] | None = None) -> int:
    """Bytes per sample of a sketch that needs no calibration."""
    plans = dropinf.Compressor(model, sketch, loss_fn, layers=layers).layers.values()
    return 4 * sum(math.prod(plan.stored_shape) for plan in plans)


def size(model: nn.Module, method: Method, budget: int, loss_fn: Callable) -> int:
    """The largest dim whose gradients take at most ``budget`` bytes, of whole runs where a mask is made of runs."""
    layers = tracked(model, method)

    def needed(dim: int) -> int:
        flat = method.sketch(dim).mode == "flat"
        probe = dropinf.Dropout(dim * dim, mode="flat") if flat else dropinf.Dropout(dim)
        return stored(model, probe, loss_fn, layers)

    dim = 1
    while needed(dim + 1) <= budget:
        dim += 1
    group = getattr(method.sketch(dim), "group", 1)
    return dim if dim < group else dim - dim % group


def compressed(found: Task, model: nn.Module, name: str, dim: int, budget: int, count: int = 1) -> Compressed:
    """Calibrate on ``count`` samples, and compress everything."""
    part = calibration(found, count)
    start = time.perf_counter()
    if name in CHOICES:
        sketch = dropinf.choose(model, part, found.loss_fn, budget_bytes=budget, **CHOICES[name]).sketch
        layers = None
    else:
        sketch, layers = METHODS[name].sketch(dim), tracked(model, METHODS[name])
    compressor = dropinf.Compressor(model, sketch, found.loss_fn, layers=layers)
    compressor.calibrate(part)
    calibrated = time.perf_counter()
    train = compressor.compress(found.batches("train"))
    done = time.perf_counter()
    query = compressor.compress(found.batches("query"))
    return Compressed(train, query, (done - calibrated) / len(train), (calibrated - start) / count)


def scores(parts: list[Compressed], *, factors: bool) -> Scores:
    """(kind, damping) -> scores [Q, N], averaged over models; none where a Fisher matrix is singular with a damping.

    ``factors``: K-FAC without EK-FAC's correction too."""
    found: Scores = {}
    for kind in ("dot", "cosine"):
        found[kind, ""] = torch.stack([dropinf.score(p.query, p.train, kind=kind) for p in parts]).mean(0)
    for kind in (*KINDS, *(["k-fac"] if factors else [])):
        if kind == "k-fac":
            fishers = [dropinf.Fisher("kronecker").update(p.train) for p in parts]
        else:
            fishers = [dropinf.build_fisher(p.train, kind) for p in parts]
        for damping in DAMPINGS:
            with contextlib.suppress(ValueError):
                pairs = zip(parts, fishers, strict=True)
                found[kind, damping] = torch.stack(
                    [dropinf.score(p.query, p.train, f.with_damping(damping)) for p, f in pairs]
                ).mean(0)
    return found


def crossed(found: Scores, per_query: dict[tuple[str, Damping], Tensor]) -> Tensor:
    """Each half of the queries under the Fisher matrix and damping that are best for the other half: [Q, N]."""
    settings = list(found)
    table = torch.stack([per_query[s] for s in settings])  # [settings, Q]
    even = torch.arange(table.shape[1]) % 2 == 0
    mixed = torch.empty_like(found[settings[0]])
    for half in (even, ~even):
        mixed[half] = found[settings[int(table[:, ~half].mean(1).argmax())]][half]
    return mixed


def evaluate(found: Scores, losses: Tensor, subsets: Tensor, reference: Tensor | None) -> list[dict[str, str]]:
    """Rows of the table for one method and size: every setting, and the one that was best on other queries."""
    per_query = {s: metrics.spearman(*metrics.datamodel(x, subsets, losses)) for s, x in found.items()}
    values = {s: float(v.mean()) for s, v in per_query.items()}
    # An interval takes a thousand resamples: for what is reported alone.
    reported = {max((s for s in values if (s[1] == "auto") == auto), key=values.__getitem__, default=None)
                for auto in (True, False)} | {("kronecker", "auto")}  # fmt: skip
    everything = dict(found)
    if len(found) > 1:
        everything["any", "crossed"] = crossed(found, per_query)
        reported.add(("any", "crossed"))
    rows = []
    for setting, score in everything.items():
        interval = metrics.lds(score, subsets, losses) if setting in reported or len(everything) == 1 else None
        rows.append(
            {
                "kind": setting[0],
                "damping": str(setting[1]),
                "lds": f"{interval.value if interval else values[setting]:.4f}",
                "lds_low": f"{interval.low:.4f}" if interval else "",
                "lds_high": f"{interval.high:.4f}" if interval else "",
                "agreement": "" if reference is None else f"{metrics.spearman(score, reference).mean():.4f}",
            }
        )
    return rows


def measured(
    found: Task, models: list[nn.Module], name: str, budget: int, count: int, reference: Tensor | None
) -> list[dict]:
    """All rows of one method at one budget, calibrated on ``count`` samples."""
    subsets, by_seed = losses_of(found.name)
    about: dict[str, object] = {"task": found.name, "method": name, "budget": budget or ""}
    about |= {"subsets": len(subsets), "seeds": by_seed.shape[1], "models": len(models), "calibration": count}
    if name == BASELINE:
        every: Scores = {("cosine", ""): similarity(found)}
    else:
        plain = name != "uncompressed" and name not in CHOICES
        dim = size(models[0], METHODS[name], budget, found.loss_fn) if plain else 0
        parts = [compressed(found, model, name, dim, budget, count) for model in models]
        every = scores(parts, factors=name == "uncompressed")
        about |= {"dim": dim or "", "bytes_per_sample": parts[0].train.bytes_per_sample}
        for field in ("compress", "calibrate"):
            about[f"{field}_ms_per_sample"] = f"{1e3 * min(getattr(p, field) for p in parts):.3f}"
    return [about | row for row in evaluate(every, by_seed.mean(1), subsets, reference)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    every = [BASELINE, *METHODS, *CHOICES]
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("--bytes", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--calibration", type=int, default=CALIBRATION)
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = task(arguments.task)
    path = RESULTS / f"{found.name}.csv"
    rows = read_rows(path)
    count = arguments.calibration
    done = {(r["method"], r["budget"]) for r in rows if int(r.get("calibration") or CALIBRATION) == count}
    todo = [
        (name, budget)
        for name in arguments.methods
        for budget in (arguments.bytes if name not in (BASELINE, "uncompressed") else [0])
        if (name, str(budget or "")) not in done
    ]
    if not todo:
        return
    models = [found.fit(torch.ones(len(found.train[0]), dtype=torch.bool), seed) for seed in range(MODELS)]
    whole = [compressed(found, model, "uncompressed", 0, 0) for model in models]
    fishers = [dropinf.build_fisher(p.train, "kronecker", 0.1) for p in whole]
    pairs = zip(whole, fishers, strict=True)
    reference = torch.stack([dropinf.score(p.query, p.train, f) for p, f in pairs]).mean(0)
    del whole, fishers
    for name, budget in todo:
        new = measured(found, models, name, budget, count, reference)
        rows += new
        write_rows(path, FIELDS, rows)
        best = max(new, key=lambda r: r["lds"])
        print({key: best.get(key, "") for key in FIELDS[1:13]}, flush=True)


if __name__ == "__main__":
    main()
