"""The results: a row for each seed as it finishes, and what they come to over seeds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.files import read_rows, write_rows

TABLE = Path("bench/results/paper.csv")
FIELDS = ("experiment", "setting", "method", "measure", "value", "low", "high", "n", "compress_s")
EACH = Path("bench/results/paper_seeds.csv")
EACH_FIELDS = ("experiment", "setting", "seed", "method", "measure", "value", "compress_s")
Row = dict[str, Any]


def done(experiment: str, setting: str, seed: int) -> set[str]:
    """Return the methods whose rows of a seed are there."""
    wanted = (experiment, setting, str(seed))
    return {r["method"] for r in read_rows(EACH) if (r["experiment"], r["setting"], r["seed"]) == wanted}


def add(experiment: str, setting: str, seed: int, method: str, measures: Mapping[str, float], seconds: float) -> None:
    """Write what a method came to with a seed, and the table over seeds again."""
    rows = read_rows(EACH)
    for measure, value in measures.items():
        found = (experiment, setting, str(seed), method, measure, f"{value:.4f}", f"{seconds:.1f}")
        rows.append(dict(zip(EACH_FIELDS, found, strict=True)))
        print(" | ".join(found), flush=True)
    write_rows(EACH, EACH_FIELDS, rows)
    write_rows(TABLE, FIELDS, over_seeds(rows))


def over_seeds(rows: Iterable[Row]) -> list[Row]:
    """Return one row for each measure of a method: mean, lowest and highest of the seeds, and the median of seconds.

    What a method refused to do has no value; it keeps a row of its own, which counts the seeds.
    """
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[field] for field in FIELDS[:4])].append(row)
    found = []
    for key, parts in groups.items():
        values = [float(part["value"]) for part in parts]
        spread = (sum(values) / len(values), min(values), max(values))
        numbers = ["" if math.isnan(x) else f"{x:.4f}" for x in spread]
        seconds = statistics.median(float(part["compress_s"]) for part in parts)
        found.append(dict(zip(FIELDS, (*key, *numbers, str(len(parts)), f"{seconds:.1f}"), strict=True)))
    return found
