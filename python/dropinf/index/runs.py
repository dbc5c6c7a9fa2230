"""One run into a folder: which shards and parts are its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .folder import PART_NAME, PARTS, SHARD_NAME, SHARDS, names
from .manifest import Manifest, Run, ShardEntry
from .shards import ShardHeader, read_shard_header


@dataclass(frozen=True)
class Plan:
    """One run into a folder, as it stands before its first batch."""

    folder: Path
    manifest: Manifest
    number: int  # of the run
    undecided: bool = False  # it may turn out to be a finished run again: its batches could not be compared before
    every: bool = False  # compute every finished batch again, as nothing else tells what it was

    @property
    def run(self) -> Run:
        return self.manifest.runs[self.number]

    @cached_property
    def key(self) -> str:
        """What the run's files are known by."""
        return self.manifest.run_key(self.number)

    @cached_property
    def earlier(self) -> list[ShardEntry]:
        """The shards of the runs before."""
        return [shard for run in self.manifest.runs[: self.number] for shard in run.shards or ()]

    @cached_property
    def later(self) -> list[ShardEntry]:
        """The shards of the runs after."""
        return [shard for run in self.manifest.runs[self.number + 1 :] for shard in run.shards or ()]

    @property
    def base(self) -> int:
        """The number of the run's first shard."""
        return len(self.earlier)

    @property
    def first_part(self) -> int:
        """The number of the run's first batch: all runs' batches are counted, so that none is taken for another's."""
        return self.base * self.run.shard_batches

    def shard_files(self) -> Iterator[tuple[int, str, ShardHeader]]:
        """Yield number, checksum and header of the run's shards that are there.

        Raises:
            ValueError: one is damaged, or of another run.
        """
        own = self.run.shards
        stop = self.base + len(own or ())
        for match in names(self.folder / SHARDS, SHARD_NAME):
            if self.base <= int(match[1]) and (own is None or int(match[1]) < stop):
                yield int(match[1]), match[2], self.own_header(self.folder / SHARDS / match[0])

    def part_files(self) -> Iterator[tuple[int, str, ShardHeader]]:
        """Yield number within the run, name and header of finished batches that no shard holds yet."""
        own = self.run.shards
        most = None if own is None else len(own) * self.run.shard_batches
        for match in names(self.folder / PARTS, PART_NAME):
            b = int(match[1]) - self.first_part
            if b >= 0 and (most is None or b < most):
                yield b, match[0], self.own_header(self.folder / PARTS / match[0])

    def own_header(self, path: Path) -> ShardHeader:
        """Return the header of a file; raise ValueError unless it is of this run."""
        header = read_shard_header(path)
        if header.run != self.key and (self.run.printed or header.run is not None):
            raise ValueError(
                f"{path}: its rows are of another run, model or sketch, though it stands where this run's would; take "
                "it out of the folder"
            )
        return header
