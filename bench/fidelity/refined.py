"""LDS of refined directions, against EK-FAC of whole gradients at its best damping, and the compressed Fisher matrix.

python -m bench.fidelity.refined mlp-fashion; python -m bench.fidelity.refined table
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf
from bench.files import read_rows, write_rows
from dropinf import metrics

from .evaluate import METHODS, RESULTS, size
from .retrain import losses_of
from .tasks import Task, task

PATH = RESULTS / "refined.csv"
FIELDS = (
    "task", "method", "damping", "steps", "lds", "lds_low", "lds_high", "against_ekfac", "against_low", "against_high",
    "against_start", "start_low", "start_high", "residual", "seconds_per_step", "queries", "models",
)  # fmt: skip
BUDGET = 16384  # bytes a sample of the compressed gradients
EKFAC, START = "EK-FAC, whole", "dropout, 16 KB, block"
RESAMPLES = 2000
DAMPINGS = (0.001, 0.01, 0.1, 1, 10, "auto")  # of EK-FAC: refined directions are compared with the best


class Plan(NamedTuple):
    """What is affordable on two cores."""

    queries: int  # every 100 // queries-th of the task's
    models: int
    steps: tuple[int, ...]
    dampings: dict[str, tuple[float, ...]]


EVERY = {"fisher": (10,), "gauss-newton": (1, 10, 100), "start": (10,), "EK-FAC": (1, 10)}
PLANS = {
    "words-brown": Plan(33, 1, (1, 2, 4, 8), EVERY),
    "mlp-fashion": Plan(50, 2, (1, 2, 4, 8), EVERY),
    "resnet9-fashion": Plan(33, 1, (1, 2, 4), {"gauss-newton": (1, 10), "start": (10,), "EK-FAC": (10,)}),
    "gpt-brown": Plan(20, 1, (1, 2, 4), {"gauss-newton": (10,)}),
}
NAMES = {
    "fisher": "refined, empirical Fisher",
    "gauss-newton": "refined, Gauss-Newton",
    "start": "refined, Gauss-Newton, from the compressed Fisher",
    "EK-FAC": "refined, Gauss-Newton, preconditioned by EK-FAC",
}


def outputs(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Logits of classes, or of the next words of a chunk."""
    return model(batch[0] if len(batch) == 2 else batch[0][:, :-1])


def loss_of_outputs(logits: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    if len(batch) == 2:
        return F.cross_entropy(logits, batch[1], reduction="none")
    return F.cross_entropy(logits.mT, batch[0][:, 1:], reduction="none").mean(1)


class Prepared:
    """One trained model, its whole and its compressed gradients, and the Fisher matrices of both."""

    def __init__(self, found: Task, seed: int, queries: list[tuple[Tensor, ...]]) -> None:
        self.task, self.queries, self.train = found, queries, found.batches("train", 100)
        self.model = found.fit(torch.ones(len(found.train[0]), dtype=torch.bool), seed)
        self.whole = dropinf.Compressor(self.model, dropinf.Identity(), found.loss_fn)
        self.rows, asked = self.whole.compress(self.train), self.whole.compress(queries)
        self.ekfac = dropinf.build_fisher(self.rows, "kronecker", 0.1)
        dim = size(self.model, METHODS["dropout"], BUDGET, found.loss_fn)
        self.compressor = dropinf.Compressor(self.model, dropinf.Dropout(dim), found.loss_fn)
        kept, self.asked = self.compressor.compress(self.train), self.compressor.compress(queries)
        self.fisher = dropinf.build_fisher(kept, "block", "auto")
        self.plain: dict[tuple[str, str], Tensor] = {}
        for d in DAMPINGS:
            with contextlib.suppress(ValueError):  # singular
                self.plain[EKFAC, str(d)] = dropinf.score(asked, self.rows, self.ekfac.with_damping(d))
        self.plain["dot, whole", ""] = dropinf.score(asked, self.rows, kind="dot")
        self.plain[START, "auto"] = dropinf.score(self.asked, kept, self.fisher)

    def scores(self, direction: dropinf.Direction) -> Tensor:
        """Products with the whole gradient of every training sample, [Q, N]."""
        rows = []
        for q in range(len(direction)):
            parts = [
                layer.compress_exact(direction.tensor(layer.parameter, q)[None]).flatten(1)
                for layer in self.whole.layers.values()
            ]
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows) @ self.rows.flat.T

    def refined(self, kind: str, damping: float, steps: tuple[int, ...]) -> Iterator[tuple[int, Tensor, float, float]]:
        """Yield the number of steps, scores, the median residual of the queries and seconds a step."""
        options: dict[str, Any] = {}
        if kind != "fisher":
            options = {"curvature": "gauss-newton", "outputs_fn": outputs, "loss_of_outputs": loss_of_outputs}
        if kind == "start":
            options["start"] = dropinf.direction(self.asked, self.fisher, self.compressor)
        if kind == "EK-FAC":
            options["precondition"] = (self.ekfac, self.whole)
        with tempfile.TemporaryDirectory() as folder:
            taken = 0
            for count in steps:
                start = time.perf_counter()
                refined = dropinf.refine(
                    self.model, self.queries, self.train, self.task.loss_fn, damping=damping, steps=count,
                    out=Path(folder) / "state", **options,
                )  # fmt: skip
                seconds = (time.perf_counter() - start) / (count - taken)
                taken = count
                yield count, self.scores(refined.direction), float(refined.residuals[-1].median()), seconds


