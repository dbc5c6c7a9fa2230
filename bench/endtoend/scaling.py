"""How cost grows in samples, positions, width, layers and k: what compression takes, what extraction holds, the floor.

python -m bench.endtoend.scaling      # three minutes

One value at a time, around 16 passages of 128 tokens, 4 layers of width 256, k 32; scattered masks, one thread. An
exponent is the slope of a line through the logarithms. Scores: the top ten of 16 queries, in rows of 64 numbers.
Writes bench/results/scaling.csv and .png.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

import dropinf_kernels as ops
from bench.files import write_rows
from bench.peak import peak_mb
from dropinf.capture.layer import Layer

from .contenders import CONTENDERS, FLOOR, make_compressor
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
FIELDS = ("swept", "value", "floor_s", "compression_s", "floor_mb", "extraction_mb")
ROUNDS = 7
Row = dict[str, str]


def case(samples: int, positions: int, width: int, layers: int, k: int) -> Case:
    torch.manual_seed(0)
    model = GPT(512, positions, width, layers, 4).eval()
    ids = torch.randint(512, (2, samples, positions))
    names = tuple(f"blocks.{i}.{name}" for i in range(layers) for name in ("qkv", "out", "up", "down"))
    return Case("sweep", model, (ids[0], ids[1]), next_word, names, k)


def compression(found: Case, layers: Mapping[str, Layer]) -> Callable[[], None]:
    """What the hooks do for every layer, on random activations: the difference of two extractions drowns in noise."""
    sides = [(layer.in_axis, layer.out_axis) for layer in layers.values() if layer.in_axis is not None]
    assert len(sides) == len(found.linears)
    calls = [(*pair, *(torch.randn(*found.batch[0].shape, axis.size) for axis in pair)) for pair in sides]

    def job() -> None:
        for inner, outer, a, g in calls:
            ops.compress_linear(inner.apply(a), g, None, None, *outer.table)

    return job


def seconds(job: Callable[[], object]) -> float:
    """Median CPU seconds, after one run that is not counted."""
    found = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        job()
        found.append(time.process_time() - start)
    return statistics.median(found[1:])


def extraction(swept: str, value: int) -> Row:
    found = case(**{**BASE, swept: value})
    floor = CONTENDERS[FLOOR].make(found)
    compressor = make_compressor(found, "Dropout")
    job = lambda: compressor.compress([found.batch])  # noqa: E731
    job()  # the first checks whose gradient is whose
    numbers = {"floor_s": seconds(floor), "compression_s": seconds(compression(found, compressor.layers))}
    numbers |= {"floor_mb": peak_mb(floor), "extraction_mb": peak_mb(job)}
    return {"swept": swept, "value": str(value), **{key: f"{x:.4g}" for key, x in numbers.items()}}


def scoring(samples: int) -> Row:
    query, train = torch.randn(16, 64), torch.randn(samples, 64)
    job = lambda: ops.score_topk(query, train, 10)  # noqa: E731
    return {"swept": "rows scored", "value": str(samples), "floor_s": "", "floor_mb": "",
            "compression_s": f"{seconds(job):.4g}", "extraction_mb": f"{peak_mb(job):.4g}"}  # fmt: skip


def exponent(rows: list[Row], field: str) -> float:
    x, y = (np.log([float(row[name]) for row in rows]) for name in ("value", field))
    return float(np.polyfit(x, y, 1)[0])


def plot(rows: list[Row], path: Path) -> None:
    swept = list(dict.fromkeys(row["swept"] for row in rows))
    figure, axes = plt.subplots(2, len(swept), figsize=(3 * len(swept), 5.5))
    for column, name in zip(axes.T, swept, strict=True):
        here = [row for row in rows if row["swept"] == name]
        x = [int(row["value"]) for row in here]
        for axis, ours, floor, label in zip(
            column, ("compression_s", "extraction_mb"), ("floor_s", "floor_mb"), ("CPU seconds", "MB"), strict=True
        ):
            axis.plot(x, [float(row[ours]) for row in here], "o-", label=ours.split("_")[0])
            if here[0][floor]:
                axis.plot(x, [float(row[floor]) for row in here], "s:", color="gray", label="floor")
                axis.legend(fontsize=7)
            axis.set(xscale="log", yscale="log", xlabel=name, ylabel=label)
            axis.set_title(f"{ours.split('_')[0]}: {name}^{exponent(here, ours):.2f}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    torch.set_num_threads(1)
    rows = [extraction(swept, value) for swept, values in SWEEPS.items() for value in values]
    rows += [scoring(n) for n in (2**20, 2**21, 2**22)]
    write_rows(RESULTS, FIELDS, rows)
    plot(rows, RESULTS.with_suffix(".png"))
    print("| swept | compression, CPU s | exponent | floor, CPU s | extraction, MB | exponent | floor, MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for swept in dict.fromkeys(row["swept"] for row in rows):
        here = [row for row in rows if row["swept"] == swept]
        ends = {f: " to ".join(row[f] for row in (here[0], here[-1])) for f in FIELDS[1:]}
        fits = {f: f"{exponent(here, f):.2f}" for f in ("compression_s", "extraction_mb")}
        print(
            f"| {swept} {ends['value']} | {ends['compression_s']} | {fits['compression_s']} | {ends['floor_s']} "
            f"| {ends['extraction_mb']} | {fits['extraction_mb']} | {ends['floor_mb']} |"
        )


if __name__ == "__main__":
    main()
