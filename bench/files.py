"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import csv
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dropinf import files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, which takes its place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        yield temporary


def save(path: Path, array: np.ndarray) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; none where it is not written yet."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def write_rows(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def processor() -> str:
    """Return the processor's name, on which every measured number depends."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def slug(name: str) -> str:
    """A method's name as part of a file name."""
    return name.replace(", ", "-").replace(" ", "-")


def write_between(path: Path, mark: str, text: str) -> None:
    """Put text in the place of what stands between ``<!-- mark -->`` and ``<!-- end of mark -->``."""
    whole = path.read_text(encoding="utf-8")
    start = whole.index(f"<!-- {mark} -->") + len(f"<!-- {mark} -->")
    stop = whole.index(f"<!-- end of {mark} -->")
    with replacing(path) as temporary:
        temporary.write_text(f"{whole[:start]}\n{text}\n{whole[stop:]}", encoding="utf-8")
