"""Run the adapters' tests, each against its installed toolkit, in an environment of its own; print a table.

python -m tests.interop.run [TOOLKIT ...]

An environment lies over the main one (torch and dropinf are not installed twice), holds what a toolkit pins, and is kept
until its pins change. Rows that tests record go to bench/results/interop.csv.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from bench.files import read_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venv-interop"
RESULTS = ROOT / "bench" / "results" / "interop.csv"
FIELDS = ("toolkit", "version", "what", "agreement", "seconds", "theirs", "factor", "peak_mb", "their_peak_mb")
PINS = {
    "dattri": ["dattri==0.3.0"],
    "dattri_llm": ["dattri-llm==0.1.0"],
    "trak": ["traker==0.3.2"],
    # Without its dependencies: PyPI's torchvision and torchaudio, which it never imports, do not load beside a torch for
    # CPUs, and then neither does transformers.
    "bergson": [
        "--no-deps",
        "bergson==2.5.1",
        "docstring_parser==0.18.0",
        "jaxtyping==0.3.11",
        "ml_dtypes==0.6.0",
        "natsort==8.4.0",
        "optree==0.20.0",
        "petname==2.9",
        "simple-parsing==0.1.9",
        "torchopt==0.7.3",
        "wadler_lindig==0.1.8",
    ],
    "logix": ["--ignore-requires-python", "logix-ai==0.1.1"],  # pure Python that says it needs one before 3.11
    "quanda": ["quanda==0.5.0", "pyarrow==25.0.1", "omegaconf==2.4.0"],
    "captum": ["captum==0.9.0"],
    "kronfluence": ["kronfluence==1.0.1"],
    "lightning": ["lightning==2.6.6"],
    "plain": ["opacus==1.6.0"],
}


def environment(name: str) -> Path:
    """Return the Python of a toolkit's environment, made where it is missing or its pins changed."""
    folder = ENVIRONMENTS / name
    python, ready = folder / "bin" / "python", folder / ".ready"
    pins = " ".join(["torch==2.13.0", *PINS[name]])
    if ready.exists() and ready.read_text() == pins:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins.split()], check=True)
    ready.write_text(pins)
    return python


def tests_of(name: str) -> str:
    """A toolkit's folder of tests, or its one file."""
    folder = f"tests/interop/{name}"
    return folder if (ROOT / folder).is_dir() else f"tests/interop/test_{name}.py"


def run(name: str) -> tuple[int, list[dict[str, str]]]:
    out = ROOT / "out" / "interop" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [str(environment(name)), "-m", "pytest", tests_of(name), "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "DROPINF_INTEROP_OUT": str(out), "OMP_NUM_THREADS": "1"},
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return done.returncode, rows


def main() -> None:
    names = sys.argv[1:] or list(PINS)
    old = read_rows(RESULTS)
    rows = [row for row in old if row["toolkit"] not in names]
    failed = []
    for name in names:
        code, found = run(name)
        rows += found
        failed += [name] * (code != 0)
    rows.sort(key=lambda row: list(PINS).index(row["toolkit"]))
    write_rows(RESULTS, FIELDS, rows)
    print(" | ".join(FIELDS))
    for row in rows:
        print(" | ".join(str(row.get(field, "")) for field in FIELDS))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
