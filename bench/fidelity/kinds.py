"""Does any number that calibration samples give say which Fisher kind is best for LDS? With damping "auto".

python -m bench.fidelity.kinds mlp-fashion
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

import dropinf
from bench.files import read_rows, write_rows
from dropinf import metrics

from .evaluate import CALIBRATION, CHOICES, KINDS, METHODS, RESULTS, calibration, size
from .tasks import Task, task

PATH = RESULTS / "kinds.csv"
BUDGETS = {
    "mlp-fashion": (1024, 4096),
    "words-brown": (1024, 4096),
    "resnet9-fashion": (2048, 8192),
    "gpt-brown": (4096, 16384),
}
SKETCHES = ("dropout", "dropout, energy", "gaussian", "chosen")


def likelihood(fisher: dropinf.Fisher, precision: Tensor, held: dropinf.Gradients) -> float:
    """Mean log-likelihood of held-out rows under a Gaussian of this covariance, up to a constant."""
    return 0.5 * float(torch.linalg.slogdet(precision).logabsdet - fisher.quadratic(held).double().mean())


def matching(fisher: dropinf.Fisher, precision: Tensor, held: dropinf.Gradients) -> float:
    """Score matching at the best scale, layer by layer: sum_l log(tr(P_l)^2 / E |(P c)_l|^2)."""
    solved, diagonal, at, found = fisher.solve(held), precision.diagonal(), 0, 0.0
    for name, shape in held.shapes.items():
        count = math.prod(shape)
        trace, energy = diagonal[at : at + count].sum(), solved[name].double().flatten(1).square().sum(1).mean()
        found, at = found + float((trace.square() / energy).log()), at + count
    return found


CRITERIA: dict[str, Callable[[dropinf.Fisher, Tensor, dropinf.Gradients], float]] = {
    "likelihood": likelihood,
    "score matching": matching,
}
FIELDS = ("task", "method", "budget", "kind", "lds", *CRITERIA, "half agreement")


def gradients(found: Task, name: str, budget: int) -> dropinf.Gradients:
    """Compressed calibration samples of one trained model, in float64."""
    model = found.fit(torch.ones(len(found.train[0]), dtype=torch.bool), 0)
    part = calibration(found, CALIBRATION)
    if name in CHOICES:
        sketch = dropinf.choose(model, part, found.loss_fn, budget_bytes=budget, **CHOICES[name]).sketch
    else:
        sketch = METHODS[name].sketch(size(model, METHODS[name], budget, found.loss_fn))
    compressor = dropinf.Compressor(model, sketch, found.loss_fn)
    compressor.calibrate(part)
    return compressor.compress(part).to(torch.float64)


def measured(rows: dropinf.Gradients, kind: str) -> dict[str, float]:
    """Return each criterion, the mean of two folds."""
    even = torch.arange(len(rows)) % 2 == 0
    halves = rows[even], rows[~even]
    fishers = [dropinf.build_fisher(half, kind, "auto") for half in halves]
    found = dict.fromkeys(CRITERIA, 0.0)
    unit = torch.eye(rows.flat.shape[1], dtype=torch.float64)
    for fisher, held in zip(fishers, halves[::-1], strict=True):
        solved = fisher.solve(dropinf.Gradients(unit, rows.shapes, rows.digest)).flat.double()
        for name, criterion in CRITERIA.items():
            found[name] += criterion(fisher, (solved + solved.T) / 2, held) / 2
    one, other = (dropinf.score(rows, rows, fisher) for fisher in fishers)
    return found | {"half agreement": float(metrics.spearman(one, other).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=BUDGETS)
    name = parser.parse_args().task
    torch.set_num_threads(1)
    truth = {
        (r["method"], r["budget"], r["kind"]): r["lds"]
        for r in read_rows(RESULTS / f"{name}.csv")
        if r["damping"] == "auto" and int(r["calibration"] or CALIBRATION) == CALIBRATION
    }
    table = [r for r in read_rows(PATH) if r["task"] != name]
    for method in SKETCHES:
        for budget in BUDGETS[name]:
            rows = gradients(task(name), method, budget)
            for kind in KINDS:
                about = {"task": name, "method": method, "budget": budget, "kind": kind}
                about["lds"] = truth[method, str(budget), kind]
                table.append(about | {key: f"{x:.5g}" for key, x in measured(rows, kind).items()})
                print(table[-1], flush=True)
            write_rows(PATH, FIELDS, table)


if __name__ == "__main__":
    main()
