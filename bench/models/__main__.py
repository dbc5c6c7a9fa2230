"""Extraction over a training step of the same batch, model by model: ``python -m bench.models [NAME ...]``.

Eight rounds, each four training steps (forward, backward with every weight's gradient) and an extraction of 25 batches
without audit, one after the other, in processor seconds of one thread; the ratio of the medians of a batch. An audit
costs one training step and the sketch of its gradients; ``with audits`` adds what they come to over a call of 200
batches.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

import dropinf
from bench.files import processor, read_rows, replacing, write_rows
from bench.models.zoo import CASES
from bench.peak import peak_mb
from dropinf.capture.audit import is_due

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parents[1] / "results"
FIELDS = [
    "model", "parameters", "route", "step_ms", "extract_ms", "ratio", "with_audits", "step_mb", "extract_mb", "cpu",
]  # fmt: skip
ROUNDS, STEPS, IN_A_CALL, BATCHES = 8, 4, 25, 200


def seconds(job: Callable[[], object]) -> float:
    start = time.process_time()
    job()
    return time.process_time() - start


def measure(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batch, loss_fn = CASES[name]()
    model.eval()
    compressor = dropinf.Compressor(model, dropinf.Dropout(8), loss_fn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = seconds(lambda: compressor.compress([batch]))
    compressor._sweep.audit = "never"

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss_fn(model, batch).sum().backward()

    def extract() -> None:
        compressor.compress([batch] * IN_A_CALL)

    step(), extract()
    steps, extractions = zip(
        *(
            (seconds(lambda: [step() for _ in range(STEPS)]) / STEPS, seconds(extract) / IN_A_CALL)
            for _ in range(ROUNDS)
        ),
        strict=True,
    )
    model.zero_grad(set_to_none=True)
    cost, ratio = statistics.median(steps), statistics.median(extractions) / statistics.median(steps)
    audits = 1 + sum(is_due(b) for b in range(1, BATCHES + 1))
    rungs = Counter(compressor._sweep.ladder.rungs.values())
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "route": " ".join(f"{rung} {count}" for rung, count in rungs.items()),
        "step_ms": f"{cost * 1e3:.1f}",
        "extract_ms": f"{ratio * cost * 1e3:.1f}",
        "ratio": f"{ratio:.2f}",
        "with_audits": f"{ratio + (first / cost - ratio + (audits - 1)) / BATCHES:.2f}",
        "step_mb": f"{peak_mb(step):.0f}",
        "extract_mb": f"{peak_mb(lambda: compressor.compress([batch])):.0f}",
        "cpu": processor(),
    }


def draw(rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda r: float(r["ratio"]))
    fig, axis = plt.subplots(figsize=(7, 0.24 * len(rows) + 1), layout="constrained")
    axis.barh([r["model"] for r in rows], [float(r["ratio"]) for r in rows], color="#4477aa")
    axis.axvline(1, color="0.4", linewidth=1)
    axis.set_xlabel("extraction / training step of the same batch")
    with replacing(RESULTS / "models.png") as path:
        fig.savefig(path, dpi=110, format="png")
    plt.close(fig)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    path = RESULTS / "models.csv"
    rows = {row["model"]: row for row in read_rows(path)}
    writer = csv.DictWriter(sys.stdout, FIELDS)
    writer.writeheader()
    for name in names or CASES:
        rows[name] = measure(name)
        writer.writerow(rows[name])
        sys.stdout.flush()
        write_rows(path, FIELDS, [rows[n] for n in CASES if n in rows])
    draw([rows[n] for n in CASES if n in rows])


if __name__ == "__main__":
    main(sys.argv[1:])
