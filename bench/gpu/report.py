"""Turns what was measured into tables and plots: ``python -m bench.gpu.report OUT [--into FOLDER]``.

Where README predicts a time, ``gpu.md`` has the measured one beside it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.files import replacing, write_rows

from .factors import METHODS, PREDICTED
from .results import Results

TRAFFIC = Path(__file__).parents[1] / "results" / "traffic.csv"
# README's predictions: what is kept, the case that is counted, and the method that is measured.
PREDICTIONS = (
    (64, "compress_linear 64x64, scattered", "scattered"),
    (64, "compress_linear 64x64, runs of 8", "runs of 8"),
    (64, "compress_linear 64x64, runs of 16", "runs of 16"),
    (256, "compress_linear 256x256, runs of 16", "runs of 16"),
)
GAUSSIAN = "Gaussian factors"
Line = dict[str, Any]


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of(lines: Mapping[str, Line], name: str) -> list[Line]:
    """Return what was measured of one table."""
    return [line for line in lines.values() if line.get("table") == name and "error" not in line]


def predicted() -> dict[str, float]:
    """Return how many times as fast as Gaussian factors each counted case is predicted to be on an H100."""
    with TRAFFIC.open() as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    own, other = "predicted_us_H100", "predicted_us_H100_gaussian"
    return {name: float(rows[name][other]) / float(rows[name][own]) for _, name, _ in PREDICTIONS}


def predictions(lines: Mapping[str, Line]) -> str:
    measured = {(line["k"], line["dtype"]): line["ms"] for line in of(lines, "compress_linear") if is_predicted(line)}
    body = []
    for k, case, method in PREDICTIONS:
        ms = measured.get((k, "bfloat16"))
        ratio = None if ms is None else ms[GAUSSIAN] / ms[method]
        found = "not measured" if ratio is None else f"{number(ratio)}x"
        body.append([f"k {k}, {method}", f"{number(predicted()[case])}x", found])
    header = ["`compress_linear` of 1024 x 1024, 16 bits, over Gaussian factors", "predicted, H100", "measured here"]
    return table(header, body)


def is_predicted(line: Line) -> bool:
    """Return whether a line is of the layer whose times are predicted; in a dry run all are of one small layer."""
    return bool(line["step"].startswith(f"compress_linear, {PREDICTED}, "))


def factors(lines: Mapping[str, Line]) -> str:
    found = of(lines, "compress_linear")
    if not found:
        return "Not measured."
    names = list(found[0]["ms"])
    header = ["milliseconds (times faster than Gaussian factors)", *names]
    body = [
        [
            line["step"].removeprefix("compress_linear, "),
            *(f"{number(line['ms'][n])} ({number(line['ms'][GAUSSIAN] / line['ms'][n], 2)}x)" for n in names),
        ]
        for line in found
    ]
    return table(header, body)


def others(lines: Mapping[str, Line]) -> str:
    body = []
    for line in of(lines, "other ops"):
        ours = line["ms"]["ours"]
        rest = {name: ms for name, ms in line["ms"].items() if name != "ours"}
        best = min(rest, key=rest.__getitem__)
        beside = ", ".join(f"{name} {number(ms)}" for name, ms in rest.items())
        body.append([line["step"], number(ours), beside, f"{number(rest[best] / ours)}x {best}"])
    return table(["op", "ours, ms", "beside it, ms", "over the best"], body)


def extraction(lines: Mapping[str, Line]) -> str:
    body = []
    for line in of(lines, "extraction"):
        name = line["step"].removeprefix("extraction, ")
        size = f"{line['parameters'] / 1e6:.0f} M weights, {line['layers']} layers, {line['samples']} samples"
        body += [
            [
                f"{name}: {job}",
                number(ms, 4),
                f"{line['over the floor'][job]:.3f}x",
                number(line["peak MB"][job], 5),
                number(line["first batch, ms"].get(job), 4),
                size,
            ]
            for job, ms in line["ms"].items()
        ]
    return table(["", "ms a batch", "over the floor", "peak MB", "first batch, ms", ""], body)


def host(lines: Mapping[str, Line]) -> str:
    body = []
    for line in of(lines, "the host"):
        if "us" in line:
            body += [[f"{name}: microseconds of Python a call", number(us)] for name, us in line["us"].items()]
            continue
        for what, counts in line["a batch"].items():
            shown = ", ".join(f"{name} {number(count)}" for name, count in counts.items()) or "nothing"
            body.append([f"{line['step'].removeprefix('waits, ')}, {line['layers']} layers, {what}: a batch", shown])
    return table(["", ""], body)


def numerics(lines: Mapping[str, Line]) -> str:
    body = [[line["step"], str(line["problems"]), "right"] for line in of(lines, "numerics of ops")]
    body += [[line["step"], "", f"{line['worst']:.2g}"] for line in of(lines, "numerics of rows")]
    return table(["", "problems", "error beside float64's"], body)


def failures(lines: Mapping[str, Line]) -> str:
    failed = {step: line["error"] for step, line in lines.items() if "error" in line}
    body = [[step, error.replace("\n", " ").replace("|", "/")[:300]] for step, error in failed.items()]
    return table(["step", "error"], body) if failed else "Nothing."


def markdown(results: Results) -> str:
    lines = results.latest()
    where = "\n".join("- " + ", ".join(f"{k} {v}" for k, v in found.items()) for found in results.environments())
    dry = any(found["dry"] for found in results.environments())
    parts = {
        "Predicted, and measured": predictions(lines),
        "Extraction": extraction(lines),
        "The host": host(lines),
        "`compress_linear`": factors(lines),
        "Other ops": others(lines),
        "Numerics": numerics(lines),
        "What failed": failures(lines),
    }
    head = (
        "# Measured on a GPU\n\nBy `python -m bench.gpu`, medians of rounds that take turns, caches cold.\n\n" + where
    )
    if dry:
        head += "\n\n**A dry run on a CPU: small problems, and no time here means anything.**"
    return "\n\n".join([head, *(f"## {title}\n\n{text}" for title, text in parts.items())]) + "\n"


def flat(lines: Mapping[str, Line]) -> list[Line]:
    """Return a row for each number that was measured."""
    found: list[Line] = []

    def add(step: str, where: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(step, f"{where} / {key}" if where else key, inner)
        elif isinstance(value, int | float):
            found.append({"step": step, "what": where, "value": f"{value:.6g}"})

    for step, line in lines.items():
        add(step, "", {k: v for k, v in line.items() if k not in ("step", "table", "error")})
    return found


def plot(lines: Mapping[str, Line], path: Path) -> None:
    """Draw how many times as fast as Gaussian factors each method is, layer by layer."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [line for line in of(lines, "compress_linear") if line["dtype"] == "bfloat16"]
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.5), layout="constrained")
    for i, method in enumerate(METHODS):
        at = [y + (i - 1.5) / 5 for y in range(len(rows))]
        axis.barh(at, [r["ms"][GAUSSIAN] / r["ms"][method] for r in rows], 0.19, label=method)
    axis.set_yticks(
        range(len(rows)), [r["step"].removeprefix("compress_linear, ").removesuffix(", bf16") for r in rows]
    )
    axis.axvline(1, color="0.4", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("times as fast as Gaussian factors of the same stored size")
    axis.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.report", description=__doc__)
    parser.add_argument("out", type=Path, help="what `python -m bench.gpu` wrote to")
    parser.add_argument("--into", type=Path, help="where tables and plots go; by default beside the results")
    given = parser.parse_args()
    results, into = Results(given.out), given.into or given.out
    lines = results.latest()
    if not lines:
        print(f"nothing was measured in {given.out}; run: python -m bench.gpu {given.out}", file=sys.stderr)
        return 1
    with replacing(into / "gpu.md") as path:
        path.write_text(markdown(results))
    write_rows(into / "gpu.csv", ["step", "what", "value"], flat(lines))
    if of(lines, "compress_linear") and find_spec("matplotlib"):
        plot(lines, into / "gpu.png")
    print(into / "gpu.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
