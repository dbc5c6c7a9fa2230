"""`passages.jsonl`: the passages that an index is of, a line each, in the order of its samples."""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from ..files import checksum, file_checksum, write_whole
from .passages import Passage


class PassageFile:
    """JSON lines {"id", "text"[, "label"]}, which `read_passages(path, id_field="id")` reads. It need not be there."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def lines(self) -> list[bytes]:
        """Return the lines that are there, each with its end."""
        return self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []

    def write(self, lines: Iterable[bytes]) -> None:
        """Write the file; it is complete and on disk once it has its name."""
        write_whole(self.path, b"".join(lines))

    def check(self, expected: str) -> None:
        """Raise an error where the file is not the one with this checksum."""
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: missing; restore it from a copy")
        if file_checksum(self.path) != expected:
            way_out = f"see dropinf verify {shlex.quote(str(self.path.parent))}"
            raise ValueError(f"{self.path}: damaged, its bytes do not match their checksum; {way_out}")

    def texts(self, wanted: set[str]) -> dict[str, str]:
        """Return the texts of the passages with these ids, by id, in one scan of the file.

        Raises:
            ValueError: a line that is no passage.
        """
        found: dict[str, str] = {}
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if len(found) == len(wanted):
                    break
                try:
                    row = json.loads(line)
                    if row["id"] in wanted:
                        found[row["id"]] = row["text"]
                except (ValueError, KeyError, TypeError):
                    way_out = f"see dropinf verify {shlex.quote(str(self.path.parent))}"
                    raise ValueError(f"{self.path}, line {number}: damaged; {way_out}") from None
        return found

    def begin(self, lines: list[bytes]) -> None:
        """Write the first passages of an index; nothing where there are none.

        Raises:
            ValueError: others are there already.
        """
        if self.lines() not in ([], lines):
            raise ValueError(f"{self.path}: it is there already, with other passages; delete it, or name another --out")
        if lines:
            self.write(lines)

    def hold(self, new: list[bytes], start: int, stop: int | None, known: str) -> str | None:
        """Make sure that lines `start` to `stop` are `new`, appending them if there are none.

        `stop` is None where the file ends with them, and `known` is the checksum of the file as the manifest has it.
        Return the file's new checksum, or None where it has not changed.

        Raises:
            ValueError: other passages are there, an id is there already, or the file is damaged.
        """
        before = self.lines()
        lines, found = before, before[start:stop]
        if not found:
            self._check_ids(before, new)
            lines, found = [*before, *new], new
        if found != new:
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(found, new, strict=False)))
            raise ValueError(
                f"{self.path}: its passages are others than those of the data now, from line {start + same + 1} on; "
                "pass the data of then, add others with --append, or name another --out"
            )
        now = checksum(b"".join(lines))
        # What is known may be of the passages before these, where a run that added these was ended right here.
        if known not in (now, checksum(b"".join(before[:start]))):
            raise ValueError(f"{self.path}: damaged, its bytes do not match their checksum; restore it from a copy")
        if now != known or not self.path.exists():
            self.write(lines)
        return None if now == known else now

    def _check_ids(self, before: Sequence[bytes], new: Sequence[bytes]) -> None:
        both = {json.loads(line)["id"] for line in before} & {json.loads(line)["id"] for line in new}
        if both:
            raise ValueError(
                f"{self.path}: id {min(both)!r} is there already; ids must be unique: name another field with "
                "--id-field, or none to number them"
            )


def passage_line(passage: Passage) -> bytes:
    """Return the line of one passage."""
    row = {key: value for key, value in asdict(passage).items() if value is not None}
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def write_passages(passages: Sequence[Passage], path: str | os.PathLike[str]) -> None:
    """Write JSON lines {"id", "text"[, "label"]}, which `read_passages(path, id_field="id")` reads.

    Until it is complete and on disk the file has a temporary name in the same folder.
    """
    PassageFile(path).write(map(passage_line, passages))
