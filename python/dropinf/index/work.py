"""The batches of a run that one rank computes, and those that it only compares with what is stored."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..workload import Ids, count_of, first_batch
from .fingerprint import fingerprint
from .finished import Finished
from .parts import Share


class Work:
    """The batches that a rank computes, in order; `at` is the number of the one that is being computed.

    Those that are finished are compared as they come; where batches can be had in any order, before any is computed.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        first: str,
        finished: Finished,
        share: Callable[[int], bool],
        beside: Callable[[int], bool],
        ids: Ids | None,
    ) -> None:
        """Take ``batches``, of which ``share`` says whether they are this rank's, and ``beside`` whether it looks at
        them for another rank; ``first``: its first fingerprint."""
        self.beside = beside
        self.batches, self.first, self.finished, self.share, self.ids = batches, first, finished, share, ids
        mine = [b for b in finished if share(b)]
        # What no fingerprint is of, such as the loss, shows in the rows of the first and of the last.
        self.again = set(mine if finished.plan.every else mine[:1] + mine[-1:])
        self.first_number = batches.rank * batches.each if isinstance(batches, Share) else 0
        self.named = ids is not None
        self.at: int | None = None  # None: computed only so that other ranks need not wait
        self.batch: Any = None
        self.print = ""  # fingerprint of the batch, as it was before loss_fn had it
        self.count = count_of(batches)
        self.prints: dict[int, str] = {}  # of its batches, and of those that it looks at for another rank
        self.spare = batches.first if isinstance(batches, Share) else None
        self.rounds = 0  # computed by each rank, where all must compute together

    def __iter__(self) -> Iterator[Any]:
        done = 0
        for at, batch in self._all():
            self.at, self.batch = at, batch
            done += 1
            yield batch
        self.at = None
        for _ in range(self.rounds - done):
            yield self.spare if isinstance(self.batches, Share) else first_batch(self.batches)[0]

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("the number of batches is not known")
        return max(self.rounds, len(self.again) + sum(map(self.wanted, range(self.count))))

    def wanted(self, b: int) -> bool:
        """Return whether a batch is this rank's, and is not finished.

        Raises:
            ValueError: more batches than were stored.
        """
        if self.share(b) and b not in self.finished:
            self.finished.check_missing(b)
            return True
        return False

    def _all(self) -> Iterator[tuple[int, Any]]:
        if isinstance(self.batches, Sequence):
            count = len(self.batches)
            if not isinstance(self.batches, list | tuple | Share) and self.share(0):
                self._check_first(self.batches[0])
            for b in self.finished:
                if self.share(b) and self.finished.tells(b):
                    self._compare(b, self.batches[b])
            others = filter(self.beside, range(count))
            for b in (*sorted(self.again), *filter(self.wanted, range(count))):
                batch = self.batches[b]
                self.print = self._print(b, batch)
                yield b, batch
                for other in itertools.islice(others, 1):
                    self._print(other, self.batches[other])
            for other in others:
                self._print(other, self.batches[other])
            return
        b, told = self.first_number - 1, self.count
        for b, batch in enumerate(self.batches, self.first_number):
            if b == 0 and not isinstance(self.batches, Iterator):
                self._check_first(batch)
            if not self.share(b):
                if self.beside(b):
                    self._print(b, batch)
                continue
            if b in self.finished:
                self._compare(b, batch)
            if b in self.again or self.wanted(b):
                self.print = self._print(b, batch)
                yield b, batch
        if isinstance(self.batches, Share):
            return
        self.count = b + 1
        if told not in (None, self.count):
            raise ValueError(f"batches: their len() is {told}, and {self.count} came; give the length that is")

    def _check_first(self, batch: Any) -> None:
        if fingerprint(batch, named=self.named) != self.first:
            raise ValueError(
                "batches: their first batch is another one when it is read again, as of a wrapper around an "
                "iterator, or with random augmentation; pass a list, or iter(batches) to read them once"
            )

    def _print(self, b: int, batch: Any) -> str:
        # loss_fn may have had the first batch already, and changed it.
        found = self.first if b == self.first_number else fingerprint(batch, named=self.named)
        self.prints[b] = found
        return found

    def _compare(self, b: int, batch: Any) -> None:
        difference = self.finished.difference(b, self._print(b, batch), None if self.ids is None else self.ids(batch))
        if difference is not None:
            raise ValueError(
                f"{difference}; go on with the batches of then, give up the run that was begun (Index.discard()), add "
                f"others to a finished index (append=True; {self.finished.plan.folder}), or name another folder"
            )
