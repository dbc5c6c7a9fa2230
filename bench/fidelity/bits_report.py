"""The table and the picture of bench/results/fidelity/bits.csv."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from bench.files import read_rows, replacing

PATH = Path("bench/results/fidelity/bits.csv")
KEPT = Path("bench/results/fidelity/bits_kept.csv")
KEPT_TEXT = (
    "What codes of all coordinates keep of float rows of 16 KB (`--kept`): a 32nd, a 16th and an 8th of the bytes."
)
README = Path("bench/fidelity/README.md")
BEGIN, END = "<!-- bits -->", "<!-- end of bits -->"
FEW = ("1 bit", "2 bits", "4 bits")
OTHERS = ("choose, float32", "choose, int8", "gaussian", "logra (gaussian, linears only)", "pca", "rank one (LoRIF)")
NAMES = {"logra (gaussian, linears only)": "LoGra", "gaussian": "Gaussian", "pca": "PCA", "rank one (LoRIF)": "LoRIF"}
Row = dict[str, str]


def by_size(rows: list[Row]) -> str:
    """LDS by task and bytes, the best few-bit rows and the best others in bold."""
    lines = [f"| task | bytes | {' | '.join(NAMES.get(m, m) for m in (*FEW, *OTHERS))} |"]
    lines.append("|---|---:|" + "---:|" * len((*FEW, *OTHERS)))
    found: dict[tuple[str, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["task"], int(row["bytes"])][row["method"]] = row
    for (task, size), methods in sorted(found.items()):
        values = {m: float(methods[m]["lds"]) for m in (*FEW, *OTHERS) if m in methods and methods[m]["lds"]}
        best = max(values, key=values.__getitem__)
        cells = [
            f"{'**' * (m == best)}{values[m]:.3f}{'**' * (m == best)}" if m in values else "" for m in (*FEW, *OTHERS)
        ]
        lines.append(f"| {task} | {size:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parts(rows: list[Row]) -> str:
    """What each part of the recipe bought: LDS without it."""
    bits = [bit for bit in FEW if any(row["method"].startswith(f"{bit},") for row in rows)]
    columns = sorted({(row["task"], int(row["bytes"])) for row in rows if "," in row["method"].removeprefix("choose,")
                      and row["method"].startswith(FEW)})  # fmt: skip
    lines = [
        "| rows | " + " | ".join(f"{task}, {size}" for task, size in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    table = {(r["method"], r["task"], int(r["bytes"])): r["lds"] for r in rows}
    endings = dict.fromkeys(r["method"].partition(",")[2] for r in rows if r["method"].startswith(FEW))
    for bit in bits:
        for ending in endings:
            name = f"{bit},{ending}" if ending else bit
            cells = [table.get((name, *column), "") for column in columns]
            lines.append(f"| {name} | {' | '.join(f'{float(c):.3f}' if c else '' for c in cells)} |")
    floats = {(r["task"], int(r["bytes"])): r["float_lds"] for r in rows if r["method"] == "1 bit"}
    lines.append("| float rows of 64 times the bytes | " + " | ".join(floats.get(c, "") for c in columns) + " |")
    return "\n".join(lines)


def codes_kept() -> str:
    """What codes of all coordinates keep of the LDS of float rows of 16 KB."""
    rows = read_rows(KEPT)
    columns = list(dict.fromkeys((r["task"], r["kind"]) for r in rows))
    lines = ["| codes | " + " | ".join(", ".join(c) for c in columns) + " |", "|---|" + "---:|" * len(columns)]
    floats = {(r["task"], r["kind"]): float(r["float_lds"]) for r in rows}
    lines.append("| LDS of the float rows | " + " | ".join(f"{floats[c]:.3f}" for c in columns) + " |")
    table = {(r["bits"], r["codes"], r["task"], r["kind"]): float(r["kept"]) for r in rows}
    for bits, codes in dict.fromkeys((r["bits"], r["codes"]) for r in rows):
        cells = [f"{table[bits, codes, task, kind]:.2f}" for task, kind in columns]
        lines.append(f"| {bits} bit{'s' * (bits != '1')}, {codes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[Row]) -> None:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.2 * len(tasks), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        for number, method in enumerate((*FEW, *OTHERS)):
            points = sorted(
                (int(r["bytes"]), float(r["lds"]))
                for r in rows
                if (r["task"], r["method"]) == (task, method) and r["lds"]
            )
            if points:
                few = method in FEW
                axis.plot(
                    *zip(*points, strict=True), label=NAMES.get(method, method), color=mpl.colormaps["tab10"](number),
                    marker="o" if few else "s", linewidth=2 if few else 1, linestyle="-" if few else "--",
                )  # fmt: skip
        axis.set(xscale="log", title=task, xlabel="bytes per sample")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("LDS")
    fullest = max(axes[0], key=lambda axis: len(axis.lines))
    figure.legend(handles=fullest.lines, fontsize=7, loc="outside lower center", ncols=len(fullest.lines))
    figure.savefig(PATH.with_suffix(".png"), dpi=110)
    plt.close(figure)


def report() -> None:
    """Write both into bench/fidelity/README.md, and draw the picture."""
    rows = read_rows(PATH)
    plot(rows)
    text = README.read_text(encoding="utf-8")
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    with replacing(README) as temporary:
        tables = "\n\n".join(
            (by_size(rows), "What each part of the recipe buys, LDS:", parts(rows), KEPT_TEXT, codes_kept())
        )
        temporary.write_text(f"{text[:start]}\n{tables}\n{text[stop:]}", encoding="utf-8")
