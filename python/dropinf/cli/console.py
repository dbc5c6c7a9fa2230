"""What commands print: results on standard output; notes and progress on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

_EVERY = 30.0  # seconds between two lines where there is no terminal for a bar
_WIDTH = 120  # of tables that are not shown by a terminal
_ID_WIDTH = 24
Found = dict[str, Any]  # a sample or a query of a result


def is_first() -> bool:
    """Return whether this process is the one that reports for all ranks."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK") == "0"


def plain(text: str) -> str:
    """Return a line of text as a terminal may see it: control characters, which it would obey, are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def note(text: str) -> None:
    """Say something on standard error, once for all ranks."""
    if is_first():
        print(plain(text), file=sys.stderr, flush=True)


def size_text(size: float) -> str:
    """Return a number of bytes as people read it."""
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:,.0f} {units[0]}" if units[0] == "bytes" or size >= 100 else f"{size:.1f} {units[0]}"


class Meter:
    """Counts the samples that are compressed; says how many from time to time where there is no bar."""

    def __init__(self) -> None:
        self.done = 0
        self._start = self._said = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        if not sys.stderr.isatty() and time.monotonic() - self._said > _EVERY:
            self._said = time.monotonic()
            note(self.summary(self.done))

    def summary(self, done: int) -> str:
        """Return how many samples were compressed in how many seconds, as text."""
        seconds = time.monotonic() - self._start
        if not done:
            return "nothing was left to compress"
        return f"compressed {done:,} samples in {seconds:,.1f} s, {done / seconds:,.3g} a second"


def print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def print_table(title: str, parts: Iterable[tuple[str, list[Found]]], caption: str = "") -> None:
    """Print ranked samples, a line each, cut to the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(highlight=False, width=None if shown else _WIDTH)

    def cut(text: str | None, style: str = "") -> Text:
        return Text(plain(" ".join((text or "").split())), style, no_wrap=True, overflow="ellipsis", end="")

    console.print(cut(title, "bold"), end="\n")
    if caption:
        console.print(cut(caption, "dim"), end="\n")
    for name, samples in parts:
        table = Table(box=None, pad_edge=False, expand=any(sample["text"] is not None for sample in samples))
        table.add_column("#", justify="right")
        table.add_column("score", justify="right", no_wrap=True)
        table.add_column("id", no_wrap=True, max_width=_ID_WIDTH)
        table.add_column("passage", no_wrap=True, overflow="ellipsis", ratio=1)
        for rank, sample in enumerate(samples, 1):
            table.add_row(str(rank), f"{sample['score']:+.4g}", cut(sample["id"]), cut(sample["text"]))
        if name:
            console.print(Text(name, "green" if name == "Proponents" else "red"))
        console.print(table)
    console.print()
