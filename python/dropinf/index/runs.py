"""One run into a folder: which shards and parts are its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .folder import PART_NAME, PARTS, SHARD_NAME, SHARDS, names
from .manifest import Call, Manifest, Run, ShardEntry
from .shards import ShardHeader, read_shard_header


@dataclass(frozen=True)
class Plan:
    """One run into a folder, as it stands before its first batch."""

    folder: Path
    manifest: Manifest
    number: int  # of the run
    undecided: bool = False  # it may turn out to be a finished run again: its batches could not be compared before
    every: bool = False  # compute every finished batch again, as nothing else tells what it was
    call: int | None = None  # which of the calls that were merged into the run
    going_on: bool = False  # with another loss or code: the manifest says so once a row of it is kept

    @property
    def run(self) -> Run:
        return self.manifest.runs[self.number]

    @property
    def began(self) -> Run | Call:
        """What the call began with, and how many batches it has."""
        return self.run if self.call is None else self.run.calls[self.call]

    @property
    def first_batch(self) -> int:
        """How many batches of the run stand before those of the call."""
        return sum(call.batches for call in self.run.calls[: self.call or 0])

    @property
    def first_sample(self) -> int:
        """How many samples of the index stand before those of the call."""
        calls = self.run.calls[: self.call or 0]
        return sum(shard.rows for shard in self.earlier) + sum(call.rows for call in calls)

    @property
    def samples(self) -> int | None:
        """How many samples the call has; None where it is not finished."""
        return None if self.run.shards is None else self.began.rows

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
        """How many shards stand before the run's."""
        return len(self.earlier)

    @property
    def first_number(self) -> int:
        """The number in the name of the run's first shard."""
        return self.run.shards[0].number if self.run.shards else self.manifest.next_number

    @property
    def first_part(self) -> int:
        """The number of the run's first batch: all runs' batches are counted, so that none is taken for another's."""
        return self.first_number * self.run.shard_batches

    def shard_files(self) -> Iterator[tuple[int, str, ShardHeader]]:
        """Yield number within the run, checksum and header of its shards that are there: those that are named, of one
        that is finished.

        Raises:
            ValueError: one is damaged, or of another run.
        """
        own = self.run.shards
        for match in names(self.folder / SHARDS, SHARD_NAME):
            n = int(match[1]) - self.first_number
            if n >= 0 and (own is None or (n < len(own) and own[n].checksum == match[2])):
                yield n, match[2], self.own_header(self.folder / SHARDS / match[0])

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
        if header.run != self.run.key and (self.run.printed or header.run is not None):
            raise ValueError(
                f"{path}: its rows are of another run, model or sketch, though it stands where this run's would; take "
                "it out of the folder"
            )
        return header


def plans_of(folder: Path, manifest: Manifest) -> Iterator[Plan]:
    """Yield each call of compress that an index is of, in order."""
    for number, run in enumerate(manifest.runs):
        for call in range(len(run.calls)) if run.calls else (None,):
            yield Plan(folder, manifest, number, call=call)
