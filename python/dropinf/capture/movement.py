"""Which functions a forward runs, on what and with which numbers, as a fingerprint.

A batch whose forward has another one may have other layouts, though every shape is the same: Python may have taken
another branch, joined pieces in another order, or cut a tensor elsewhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

_NEAR = 5  # numbers below it are dimensions, flags and the like; sizes differ from each other by less, as in x[:-1]
_SEQUENCES = (list, tuple)
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)  # by what they are called
_KNOWN = ("builtins", "torch", "numpy")
_FAR = 1 << 40  # no node's number is as far from another's: -1 and -2 have one hash


class Movement:
    """The functions of one forward of ``n`` samples (None: unknown).

    ``leaves``: the tensors of its batch. ``names``: numbers of parameters, by their ids.
    """

    def __init__(self, n: int | None, leaves: Sequence[Tensor] = (), names: Mapping[int, int] | None = None) -> None:
        self.n, self.unknowable = n, False
        self._leaves = {id(leaf): i for i, leaf in enumerate(leaves)}
        self._names, self._others = names or {}, dict[int, int]()
        self._made: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # tensors without a gradient
        self._path = self._count = 0
        self._functions: set[int] = set()
        self._base = _node_number(torch.zeros((), requires_grad=True).view(()))  # of autograd's nodes so far

    def fingerprint(self) -> int | None:
        """Return what tells this forward from others, or None where nothing can."""
        return None if self.unknowable else self._path

    @property
    def functions(self) -> frozenset[int]:
        """Return which functions ran, however often."""
        return frozenset(self._functions)

    def pass_by(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take a function that runs: where its activations come from, and its whole numbers."""
        key = hash(function)
        self._count += 1
        self._functions.add(key)
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        items: list[Any] = [self._path, key]
        self._add(items, args, x)
        if kwargs:
            items += kwargs
            self._add(items, kwargs.values(), x)
        self._path = hash(tuple(items))

    def made(self, result: Any) -> None:
        """Take what the last function returned: results that no node of autograd tells apart."""
        for i, x in enumerate(result if isinstance(result, _SEQUENCES) else (result,)):
            if isinstance(x, Tensor) and not x.requires_grad:
                self._name(x, f"of {self._count}.{i}")

    def end(self, losses: Tensor) -> None:
        """Take the losses: a forward may return some of several that it computed."""
        items: list[Any] = [self._path]
        self._add(items, (losses,), None)
        self._path = hash(tuple(items))

    def _name(self, x: Tensor, name: str) -> str:
        """Return what a tensor without a gradient is known by, which is this name where it has none."""
        found = self._made.get(id(x))
        if found is None or found[0]() is not x:
            found = self._made[id(x)] = weakref.ref(x), name
        return found[1]

    def _add(self, items: list[Any], values: Iterable[Any], x: Tensor | None) -> None:
        """Add what tells arguments of one call from those of another; ``x``: what sizes are compared with."""
        for v in values:
            if isinstance(v, Tensor):
                if id(v) in self._names:
                    items.append(f"parameter {self._names[id(v)]}")
                elif v.requires_grad and v.is_leaf:
                    items.append(f"new {self._others.setdefault(id(v), len(self._others))}")
                elif v.requires_grad:
                    items.append(_node_number(v) - self._base + _FAR)
                    items.append(v.output_nr)
                elif id(v) in self._leaves:
                    items.append(f"leaf {self._leaves[id(v)]}")
                else:
                    items.append(self._name(v, f"other {len(self._made)}"))
            elif type(v) is int:
                items.append(self._number(v, x))
            elif isinstance(v, _SEQUENCES):
                items.append(len(v))
                self._add(items, v, x)
            elif type(v) is slice:
                self._add(items, (v.start, v.stop, v.step), x)
            elif v is None or type(v) is bool or isinstance(v, (str, *_NAMED)):
                items.append(str(v))
            elif isinstance(v, Integral):  # of NumPy, say
                items.append(self._number(int(v), x))
            elif isinstance(v, Mapping):
                items += map(str, v)
                self._add(items, v.values(), x)
            else:
                items.append(type(v).__name__)  # an ellipsis, a float
                # What a user's own function does, or an object that stands in for a tensor, is in no path.
                self.unknowable |= callable(v) or not type(v).__module__.startswith(_KNOWN)

    def _number(self, v: int, x: Tensor | None) -> str:
        """Return a number, or how it goes with a tensor's sizes, so that the same cut of another size looks alike."""
        if -_NEAR < v < _NEAR:
            return str(v)
        for dim, size in enumerate(() if x is None else x.shape):
            if -_NEAR < v - size < _NEAR:
                return f"{dim}:{v - size}"
        return f"{v // self.n}n" if self.n and v % self.n == 0 else str(v)


def _node_number(x: Tensor) -> int:
    """Return which of its thread's nodes of autograd a tensor comes from."""
    node: Any = x.grad_fn
    return 0 if node is None else int(node._sequence_nr())  # none inside torch.func
