"""Print the results as one table, a row a method: python -m bench.paper.report"""

from __future__ import annotations

from collections.abc import Iterator

from bench.files import read_rows

from . import mislabelled, removal, selection, sources
from .methods import INFLUENCE, NAMES
from .rows import TABLE, Row

# Experiment, measure, heading, digits; the settings of an experiment stand in one cell.
COLUMNS = (
    (mislabelled.EXPERIMENT, mislabelled.OWN, "flips, AUC, self-influence", 2),
    (mislabelled.EXPERIMENT, mislabelled.ON_VALIDATION, "flips, AUC, on validation", 2),
    (removal.EXPERIMENT, "wrong labels among 100 removed", "5 % removed, wrong labels among them", 2),
    (removal.EXPERIMENT, "test accuracy", "5 % removed, accuracy", 3),
    (sources.EXPERIMENT, "source of the top 1", "source of the top 1", 2),
    (selection.EXPERIMENT, "test accuracy at 20 %", "20 % kept, accuracy", 3),
    (selection.EXPERIMENT, "perplexity at 20 %", "20 % kept, perplexity", 1),
)
TIMED = (mislabelled.EXPERIMENT, removal.EXPERIMENT, sources.EXPERIMENT, selection.EXPERIMENT)
REFERENCES = (removal.NONE, selection.EVERYTHING, selection.SIMILARITY, sources.BM25)
LOWER_IS_BETTER = "perplexity"


def cell(row: Row | None, digits: int) -> str:
    """Return a mean, with the lowest and the highest of the seeds."""
    if row is None:
        return ""
    mean, low, high = (f"{float(row[field]):.{digits}f}".removeprefix("0") for field in ("value", "low", "high"))
    return f"{mean} [{low}, {high}]"


def settings(rows: list[Row], experiment: str, measure: str) -> list[str]:
    """Return the settings of an experiment that have a measure, in order."""
    return list(dict.fromkeys(r["setting"] for r in rows if (r["experiment"], r["measure"]) == (experiment, measure)))


def column(rows: list[Row], experiment: str, setting: str, measure: str) -> dict[str, Row]:
    """Return the rows of a column by method; everything is measured at 100 %."""
    names = (measure, measure.replace(" at 20 %", " at 100 %"))
    own = [r for r in rows if (r["experiment"], r["setting"]) == (experiment, setting)]
    return {r["method"]: r for r in own if r["measure"] in names}


def columns(rows: list[Row]) -> Iterator[tuple[str, dict[str, dict[str, Row]], int]]:
    """Yield each column: its heading, setting -> its rows by method, digits."""
    for experiment, measure, heading, digits in COLUMNS:
        parts = {s: column(rows, experiment, s, measure) for s in settings(rows, experiment, measure)}
        if parts:
            count = max(int(row["n"]) for own in parts.values() for row in own.values())
            yield f"{heading} ({'; '.join(parts)}; {count} seeds)", parts, digits


def table(rows: list[Row]) -> str:
    """Return a Markdown table; a method that dropinf refused somewhere has nothing there."""
    every = list(columns(rows))
    lines = [["method", *(heading for heading, _, _ in every), f"CPU s: {', '.join(TIMED)}"]]
    lines.append(["---"] * len(lines[0]))
    for method in (*NAMES, *REFERENCES):
        cells = ["; ".join(filter(None, (cell(o.get(method), d) for o in parts.values()))) for _, parts, d in every]
        lines.append([method, *cells, seconds(rows, method) if method in NAMES else ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds(rows: list[Row], method: str) -> str:
    """Return a method's CPU seconds in each experiment, of the setting that took the most."""
    found = []
    for experiment in TIMED:
        own = [float(r["compress_s"]) for r in rows if (r["experiment"], r["method"]) == (experiment, method)]
        found.append(f"{max(own):.0f}" if own else "")
    return ", ".join(found)


def single(rows: list[Row]) -> Iterator[tuple[str, str, dict[str, Row], int]]:
    """Yield (heading, setting, rows by method, digits)."""
    for heading, parts, digits in columns(rows):
        for setting, own in parts.items():
            yield heading.partition(" (")[0], setting, own, digits


def notes(rows: list[Row]) -> str:
    """Return which method is best in each setting, and where the loss alone is as good as every influence."""
    lines = []
    for heading, setting, own, digits in single(rows):
        sign = -1 if LOWER_IS_BETTER in heading else 1
        found = {method: sign * float(row["value"]) for method, row in own.items()}
        best = max(found, key=found.__getitem__)
        line = f"- {heading}, {setting}: {best} is best, {cell(own[best], digits)}"
        ours = [found[name] for name in INFLUENCE if name in found]
        if "loss" in found and ours and found["loss"] >= max(ours):
            line += "; the loss alone is at least as good as every influence"
        lines.append(line)
    refused = [f"- {r['experiment']}, {r['setting']}: {r['method']} is refused" for r in rows if not r["value"]]
    return "\n".join(lines + refused)


def beats_random(rows: list[Row]) -> str:
    """Return, for what is selected at 20 %, which methods are better in each seed than random in any."""
    lines = []
    for heading, setting, own, _ in single(rows):
        if heading.startswith("20 %") and "random" in own:
            lower = LOWER_IS_BETTER in heading
            bound = float(own["random"]["low" if lower else "high"])
            better = [m for m, r in own.items() if (float(r["high"]) < bound if lower else float(r["low"]) > bound)]
            lines.append(f"- {heading}, {setting}: beyond random's interval: {', '.join(better) or 'none'}")
    return "\n".join(lines)


def main() -> None:
    """Print the table and its notes."""
    rows = read_rows(TABLE)
    print(f"{table(rows)}\n\n{notes(rows)}\n{beats_random(rows)}")


if __name__ == "__main__":
    main()
