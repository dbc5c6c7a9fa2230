"""An earlier call's launches, done again for arguments that look the same.

What a launcher checks, which tiles it takes and what Triton compiles follow from shapes, strides, dtypes and tables,
never from values. So a call that looks like an earlier one allocates and launches what that one did, on its own
arguments: the host then spends a third of the time.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

L = TypeVar("L", bound=Callable[..., Any])
TABLES = frozenset({"index", "in_index", "out_index", "rows", "cols"})  # whose entries are checked once
MOST = 16_384  # calls that are remembered; layers of a model have two or three each

_now = threading.local()


class _Allocated(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Recording:
    """What one call allocates, asks of later calls, and launches. Slots: its tensor arguments, then its allocations."""

    def __init__(self, given: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
        self._slots = {x.data_ptr(): at for at, x in enumerate(given)}
        # Two arguments in one place need not lie in one place again; a table for both sides does.
        self.holds = len(self._slots) == len(given) - len(tables) + len({id(x) for x in tables})
        self._kept, self._given = list(given), len(given)  # so that no memory serves twice meanwhile
        self.made: list[_Allocated] = []
        self.asked: list[tuple[Callable[[Tensor], object], int]] = []
        self.steps: list[tuple[Callable[..., object], list[Any], list[tuple[int, int]]]] = []

    def allocated(self, x: Tensor) -> None:
        """Note an allocation."""
        self.made.append(_Allocated(tuple(x.shape), x.dtype, x.device))
        self._slots[x.data_ptr()] = len(self._kept)
        self._kept.append(x)

    def ask(self, check: Callable[[Tensor], object], x: Tensor) -> None:
        """Have ``check`` called with this argument in each later call."""
        at = self._slots.get(x.data_ptr(), self._given)
        self.holds = self.holds and at < self._given
        self.asked.append((check, at))

    def launched(self, run: Callable[..., object], args: Sequence[Any]) -> None:
        """Note a launch, ``run(*args)``."""
        places = [(at, self._slots.get(x.data_ptr(), -1)) for at, x in enumerate(args) if isinstance(x, Tensor)]
        self.holds = self.holds and all(slot >= 0 for _, slot in places)
        self.steps.append((run, [None if isinstance(x, Tensor) else x for x in args], places))

    def slot_of(self, x: Tensor | None) -> int | None:
        """Return the slot of a result."""
        at = -1 if x is None else next((at for at, kept in enumerate(self._kept) if kept is x), -1)
        self.holds = self.holds and (x is None or at >= 0)
        return None if x is None else at


class Replay:
    """An earlier call, without its tensors."""

    def __init__(self, recording: Recording, found: Any, tables: Iterable[Tensor]) -> None:
        self._single = not isinstance(found, tuple)
        self._found = [recording.slot_of(x) for x in ((found,) if self._single else found)]
        self.holds = recording.holds and bool(recording.steps)
        self._made, self._asked, self._steps = recording.made, recording.asked, recording.steps
        self._tables = [weakref.ref(x) for x in tables]

    def is_of(self, tables: Sequence[Tensor]) -> bool:
        """Return whether these are the tables of the earlier call, not others that came to lie where they were."""
        for ref, x in zip(self._tables, tables, strict=True):  # noqa: SIM110 (half as fast)
            if ref() is not x:
                return False
        return True

    def __call__(self, slots: list[Tensor]) -> Any:
        """Call it again, with these tensor arguments."""
        for check, at in self._asked:
            check(slots[at])
        for shape, dtype, device in self._made:
            slots.append(torch.empty(shape, dtype=dtype, device=device))
        for run, given, places in self._steps:
            args = given.copy()
            for at, slot in places:
                args[at] = slots[slot]
            run(*args)
        if self._single:
            return None if self._found[0] is None else slots[self._found[0]]
        return tuple([None if at is None else slots[at] for at in self._found])


def recording() -> Recording | None:
    """Return what records the call that this thread is in."""
    return getattr(_now, "recording", None)


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized tensor, and note it."""
    x, now = torch.empty(shape, dtype=dtype, device=device), recording()
    if now is not None:
        now.allocated(x)
    return x


def can_replay(x: Tensor) -> bool:
    """Return whether calls on this tensor's device are recorded: those that a CUDA driver launches."""
    return x.is_cuda and torch.version.hip is None


def replayed(launcher: L) -> L:
    """Make a launcher do again what an earlier call did, where its arguments look the same."""
    are_tables = [name in TABLES for name in inspect.signature(launcher).parameters]
    known: dict[Hashable, Replay] = {}

    @functools.wraps(launcher)
    def call(*args: Any, **kwargs: Any) -> Any:
        slots: list[Tensor] = []
        tables: list[Tensor] = []
        key: list[Hashable] = [len(args), *kwargs]
        given: Iterable[tuple[Any, bool]] = zip(args, are_tables, strict=False)
        if kwargs:
            given = chain(given, ((x, name in TABLES) for name, x in kwargs.items()))
        for x, is_table in given:
            if isinstance(x, Tensor):
                slots.append(x)  # its index for its device, as devices are slow to compare
                key += x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16 == 0
                if is_table:
                    if x.is_inference():
                        return launcher(*args, **kwargs)
                    tables.append(x)
                    key += id(x), x._version
            else:
                key.append(tuple(x) if isinstance(x, list) else x)
        if not slots or not can_replay(slots[0]) or recording() is not None:
            return launcher(*args, **kwargs)
        whole = tuple(key)
        replay = known.get(whole)
        if replay is not None and replay.is_of(tables):
            return replay(slots)
        return _recorded(known, whole, tables, slots, functools.partial(launcher, *args, **kwargs))

    return cast(L, call)


def _recorded(
    known: dict[Hashable, Replay],
    key: Hashable,
    tables: Sequence[Tensor],
    slots: Sequence[Tensor],
    call: Callable[[], Any],
) -> Any:
    """Make a call, and remember it where all that it did can be done again."""
    now = _now.recording = Recording(slots, tables)
    try:
        found = call()
    finally:
        _now.recording = None
    replay = Replay(now, found, tables)
    if replay.holds:
        if len(known) >= MOST:
            known.clear()
        known[key] = replay
    return found
