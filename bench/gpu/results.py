"""What was measured, a JSON line each: written as it comes, so that whatever ends a run loses nothing."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

NAME = "results.jsonl"
TRIES = 2  # of a step that fails


class Results:
    """The lines of one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME

    def read(self) -> list[dict[str, Any]]:
        """Return all lines that are whole."""
        if not self.path.exists():
            return []
        # The last may be cut where a machine was taken away.
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]

    def add(self, **line: Any) -> None:
        """Append a line that a power cut leaves."""
        whole = not self.path.exists() or self.path.read_bytes().endswith(b"\n") or not self.path.stat().st_size
        with self.path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def settled(self) -> set[str]:
        """Return the steps that are done, or that failed too often."""
        lines = [line for line in self.read() if "step" in line]
        failed = Counter(line["step"] for line in lines if "error" in line)
        done = {line["step"] for line in lines if "error" not in line}
        return done | {step for step, count in failed.items() if count >= TRIES}

    def latest(self) -> dict[str, dict[str, Any]]:
        """Return each step's last line; one that succeeded counts before one that failed."""
        found: dict[str, dict[str, Any]] = {}
        for line in self.read():
            if "step" in line and ("error" not in line or "error" in found.get(line["step"], {"error": ""})):
                found[line["step"]] = line
        return found

    def environments(self) -> list[dict[str, Any]]:
        """Return on what the lines were measured, once each."""
        found: list[dict[str, Any]] = []
        for line in self.read():
            if "environment" in line and line["environment"] not in found:
                found.append(line["environment"])
        return found
