"""The tables of bench/results/fidelity/recall.csv and recall_cost.csv, in bench/fidelity/README.md."""

from __future__ import annotations

from pathlib import Path

from bench.files import read_rows, write_between

from .recall import AMONG, COST_PATH, PATH, TARGETS, N

README = Path("bench/fidelity/README.md")
Row = dict[str, str]


def report() -> None:
    """Write both tables between their marks."""
    write_between(README, "recall", f"{recalls(read_rows(PATH))}\n\n{costs(read_rows(COST_PATH))}")


def recalls(rows: list[Row]) -> str:
    columns = [(target, among) for target in TARGETS for among in AMONG]
    names = {"own": "exact, the code's direction", "ekfac": "exact, uncompressed EK-FAC"}
    heads = [f"{names[target]}: best {among:,}" for target, among in columns]
    lines = [
        f"| task | rows | bytes | fitted to | {' | '.join(heads)} |",
        "|---|---|---:|---:|" + "---|" * len(columns),
    ]
    for row in sorted(rows, key=lambda r: (r["task"] != "mlp-fashion", int(r["bytes"]), r["method"])):
        cells = [_cell(row, f"{target}_{among}") for target, among in columns]
        if row["method"] == "the code's float rows":
            cells[: len(AMONG)] = [""] * len(AMONG)
        about = [row["task"], row["method"], f"{int(row['bytes']):,}", "all" if int(row["fitted"]) == N else "1,000"]
        lines.append(f"| {' | '.join(about + cells)} |")
    return "\n".join(lines)


def _cell(row: Row, field: str) -> str:
    return f"{row[field]} [{row[f'{field}_low']}, {row[f'{field}_high']}]"


def costs(rows: list[Row]) -> str:
    lines = ["| task | what | samples | queries | CPU seconds |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {r['task']} | {r['what']} | {int(r['samples']):,} | {r['queries']} | {float(r['cpu_seconds']):.2f} |"
        for r in rows
    ]
    return "\n".join(lines)
