"""How the cost of extraction grows: seconds and memory beyond the floor, in samples, positions, width, layers and k.

python -m bench.endtoend.scaling      # three minutes

One value at a time, around 16 passages of 128 tokens, 4 layers of width 256, k 32; scattered masks, one thread. The
exponent of each is fitted to CPU seconds. Scores: memory of the top ten of 16 queries, in training samples. Writes
bench/results/scaling.csv and .png.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

import dropinf
import dropinf_kernels as ops
from bench.fidelity.files import write_rows
from bench.peak import peak_mb

from .contenders import CONTENDERS, FLOOR
from .models import GPT, Case, next_word

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parents[1] / "results" / "scaling.csv"
BASE = {"samples": 16, "positions": 128, "width": 256, "layers": 4, "k": 32}
SWEEPS = {
    "samples": (8, 16, 32, 64, 128),
    "positions": (32, 64, 128, 256, 512),
    "width": (128, 256, 512, 1024),
    "layers": (2, 4, 8, 16),
    "k": (8, 16, 32, 64, 128),
}
FIELDS = ("swept", "value", "floor_s", "beyond_s", "floor_mb", "beyond_mb")
ROUNDS = 7
Row = dict[str, str]


def case(samples: int, positions: int, width: int, layers: int, k: int) -> Case:
    torch.manual_seed(0)
    model = GPT(512, positions, width, layers, 4).eval()
    ids = torch.randint(512, (2, samples, positions))
    names = tuple(f"blocks.{i}.{name}" for i in range(layers) for name in ("qkv", "out", "up", "down"))
    return Case("sweep", model, (ids[0], ids[1]), next_word, names, k)


def added(job: Callable[[], object], floor: Callable[[], object]) -> tuple[float, float]:
    """Median CPU seconds of the floor, and of what the job adds to it in the same round."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        floor()
        between = time.process_time()
        job()
        seconds.append((between - start, time.process_time() - between))
    return statistics.median(s for s, _ in seconds[1:]), statistics.median(b - a for a, b in seconds[1:])


def extraction(swept: str, value: int) -> Row:
    found = case(**{**BASE, swept: value})
    floor = CONTENDERS[FLOOR].make(found)
    layers = [f"{name}.weight" for name in found.linears]
    compressor = dropinf.Compressor(found.model, dropinf.Dropout(found.dim), found.loss_fn, layers=layers)
    job = lambda: compressor.compress([found.batch])  # noqa: E731
    seconds, beyond = added(job, floor)
    mb, whole = peak_mb(floor), peak_mb(job)
    numbers = {"floor_s": seconds, "beyond_s": beyond, "floor_mb": mb, "beyond_mb": whole - mb}
    return {"swept": swept, "value": str(value), **{key: f"{x:.4g}" for key, x in numbers.items()}}


def scoring(samples: int) -> Row:
    query, train = torch.randn(16, 1024), torch.randn(samples, 1024)
    job = lambda: ops.score_topk(query, train, 10)  # noqa: E731
    start = time.process_time()
    job()
    return {"swept": "training samples scored", "value": str(samples), "floor_s": "", "floor_mb": "",
            "beyond_s": f"{time.process_time() - start:.4g}", "beyond_mb": f"{peak_mb(job):.4g}"}  # fmt: skip


def exponent(rows: list[Row]) -> float:
    x, y = (np.log([float(row[field]) for row in rows]) for field in ("value", "beyond_s"))
    return float(np.polyfit(x, y, 1)[0])


def plot(rows: list[Row], path: Path) -> None:
    swept = list(dict.fromkeys(row["swept"] for row in rows))
    figure, axes = plt.subplots(2, len(swept), figsize=(3 * len(swept), 5.5))
    for column, name in zip(axes.T, swept, strict=True):
        here = [row for row in rows if row["swept"] == name]
        x = [int(row["value"]) for row in here]
        for axis, unit, label in zip(column, ("s", "mb"), ("CPU seconds", "MB"), strict=True):
            axis.plot(x, [float(row[f"beyond_{unit}"]) for row in here], "o-", label="what compression adds")
            if here[0][f"floor_{unit}"]:
                axis.plot(x, [float(row[f"floor_{unit}"]) for row in here], "s:", color="gray", label="floor")
            axis.set(xscale="log", yscale="log", xlabel=name, ylabel=label)
        column[0].set_title(f"time grows as {name}^{exponent(here):.2f}", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    torch.set_num_threads(1)
    rows = [extraction(swept, value) for swept, values in SWEEPS.items() for value in values]
    rows += [scoring(n) for n in (4096, 16384, 65536, 262144)]
    write_rows(RESULTS, FIELDS, rows)
    plot(rows, RESULTS.with_suffix(".png"))
    for swept in dict.fromkeys(row["swept"] for row in rows):
        here = [row for row in rows if row["swept"] == swept]
        memory = " -> ".join(row["beyond_mb"] for row in (here[0], here[-1]))
        print(f"{swept} {here[0]['value']} -> {here[-1]['value']}: seconds^{exponent(here):.2f}, MB {memory}")


if __name__ == "__main__":
    main()
