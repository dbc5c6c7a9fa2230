"""Compare a run of the benchmarks with the committed one, or commit it.

make bench                                                 # runs bench/ops, then compares
python -m bench.compare out/bench.json [--write]           # --write: the run becomes bench/results/ops.csv and .png

Machines differ, so each time is taken relative to its run: first the factor by which most times differ is divided out.
What then differs by more than a tenth and more than four times the interquartile ranges of both runs is printed; the
exit status is 1 where something got slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import matplotlib as mpl

from bench.files import read_rows, write_rows

mpl.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results" / "ops.csv"
FIELDS = ("group", "name", "median_ms", "iqr_ms", "rounds", "cpu", "commit")
Times = dict[tuple[str, str], tuple[float, float]]  # (group, name) -> median, interquartile range


def measured(path: Path) -> list[dict[str, str]]:
    """Rows of the table from pytest-benchmark's JSON."""
    found = json.loads(path.read_text())
    about = {"cpu": found["machine_info"]["cpu"]["brand_raw"], "commit": found["commit_info"]["id"][:9]}
    rows = []
    for one in found["benchmarks"]:
        parameters = one["params"] or {}
        name = str(parameters.get("method") or parameters.get("name") or one["name"])
        times = {f"{key}_ms": f"{1e3 * one['stats'][key]:.4g}" for key in ("median", "iqr")}
        rows.append(
            {"group": one["group"] or "", "name": name, "rounds": str(one["stats"]["rounds"]), **times, **about}
        )
    return rows


def times(rows: list[dict[str, str]]) -> Times:
    return {(r["group"], r["name"]): (float(r["median_ms"]), float(r["iqr_ms"])) for r in rows}


def changes(old: Times, new: Times) -> tuple[float, list[tuple[float, tuple[str, str]]]]:
    """The factor between the machines, and what differs beyond noise: (how many times as slow, what)."""
    both = [key for key in new if key in old]
    if not both:
        raise SystemExit("the two runs have no benchmark in common")
    ratios = {key: new[key][0] / old[key][0] for key in both}
    machine = statistics.median(ratios.values())
    found = []
    for key, ratio in ratios.items():
        noise = sum(iqr / median for median, iqr in (old[key], new[key]))
        if abs(ratio / machine - 1) > max(0.1, 4 * noise):
            found.append((ratio / machine, key))
    return machine, sorted(found, reverse=True)


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """compress_linear in float32: how many times as fast as Gaussian factors."""
    groups = sorted(
        {r["group"] for r in rows if "x" in r["group"] and r["group"].endswith("float32") and ", k" in r["group"]}
    )
    figure, axes = plt.subplots(1, len(groups), figsize=(4 * len(groups), 4), sharey=True)
    for axis, group in zip(axes, groups, strict=True):
        here = {r["name"]: float(r["median_ms"]) for r in rows if r["group"] == group}
        names = [n for n in here if n != "gaussian factors"][::-1]
        factors = [here["gaussian factors"] / here[n] for n in names]
        colors = ["tab:blue" if n.startswith("dropout") else "lightgray" for n in names]
        axis.bar_label(axis.barh(names, factors, color=colors), [f"{x:.1f}x" for x in factors], fontsize=8, padding=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", title=group.removesuffix(", float32"), xlim=(0.1, 150))
    axes[0].set(xlabel="times as fast as Gaussian factors")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--write", action="store_true", help="make it the committed run")
    options = parser.parse_args()
    rows = measured(options.run)
    if options.write:
        write_rows(RESULTS, FIELDS, rows)
        plot(rows, RESULTS.with_suffix(".png"))
        return
    machine, found = changes(times(read_rows(RESULTS)), times(rows))
    print(f"this machine takes {machine:.2f} times as long; beyond that and noise:")
    for ratio, (group, name) in found:
        print(f"{'slower' if ratio > 1 else 'faster'} {max(ratio, 1 / ratio):.2f}x  {group}: {name}")
    if not found:
        print("nothing changed")
    sys.exit(any(ratio > 1 for ratio, _ in found))


if __name__ == "__main__":
    main()
