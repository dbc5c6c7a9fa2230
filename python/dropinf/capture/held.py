"""What modules and batches hold: containers and objects, which a forward may change, and the tensors in them."""

from __future__ import annotations

import argparse
import functools
import inspect
import operator
import pickle
import random
from collections import UserDict, UserList, deque
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..loss_name import is_of_a_library

LARGEST_BUFFER = 1 << 24  # bytes, of those that are put back in eval mode
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_PLAIN = {int, float, bool, str, type(None)}
_OPEN = (SimpleNamespace, argparse.Namespace, UserDict, UserList)  # of Python's, with what their user puts there


class Held:
    """Containers and objects as they are, with all that lies in them, and their tensors.

    Args:
        values: where to begin.
        seen: ids of what is left out.
        hidden: look into modules, and into objects of their user's classes; else into objects of any class.
    """

    def __init__(self, values: Iterable[Any], seen: set[int], *, hidden: bool) -> None:
        self.tensors: list[Tensor] = []
        self._before: list[tuple[Any, Any]] = []
        self._hidden, todo = hidden, list(values)
        while todo:
            value = todo.pop()
            if type(value) in _PLAIN or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                self.tensors.append(value)
            else:
                todo += self._taken(value)

    def _taken(self, value: Any) -> Iterable[Any]:
        """Take a container as it is. Return what it holds."""
        if isinstance(value, dict | list | set | deque):
            self._before.append((value, value.copy()))
            parts: Any = value.values() if isinstance(value, dict) else value
            return () if set(map(type, parts)) <= _PLAIN else parts  # tokens, say
        if isinstance(value, bytearray):
            self._before.append((value, bytes(value)))
        elif isinstance(value, np.ndarray):
            if value.nbytes <= LARGEST_BUFFER:
                self._before.append((value, value.copy()))
        elif isinstance(value, _GENERATORS):
            draws = _Draws(value)
            self._before.append((draws, draws.copy()))
        elif isinstance(value, tuple | frozenset):
            return value
        elif inspect.ismethod(value):
            return (value.__self__,)
        elif isinstance(value, functools.partial):
            return (value.func, value.args, value.keywords)
        elif self._is_open(value):
            slots = _Slots(value)
            if slots.names:
                self._before.append((slots, slots.copy()))
            return [*slots.copy().values(), *([vars(value)] if hasattr(value, "__dict__") else [])]
        return ()

    def _is_open(self, value: Any) -> bool:
        """Return whether to look at the attributes of a value."""
        kind = type(value)
        ours = kind.__module__.partition(".")[0] in ("dropinf", "dropinf_kernels")
        if ours or inspect.isroutine(value) or isinstance(value, type | ModuleType):
            return False
        if isinstance(value, nn.Module):
            return self._hidden
        return not self._hidden or isinstance(value, _OPEN) or not is_of_a_library(kind)

    def moved(self) -> bool:
        """Return whether something holds something else than it did."""
        return not all(is_same(value, before) for value, before in self._before)

    def refill(self) -> None:
        """Have containers and objects hold what they held."""
        for value, before in self._before:
            if is_same(value, before):
                continue
            if isinstance(value, np.ndarray | _Slots | _Draws):
                value[...] = before
                continue
            value.clear()
            (value.update if isinstance(value, dict | set) else value.extend)(before)


class _Slots:
    """The attributes of an object that has no dictionary for them."""

    def __init__(self, value: Any) -> None:
        self._value = value
        found = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
        names = [name for slots in found for name in ([slots] if isinstance(slots, str) else slots)]
        self.names = [name for name in names if name[:2] != "__"]

    def copy(self) -> dict[str, Any]:
        return {name: getattr(self._value, name) for name in self.names if hasattr(self._value, name)}

    def __setitem__(self, _all: Any, before: dict[str, Any]) -> None:
        for name, held in before.items():
            object.__setattr__(self._value, name, held)


class _Draws:
    """The state of a generator of random numbers, NumPy's or Python's own."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def copy(self) -> bytes:
        value = self._value
        if isinstance(value, random.Random):
            return pickle.dumps(value.getstate())
        return pickle.dumps(
            value.get_state() if isinstance(value, np.random.RandomState) else value.bit_generator.state
        )

    def __setitem__(self, _all: Any, before: bytes) -> None:
        value, state = self._value, pickle.loads(before)
        if isinstance(value, random.Random):
            value.setstate(state)
        elif isinstance(value, np.random.RandomState):
            value.set_state(state)
        else:
            value.bit_generator.state = state


def is_same(now: Any, before: Any) -> bool:
    """Return whether a container holds the very objects that it held."""
    if isinstance(now, np.ndarray):
        return bool(now.tobytes() == before.tobytes())
    if isinstance(now, _Draws):
        return bool(now.copy() == before)
    if isinstance(now, bytearray):
        return bool(now == before)
    if isinstance(now, _Slots):
        now = now.copy()
    if len(now) != len(before):
        return False
    if isinstance(now, set):
        return set(map(id, now)) == set(map(id, before))
    same = all(map(operator.is_, now, before))  # and in one order
    return same and (not isinstance(now, dict) or all(map(operator.is_, now.values(), before.values())))
