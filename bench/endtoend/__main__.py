"""Extraction beside every peer: same model, batch, layers, compressed size and thread; a process each, in turns.

python -m bench.endtoend [CASE ...]     # make test-interop builds the peers' environments

Writes bench/results/endtoend.csv and .png. ``cpu_seconds`` is the median of a batch, ``over_floor`` the median over
rounds of its ratio to the floor in the same round, ``peak_mb`` what torch held of it at most.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from pathlib import Path

import matplotlib as mpl

from bench.files import read_rows, write_rows

from .contenders import CONTENDERS, FLOOR
from .models import CASES
from .turns import Worker
from .worker import SLOW

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "endtoend.csv"
FIELDS = (
    "case", "contender", "version", "samples", "cpu_seconds", "seconds_per_100", "over_floor", "peak_mb", "rounds",
    "commit", "note",
)  # fmt: skip
Row = dict[str, object]
LONGEST = 6  # bars end here; their labels do not


def measure(case: str, rounds: int, commit: str) -> list[Row]:
    workers = [Worker(case, name, "bench.endtoend.contenders") for name in CONTENDERS]
    fit = [worker for worker in workers if "unfit" not in worker.about]
    for _ in range(rounds):
        for worker in fit:
            if not worker.seconds or worker.seconds[-1] < SLOW:
                worker.seconds.append(worker.ask("time"))
    floor = next(worker.seconds for worker in fit if worker.name == FLOOR)
    samples = CASES[case]().samples
    rows = []
    for worker in workers:
        row: Row = {"case": case, "contender": worker.name, "samples": samples, "commit": commit}
        if worker in fit:
            seconds = statistics.median(worker.seconds)
            ratio = statistics.median(a / b for a, b in zip(worker.seconds, floor, strict=False))
            row |= {"version": worker.about["version"], "cpu_seconds": f"{seconds:.4g}", "rounds": len(worker.seconds)}
            row |= {"seconds_per_100": f"{100 * seconds / samples:.4g}", "over_floor": f"{ratio:.3f}"}
            row |= {"peak_mb": f"{worker.ask('memory'):.0f}"}
        else:
            row["note"] = worker.about["unfit"]
        print({key: value for key, value in row.items() if key in FIELDS[:8] or key == "note"}, flush=True)
        rows.append(row)
        worker.close()
    return rows


def table(rows: list[dict[str, str]]) -> str:
    lines = []
    for case in CASES:
        lines += [f"\n| {case} | s per 100 samples | over the floor | peak MB |", "|---|---:|---:|---:|"]
        for row in (r for r in rows if r["case"] == case):
            cells = row["note"] or f"{row['seconds_per_100']} | {row['over_floor']}x | {row['peak_mb']}"
            lines.append(f"| {row['contender']} | {cells} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Time above, memory below, both over the floor's."""
    cases = [case for case in CASES if any(row["case"] == case for row in rows)]
    figure, axes = plt.subplots(2, len(cases), figsize=(5 * len(cases), 8), sharey=True, squeeze=False)
    names = list(CONTENDERS)[::-1]
    colors = ["tab:blue" if name.startswith("dropinf") else "lightgray" for name in names]
    for field, label, line in zip(("over_floor", "peak_mb"), ("CPU seconds", "peak memory"), axes, strict=True):
        for axis, case in zip(line, cases, strict=True):
            here = {row["contender"]: row for row in rows if row["case"] == case and row["over_floor"]}
            scale = float(here[FLOOR][field])
            over = {n: float(row[field]) / scale for n, row in here.items()}
            bars = axis.barh(names, [min(over.get(n, 0), LONGEST) for n in names], color=colors)
            axis.bar_label(bars, [f"{over[n]:.2f}" if n in over else "cannot" for n in names], padding=2, fontsize=8)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set(title=case, xlabel=f"{label} over the floor's", xlim=(0, LONGEST + 1))
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    rows = read_rows(RESULTS)
    for case in options.cases:
        new = measure(case, options.rounds, commit)
        rows = [row for row in rows if row["case"] != case] + new
        write_rows(RESULTS, FIELDS, rows)
        rows = read_rows(RESULTS)
    plot(rows, RESULTS.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
