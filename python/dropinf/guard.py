"""Finds parameters that a model uses where the hooks of their own module do not see it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class UseGuard:
    """Finds tracked parameters that are used by anything but their own module's forward.

    ``owners``: the modules of each parameter, by its id. ``active``: how often each module's forward is entered.
    ``shards``: (module, name) -> id of a parameter that is a shard there.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        owners: Mapping[int, set[nn.Module]],
        active: Counter[nn.Module],
        shards: Mapping[tuple[nn.Module, str], int],
    ) -> None:
        self.parameters, self.owners, self.active, self.shards = parameters, owners, active, shards
        self.found: set[int] = set()
        self._gathered: dict[int, int] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notes every use inside. Parameters of a class of their own, and shards, which are gathered into others, cost
        a look at every call of PyTorch."""
        if self.shards or any(type(p) is not nn.Parameter for p in self.parameters):
            with _EveryCall(self):
                yield
            return
        try:
            for p in self.parameters:
                p.__class__ = _Watched
                p.guard = self  # type: ignore[attr-defined]
            yield
        finally:
            for p in self.parameters:
                p.__class__ = nn.Parameter
                p.__dict__.pop("guard", None)

    def note(self, parameter: nn.Parameter) -> None:
        """A call of PyTorch took the parameter."""
        key = self._shard_of(parameter) if self.shards else id(parameter)
        modules = self.owners.get(key)
        if modules is not None and not any(self.active[m] for m in modules):
            self.found.add(key)

    def _shard_of(self, parameter: nn.Parameter) -> int:
        """A gathered parameter is another object than its shard, known by the place that it takes."""
        if id(parameter) not in self._gathered:
            places = self.shards.items()
            self._gathered |= {id(getattr(module, name)): key for (module, name), key in places}
            self._gathered.setdefault(id(parameter), id(parameter))
        return self._gathered[id(parameter)]


class _Watched(nn.Parameter):
    """What plain parameters are while a guard watches: only the calls that take one come by here."""

    guard: UseGuard | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        for item in _taken(result, args, kwargs):
            if isinstance(item, _Watched) and item.guard is not None:
                item.guard.note(item)
        return result


class _EveryCall(TorchFunctionMode):
    def __init__(self, guard: UseGuard) -> None:
        super().__init__()
        self.guard = guard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in _taken(result, args, kwargs):
            # An id first: asking what a parameter is costs more.
            if (id(item) in self.guard.owners or self.guard.shards) and isinstance(item, nn.Parameter):
                self.guard.note(item)
        return result


def _taken(result: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The arguments of a call that gave tensors, and those of its lists."""
    if isinstance(result, Tensor | tuple | list):
        for value in (*args, *(kwargs or {}).values()):
            yield from value if isinstance(value, list | tuple) else (value,)
