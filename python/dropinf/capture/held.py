"""What modules and batches hold: containers, and the tensors in them, which a forward may change."""

from __future__ import annotations

import inspect
import operator
from collections import deque
from collections.abc import Iterable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..loss_name import is_of_a_library

LARGEST_BUFFER = 1 << 24  # bytes, of those that are put back in eval mode
_PLAIN = {int, float, bool, str, type(None)}


def contents(value: Any, containers: list[tuple[Any, Any]], seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors of a batch; add its dicts and lists, and the attributes of its objects, with what they hold."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, nn.Module | str | type):
        return
    seen.add(id(value))
    parts: Any = ()
    if isinstance(value, dict | list):
        containers.append((value, dict(value) if isinstance(value, dict) else list(value)))
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = () if set(map(type, value)) <= _PLAIN else value  # tokens, say
    elif hasattr(value, "__dict__"):
        parts = (vars(value),)
    for part in parts:
        yield from contents(part, containers, seen)


def state_of(value: Any, containers: list[tuple[Any, Any]], seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in what modules hold, modules that they hide among them; add its containers, as they are.

    So are attributes of objects of their user's classes; those of libraries' are not asked.
    """
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: Any = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        parts = (*value.parameters(), *value.buffers())
    elif isinstance(value, dict):
        containers.append((value, dict(value)))
        parts = value.values()
    elif isinstance(value, list | set | deque | bytearray):
        containers.append((value, set(value) if isinstance(value, set) else list(value)))
        parts = value
    elif isinstance(value, np.ndarray):
        if value.nbytes <= LARGEST_BUFFER:
            containers.append((value, value.copy()))
    elif isinstance(value, tuple):
        parts = value
    elif isinstance(value, SimpleNamespace) or _is_of_a_user(value):
        parts = (vars(value),)
    if parts and not set(map(type, parts)) <= _PLAIN:
        for part in parts:
            yield from state_of(part, containers, seen)


def _is_of_a_user(value: Any) -> bool:
    """Return whether a value is an object with attributes, of a class of its user's."""
    plain = inspect.isroutine(value) or isinstance(value, type | ModuleType)
    return not plain and hasattr(value, "__dict__") and not is_of_a_library(type(value))


def refill(containers: Iterable[tuple[Any, Any]]) -> None:
    """Have containers hold what they held."""
    for value, before in containers:
        if is_same(value, before):
            continue
        if isinstance(value, np.ndarray):
            value[...] = before
            continue
        value.clear()
        (value.update if isinstance(value, dict | set) else value.extend)(before)


def is_same(now: Any, before: Any) -> bool:
    if isinstance(now, np.ndarray):
        return bool(now.tobytes() == before.tobytes())
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return now.keys() == before.keys() and all(map(operator.is_, now.values(), map(before.get, now)))
    return isinstance(now, set) or all(map(operator.is_, now, before))
