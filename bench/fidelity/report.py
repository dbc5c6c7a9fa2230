"""Tables and plots of bench/results/fidelity/<task>.csv: python -m bench.fidelity.report"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from .evaluate import CALIBRATION, RESULTS
from .tasks import NAMES

Row = dict[str, str]


def groups(path: Path) -> dict[tuple[str, int], list[Row]]:
    """(method, budget) -> its rows, over kinds of Fisher matrix and dampings."""
    found = defaultdict(list)
    for row in csv.DictReader(path.open()):
        if int(row.get("calibration") or CALIBRATION) == CALIBRATION:
            found[row["method"], int(row["budget"] or 0)].append(row)
    return found


def curve(path: Path) -> str:
    """How much calibration does: samples against LDS, for methods that were calibrated on several numbers."""
    found: dict[tuple[str, str], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader(path.open()):
        found[row["method"], row["bytes_per_sample"]][int(row.get("calibration") or CALIBRATION)].append(row)
    lines = []
    for (method, size), by_count in found.items():
        if len(by_count) > 1:
            values = ", ".join(f"{n}: {interval(judged(rows))}" for n, rows in sorted(by_count.items()))
            lines.append(f"{method}, {int(size):,} bytes, by calibration samples: {values}")
    return "\n".join(lines)


def judged(rows: list[Row]) -> Row:
    """The row whose Fisher matrix and damping were chosen on other queries; the only one, of a baseline."""
    return next((r for r in rows if r["damping"] == "crossed"), rows[0])


def best(rows: list[Row], *, auto: bool) -> Row | None:
    """The row of greatest LDS: with the damping that needs no retraining, or of the sweep."""
    wanted = [r for r in rows if r["damping"] != "crossed" and (r["damping"] == "auto") == auto]
    return max(wanted, key=lambda r: float(r["lds"]), default=None)


def interval(row: Row) -> str:
    return f"{float(row['lds']):.3f} [{float(row['lds_low']):.3f}, {float(row['lds_high']):.3f}]"


def short(row: Row | None) -> str:
    return "" if row is None else f"{float(row['lds']):.3f} ({', '.join(filter(None, (row['kind'], row['damping'])))})"


def table(path: Path) -> str:
    lines = [
        "| method | dim | bytes | LDS | best of the sweep | best with auto | agreement | ms | calibration |",
        "|---|---:|---:|---|---|---|---:|---:|---:|",
    ]
    for (method, _), rows in groups(path).items():
        row = judged(rows)
        size = f"{int(row['bytes_per_sample']):,}" if row["bytes_per_sample"] else ""
        near = max((float(r["agreement"]) for r in rows if r["agreement"]), default=float("nan"))
        swept, auto = short(best(rows, auto=False)), short(best(rows, auto=True)).replace(", auto", "")
        lines.append(
            f"| {method} | {row['dim']} | {size} | {interval(row)} | {swept} | {auto} | {near:.2f} | "
            f"{row['compress_ms_per_sample']} | {row['calibrate_ms_per_sample']} |"
        )
    return "\n".join(lines)


def plot(path: Path) -> None:
    """Quality against bytes and against seconds, a line per method."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    lines = defaultdict(list)
    for (method, _), rows in groups(path).items():
        row = judged(rows)
        if not row["bytes_per_sample"]:
            axes[0].axhline(float(row["lds"]), color="gray", linestyle=":", label=method)
            continue
        fields = ("bytes_per_sample", "compress_ms_per_sample", "lds", "lds_low", "lds_high")
        lines[method].append([float(row[field]) for field in fields])
    for number, (method, points) in enumerate(lines.items()):
        bytes_, ms, lds, low, high = zip(*sorted(points), strict=True)
        errors = [[a - b for a, b in zip(lds, low, strict=True)], [b - a for a, b in zip(lds, high, strict=True)]]
        color = "black" if method == "chosen" else mpl.colormaps["tab20"](number % 20)
        style = {"color": color, "marker": "os^Dv"[number // 20 % 5 + number % 2]}
        for axis, x in zip(axes, (bytes_, ms), strict=True):
            axis.errorbar(x, lds, errors, label=method, capsize=2, linewidth=1, elinewidth=0.5, **style)
    axes[0].set(xscale="log", xlabel="bytes per sample", ylabel="LDS, 95 % interval", title=path.stem)
    axes[1].set(xscale="log", xlabel="milliseconds to compress a sample, one thread")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main() -> None:
    for path in (RESULTS / f"{name}.csv" for name in NAMES):
        if path.exists():
            print(f"### {path.stem}\n\n{table(path)}\n\n{curve(path)}\n")
            plot(path)


if __name__ == "__main__":
    main()
