"""The shards of an index as they lie on disk, each compared with its checksum before its first use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ..gradients import At, check_rows
from .ahead import Piece, pieces_of, read_ahead
from .compact import merges_told
from .folder import shard_path
from .manifest import Manifest, ShardEntry
from .products import Stored
from .shards import SMALL_BYTES, Room, ShardFile, Stamp

T = TypeVar("T")


class StoredRows:
    """Rows of some shards of an index, read as they are stored."""

    def _hold(
        self,
        folder: Path,
        manifest: Manifest,
        shards: Mapping[int, ShardEntry],
        memory_bytes: int,
        order: Tensor | None = None,
    ) -> None:
        self.path, self.manifest, self._codec = folder, manifest, manifest.codec
        self._told = partial(merges_told, folder, manifest)
        least = 32 * self._codec.width * self._codec.decoded.itemsize
        if memory_bytes < least:
            raise ValueError(f"{folder}: memory_bytes is {memory_bytes}; 32 rows of this index alone take {least}")
        self._memory_bytes = memory_bytes
        self.block_bytes = memory_bytes // 16  # the next is read meanwhile, and solvers make copies
        self._entries = [shards[i] for i in sorted(shards)]
        self._files = [
            ShardFile(shard_path(folder, shard.number, shard.checksum), self._codec, shard.rows)
            for shard in self._entries
        ]
        self._starts = [0, *itertools.accumulate(shard.rows for shard in self._entries)]
        self._order = order  # the position of each stored row; None: as they are stored
        self._places = None if order is None else order.argsort()  # the stored row of each position
        self._mine: Sequence[int] = range(len(self._files))
        self._layouts: dict[int, tuple[Stamp, Mapping[str, tuple[int, int]]]] = {}  # of the files that were checked

    def _stored_rows(self, positions: Tensor) -> Tensor:
        return positions if self._places is None else self._places[positions]

    def _at(self, first: int, count: int) -> At:
        """Return the positions of stored rows."""
        rows = slice(first, first + count)
        return rows if self._order is None else self._order[rows]

    def _checked(self, i: int) -> tuple[Stamp, Mapping[str, tuple[int, int]]]:
        """Return what shard `i` is like; compare it with its checksum before its first use and where it was written."""
        with self._told(self._entries[i]):
            stamp = self._files[i].stamp()
            if i not in self._layouts or self._layouts[i][0] != stamp:
                self._files[i].verify(self._entries[i].checksum)
                self._layouts[i] = stamp, self._files[i].layout()
        return self._layouts[i]

    def _texts(self, i: int) -> list[str]:
        with self._told(self._entries[i]):
            return self._files[i].texts(self._checked(i)[1])

    def _bytes(self, i: int) -> int:
        with self._told(self._entries[i]):
            return self._files[i].stamp()[1]

    def _check_again(self, pieces: list[Piece]) -> None:
        """Raise ValueError where a shard was changed while its rows were used."""
        for i, _, _ in pieces:
            self._checked(i)

    def _ahead(self, rows: int, use: Callable[[Stored], T], *, reuse: bool) -> Iterator[tuple[int, T]]:
        """Yield (offset of the first row, what `use` makes of rows as they are stored), the next read meanwhile."""
        rooms = itertools.cycle((Room(self._codec), Room(self._codec)))  # one is read into while the other is used

        def read(pieces: list[Piece]) -> tuple[list[Piece], tuple[int, T]]:
            offset, stored = self._stored(pieces, next(rooms) if reuse else Room(self._codec))
            return pieces, (offset, use(stored))

        for pieces, block in read_ahead(read, self._pieces(rows)):
            yield block
            self._check_again(pieces)

    def _stored(self, pieces: list[Piece], room: Room) -> tuple[int, Stored]:
        """Return the offset of the first of these (shard, first row, rows), and all of them."""
        i, first, _ = pieces[0]
        return self._starts[i] + first, self._read([(i, [(first, count)]) for i, first, count in pieces], room)

    def _read(self, pieces: list[tuple[int, list[tuple[int, int]]]], room: Room) -> Stored:
        """Return rows of shards, each with its windows of (first row, rows)."""
        counts = [sum(count for _, count in windows) for _, windows in pieces]
        found = room.take(sum(counts))
        parts = ({name: x.split(counts)[k] for name, x in found.items()} for k in range(len(pieces)))
        for (i, windows), into in zip(pieces, parts, strict=True):
            stamp, layout = self._checked(i)
            with self._told(self._entries[i]):
                self._files[i].read(layout, windows, stamp, into)
        return Stored(found["gradients"], found.get("scale"))

    def _pieces(self, rows: int) -> Iterator[list[Piece]]:
        """Yield blocks of up to `rows` rows; small neighbours are read as one."""
        check_rows(rows)
        small = min(rows, SMALL_BYTES // self._codec.row_bytes)
        yield from pieces_of(((i, self._files[i].rows) for i in self._mine), rows, small)
