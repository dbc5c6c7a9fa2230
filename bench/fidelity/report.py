"""Tables and plots of bench/results/fidelity/*.csv: python -m bench.fidelity.report"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from .evaluate import RESULTS

Row = dict[str, str]


def groups(path: Path) -> dict[tuple[str, int], list[Row]]:
    """(method, dim) -> its rows, over kinds of Fisher matrix and dampings."""
    found = defaultdict(list)
    for row in csv.DictReader(path.open()):
        found[row["method"], int(row["dim"])].append(row)
    return found


def best(rows: list[Row], *, auto: bool) -> Row | None:
    """The row of greatest LDS: of the damping that was chosen without retraining, or of the sweep."""
    # The evaluation computes an interval for these rows alone.
    wanted = [r for r in rows if (r["damping"] == "auto") == auto and r["lds_low"]]
    return max(wanted, key=lambda r: float(r["lds"]), default=None)


def table(path: Path) -> str:
    lines = [
        "| method | dim | bytes | LDS, damping swept | with | LDS, chosen | agreement | ms a sample | calibration |",
        "|---|---:|---:|---|---|---|---:|---:|---:|",
    ]  # fmt: skip
    for (method, dim), rows in groups(path).items():
        swept, auto = best(rows, auto=False), best(rows, auto=True)
        assert swept is not None
        near = max((float(r["agreement"]) for r in rows if r["agreement"]), default=float("nan"))
        chosen = "" if auto is None else f"{float(auto['lds']):.3f} ({auto['kind']})"
        lines.append(
            f"| {method} | {dim or ''} | {int(swept['bytes_per_sample']):,} | {float(swept['lds']):.3f} "
            f"[{float(swept['lds_low']):.3f}, {float(swept['lds_high']):.3f}] | {swept['kind']}, {swept['damping']} | "
            f"{chosen} | {near:.2f} | {swept['compress_ms_per_sample']} | {swept['calibrate_ms_per_sample']} |"
        )
    return "\n".join(lines)


def plot(path: Path) -> None:
    """Quality against bytes and against seconds, a line per method."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    lines = defaultdict(list)
    for (method, _), rows in groups(path).items():
        row = best(rows, auto=False)
        assert row is not None
        lines[method].append(
            [float(row[k]) for k in ("bytes_per_sample", "compress_ms_per_sample", "lds", "lds_low", "lds_high")]
        )
    for color, (method, points) in enumerate(lines.items()):
        bytes_, ms, lds, low, high = zip(*sorted(points), strict=True)
        errors = [[a - b for a, b in zip(lds, low, strict=True)], [b - a for a, b in zip(lds, high, strict=True)]]
        for axis, x in zip(axes, (bytes_, ms), strict=True):
            axis.errorbar(
                x,
                lds,
                errors,
                label=method,
                color=mpl.colormaps["tab20"](color),
                marker="o",
                capsize=2,
                linewidth=1,
                elinewidth=0.5,
            )
    axes[0].set(xscale="log", xlabel="bytes per sample", ylabel="LDS (damping swept), 95 % interval", title=path.stem)
    axes[1].set(xscale="log", xlabel="milliseconds to compress a sample, one thread")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main() -> None:
    for path in sorted(RESULTS.glob("*.csv")):
        print(f"### {path.stem}\n\n{table(path)}\n")
        plot(path)


if __name__ == "__main__":
    main()
