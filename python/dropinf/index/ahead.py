"""Reading the next block while one is used, and blocks cut smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
Piece = tuple[int, int, int]  # shard, first row, rows


def read_ahead(read: Callable[[Any], T], jobs: Iterator[Any]) -> Iterator[T]:
    """Yield what `read` makes of each job, in order; a thread reads the next while one is used."""
    with ThreadPoolExecutor(1, "dropinf-read-ahead") as pool:
        pending = None
        for job in jobs:
            following = pool.submit(read, job)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def smaller(pieces: list[Piece], rows: int) -> Iterator[list[Piece]]:
    """Yield a block as blocks of up to `rows` rows; one of several shards as it is."""
    i, first, count = pieces[0]
    if len(pieces) > 1:
        yield pieces
    else:
        yield from ([(i, first + k, min(rows, count - k))] for k in range(0, count, rows))


def pieces_of(shards: Iterable[tuple[int, int]], rows: int, small: int) -> Iterator[list[Piece]]:
    """Yield blocks of up to `rows` rows of (shard, its rows); neighbours of up to `small` rows together are one."""
    block: list[Piece] = []
    for i, count in shards:
        if block and (block[-1][0] != i - 1 or sum(piece[2] for piece in block) + count > small):
            yield block
            block = []
        if count <= small:
            block.append((i, 0, count))
            continue
        for first in range(0, count, rows):
            yield [(i, first, min(rows, count - first))]
    if block:
        yield block
