"""Print the results as one table, a row a method: python -m bench.paper.report"""

from __future__ import annotations

from bench.files import read_rows

from . import mislabelled, removal, selection, sources
from .methods import INFLUENCE, NAMES
from .rows import TABLE, Row

# Experiment, measure, heading, digits; each setting of an experiment is a column.
COLUMNS = (
    (mislabelled.EXPERIMENT, mislabelled.OWN, "flipped labels, self-influence, AUC", 2),
    (mislabelled.EXPERIMENT, mislabelled.ON_VALIDATION, "flipped labels, validation, AUC", 2),
    (removal.EXPERIMENT, "test accuracy", "5 % removed, accuracy", 3),
    (sources.EXPERIMENT, "source of the top 1", "source of the top 1", 2),
    (sources.EXPERIMENT, "source of the top 1, relative", "source of the top 1, RelatIF", 2),
    (selection.EXPERIMENT, "perplexity at 20 %", "20 % kept, perplexity", 1),
    (selection.EXPERIMENT, "test accuracy at 20 %", "20 % kept, accuracy", 3),
)
REFERENCES = (removal.NONE, selection.EVERYTHING, selection.SIMILARITY, sources.BM25)
LOWER_IS_BETTER = "perplexity"
Key = tuple[str, str, str]  # experiment, setting, measure


def cell(row: Row, digits: int) -> str:
    """Return a mean, with the lowest and the highest of the seeds."""
    if not row["value"]:
        return "refused"
    mean, low, high = (f"{float(row[field]):.{digits}f}" for field in ("value", "low", "high"))
    return f"{mean} ({low} to {high})"


def settings(rows: list[Row], experiment: str, measure: str) -> list[str]:
    """Return the settings of an experiment that have a measure, in order."""
    return list(dict.fromkeys(r["setting"] for r in rows if (r["experiment"], r["measure"]) == (experiment, measure)))


def table(rows: list[Row]) -> str:
    """Return a Markdown table, with the CPU seconds of each method behind each experiment's first column."""
    at: dict[tuple[str, ...], Row] = {(r["experiment"], r["setting"], r["measure"], r["method"]): r for r in rows}
    columns = [(e, s, m, h, d) for e, m, h, d in COLUMNS for s in settings(rows, e, m)]
    head = ["method", *(f"{h}: {s}" for _, s, _, h, _ in columns), "CPU s, by experiment"]
    lines = [head, ["---"] * len(head)]
    for method in (*NAMES, *REFERENCES):
        cells = [at.get((e, s, m, method)) or whole(at, e, s, m, method) for e, s, m, _, _ in columns]
        shown = [cell(row, d) if row else "" for row, (_, _, _, _, d) in zip(cells, columns, strict=True)]
        lines.append([method, *shown, seconds(rows, method)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def whole(at: dict[tuple[str, ...], Row], experiment: str, setting: str, measure: str, method: str) -> Row | None:
    """Return the row of everything, which is measured at 100 %."""
    return at.get((experiment, setting, measure.replace(" at 20 %", " at 100 %"), method))


def seconds(rows: list[Row], method: str) -> str:
    """Return a method's CPU seconds in each experiment, of its first setting."""
    of: dict[str, str] = {}
    for row in rows:
        if row["method"] == method and method in NAMES and row["experiment"] != "":
            of.setdefault(row["experiment"], f"{float(row['compress_s']):.0f}")
    return ", ".join(f"{experiment} {value}" for experiment, value in of.items())


def notes(rows: list[Row]) -> str:
    """Return, for each column, which method is best, and where the loss alone is as good as any influence."""
    lines = []
    for experiment, measure, _, digits in COLUMNS:
        for setting in settings(rows, experiment, measure):
            column = (experiment, setting, measure)
            own = [r for r in rows if (r["experiment"], r["setting"], r["measure"]) == column and r["value"]]
            found = {r["method"]: float(r["value"]) for r in own}
            sign = -1 if LOWER_IS_BETTER in measure else 1
            best = max(found, key=lambda name: sign * found[name])
            line = f"- {experiment}, {setting}, {measure}: {best} {found[best]:.{digits}f}"
            ours = [sign * found[name] for name in INFLUENCE if name in found]
            if "loss" in found and ours and sign * found["loss"] >= max(ours):
                line += "; the loss alone is at least as good as every influence"
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Print the table and its notes."""
    rows = read_rows(TABLE)
    print(f"{table(rows)}\n\n{notes(rows)}")


if __name__ == "__main__":
    main()
