"""What an update changes in place, noted so that an update that fails can be taken back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

HELD_BYTES = 1 << 26  # of the copies that a ledger holds
_TILE = 512  # rows that are mirrored at a time


class Ledger:
    """The symmetric sums that one update changes, each with what it was before.

    The first HELD_BYTES of them are copied. A larger rest is not doubled: while the update lasts, the upper triangle
    of such a sum is the new one, and the lower triangle, beside a copy of the diagonal, the old one. Only the sum that
    is being changed has a copy of its own, which solving it takes as well.

    ``open``: sums may be neither what they were nor what they will be.
    """

    def __init__(self) -> None:
        self.open = True
        self._fresh: dict[int, Tensor] = {}  # by id: sums that this update made
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # a sum, and what it was
        self._halves: dict[int, tuple[Tensor, Tensor]] = {}  # a sum, and what its diagonal was
        self._changing: tuple[Tensor, Tensor] | None = None  # the sum that is being changed, and its two halves

    def fresh(self, total: Tensor) -> Tensor:
        """Return a sum that is made by this update: where the update fails, nobody has it."""
        self._fresh[id(total)] = total
        return total

    def change(self, total: Tensor, change: Callable[[], object]) -> None:
        """Call what changes a symmetric sum in place and leaves it symmetric."""
        if id(total) not in self._fresh and id(total) not in self._copies and not self._copied(total):
            self._change_half(total, change)
        else:
            change()

    def add(self, total: Tensor | None, other: Tensor) -> Tensor:
        """Return a symmetric sum, or none, with another one added to it: in place where dtypes allow."""
        if total is None:
            return self.fresh(other.clone())
        other = other.to(total.device)
        if torch.promote_types(total.dtype, other.dtype) != total.dtype:
            return self.fresh(total + other)
        self.change(total, partial(total.add_, other))
        return total

    def close(self) -> None:
        """Make the changed sums whole: the update is done."""
        for total, _ in self._halves.values():
            _mirror(total, upper=True)
        self.open = False
        for held in (self._fresh, self._copies, self._halves):
            held.clear()

    def take_back(self) -> None:
        """Make every sum what it was. A call that is interrupted can be repeated."""
        if self._changing is not None:
            total, halves = self._changing
            total.copy_(halves)
        for total, before in self._copies.values():
            total.copy_(before)
        for total, diagonal in self._halves.values():
            _mirror(total, upper=False)
            total.diagonal().copy_(diagonal)

    def _copied(self, total: Tensor) -> bool:
        """Copy a sum if there is room for it."""
        held = sum(before.nbytes for _, before in self._copies.values())
        if id(total) in self._halves or held + total.nbytes > HELD_BYTES:
            return False
        self._copies[id(total)] = total, total.clone()
        return True

    def _change_half(self, total: Tensor, change: Callable[[], object]) -> None:
        halves = total.clone()
        if id(total) in self._halves:
            self._changing = total, halves
            _mirror(total, upper=True)
        else:
            self._halves[id(total)] = total, total.diagonal().clone()
            self._changing = total, halves
        change()
        for i, j in _spans(total):
            corner, old = total[i:j, i:j], halves[i:j, i:j]
            corner.copy_(torch.where(_below(corner), old, corner))
            total[j:, i:j].copy_(halves[j:, i:j])
        self._changing = None


@contextmanager
def all_or_none(*holders: object) -> Iterator[Ledger]:
    """Yield what notes changes of sums inside. Where something is raised, every field of the holders is as it was.

    Fields other than such sums must be replaced, or be lists. An exception that is raised while the sums are closed
    finds everything changed.
    """
    ledger = Ledger()
    before = [{n: list(v) if isinstance(v, list) else v for n, v in vars(holder).items()} for holder in holders]
    try:
        yield ledger
    except BaseException:
        ledger.take_back()
        for holder, fields in zip(holders, before, strict=True):
            vars(holder).update(fields)
        raise
    try:
        ledger.close()
    except BaseException:
        ledger.close()
        raise


def _spans(total: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the first and the last row of strips, each of a square on the diagonal and what lies beside it."""
    for i in range(0, len(total), _TILE):
        yield i, i + _TILE


def _below(square: Tensor) -> Tensor:
    """Return where a square matrix is below its diagonal."""
    return torch.ones_like(square, dtype=torch.bool).tril(-1)


def _mirror(total: Tensor, *, upper: bool) -> None:
    """Copy one triangle onto the other, in place."""
    for i, j in _spans(total):
        corner, below, right = total[i:j, i:j], total[j:, i:j], total[i:j, j:]
        if upper:
            corner.copy_(torch.where(_below(corner), corner.T, corner))
            below.copy_(right.T)
        else:
            corner.copy_(torch.where(_below(corner).T, corner.T, corner))
            right.copy_(below.T)
