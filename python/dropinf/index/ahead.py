"""Reading the next block while one is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def one_ahead(blocks: Iterator[T]) -> Iterator[T]:
    """Yield the blocks, each once the next is mapped."""
    block = next(blocks, None)
    while block is not None:
        following = next(blocks, None)
        yield block
        block = following


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