def gain(per_query: Tensor, other: Tensor) -> tuple[float, float, float]:
    """Return how much higher the mean over queries is, with the 95 % interval of a bootstrap over queries."""
    apart = per_query - other
    drawn = torch.randint(len(apart), (RESAMPLES, len(apart)), generator=torch.Generator().manual_seed(0))
    low, high = apart[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=apart.dtype))
    return float(apart.mean()), float(low), float(high)


def rows_of(name: str) -> Iterator[dict[str, object]]:
    """Yield a row of the table for each method, damping and number of steps."""
    plan, found = PLANS[name], task(name)
    chosen = torch.arange(0, 100, 100 // plan.queries)[: plan.queries]
    queries = list(zip(*(x[chosen].split(50) for x in found.query), strict=True))
    subsets, by_seed = losses_of(name)
    losses = by_seed.mean(1)[:, chosen]
    models = [Prepared(found, seed, queries) for seed in range(plan.models)]

    def row(method: str, damping: object, scores: list[Tensor], **more: object) -> dict[str, object]:
        found = metrics.lds(torch.stack(scores).mean(0), subsets, losses)
        if method not in known or (method == EKFAC and found.value > float(known[method].mean())):
            known[method] = found.per_query
        numbers = {"lds": found.value, "lds_low": found.low, "lds_high": found.high}
        for other, fields in ((EKFAC, ("ekfac", "low", "high")), (START, ("start", "low", "high"))):
            if other in known and other != method:
                names = (
                    f"against_{fields[0]}",
                    *(f"{'against' if other == EKFAC else 'start'}_{x}" for x in fields[1:]),
                )
                numbers |= dict(zip(names, gain(found.per_query, known[other]), strict=True))
        about = {"task": name, "method": method, "damping": damping, "queries": len(chosen), "models": len(models)}
        return about | {key: f"{x:.4f}" for key, x in numbers.items()} | more

    known: dict[str, Tensor] = {}
    for method, damping in [key for key in models[0].plain if all(key in m.plain for m in models)]:
        yield row(method, damping, [m.plain[method, damping] for m in models])
    for kind, dampings in plan.dampings.items():
        for damping in dampings:
            for parts in zip(*(m.refined(kind, damping, plan.steps) for m in models), strict=True):
                more = {
                    "steps": parts[0][0],
                    "residual": f"{parts[0][2]:.3g}",
                    "seconds_per_step": f"{parts[0][3]:.1f}",
                }
                yield row(NAMES[kind], f"{damping:g}", [p[1] for p in parts], **more)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a markdown table: LDS after each number of steps, and differences at the last; EK-FAC at its best alone."""
    yield "| task | method | damping | LDS, after 1, 2, 4, 8 steps | last, against EK-FAC | against the compressed |"
    yield "|---|---|---|---|---|---|"
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"], row["damping"]), []).append(row)
    best: dict[str, float] = {}
    for row in rows:
        if row["method"] == EKFAC:
            best[row["task"]] = max(best.get(row["task"], 0.0), float(row["lds"]))
    for (name, method, damping), found in groups.items():
        if method == EKFAC and float(found[0]["lds"]) < best[name]:
            continue
        numbers = ", ".join(f"{float(r['lds']):.3f}" for r in found)
        last, cells = found[-1], []
        for fields in (("against_ekfac", "against_low", "against_high"), ("against_start", "start_low", "start_high")):
            value, low, high = (last[field] for field in fields)
            cells.append(f"{float(value):+.3f} [{float(low):+.3f}, {float(high):+.3f}]" if value else "")
        if method == EKFAC or not last["steps"]:
            numbers += f" [{float(last['lds_low']):.3f}, {float(last['lds_high']):.3f}]"
            cells = ["", ""]
        yield f"| {name} | {method} | {damping} | {numbers} | {cells[0]} | {cells[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=[*PLANS, "table"], help="'table' prints what was measured")
    name = parser.parse_args().task
    if name == "table":
        print(*table(read_rows(PATH)), sep="\n")
        return
    torch.set_num_threads(1)
    rows = [r for r in read_rows(PATH) if r["task"] != name]
    for row in rows_of(name):
        rows.append(row)
        write_rows(PATH, FIELDS, rows)
        print({key: x for key, x in row.items() if key in FIELDS[1:14]}, flush=True)


if __name__ == "__main__":
    main()
