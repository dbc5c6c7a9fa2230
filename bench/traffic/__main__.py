"""Count all cases, print the tables, write bench/results/traffic.{md,csv}; fail where a limit does not hold.

Run with TRITON_INTERPRET=1, from the repository's root. Names on the command line select cases, and write nothing.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import torch
import triton

from . import resources
from .cases import CASES
from .report import count, markdown, missed, row

RESULTS = Path(__file__).parents[1] / "results"


def main(words: list[str]) -> int:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("set TRITON_INTERPRET=1: the interpreter is what records addresses")
    compiling = resources.start(words)
    cases = [case for case in CASES if all(word in case.name for word in words)]
    try:
        results = []
        for number, case in enumerate(cases, 1):
            print(f"{number}/{len(cases)} {case.name}", file=sys.stderr, flush=True)
            results.append(count(case))
        compiled = resources.finish(compiling)
    finally:
        compiling.kill()
    rows = [row(result, compiled[result.case.name]) for result in results]
    report = markdown(results, rows, f"torch {torch.__version__}, triton {triton.__version__}")
    print(report)
    if not words:
        (RESULTS / "traffic.md").write_text(report)
        with (RESULTS / "traffic.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    problems = missed(results)
    for problem in problems:
        print(f"MISSED {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
