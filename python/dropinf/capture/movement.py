"""Which functions a forward runs, on what and with which numbers, as a fingerprint.

A batch whose forward has another one may have other layouts, though every shape is the same: Python may have taken
another branch, joined pieces in another order, or cut a tensor elsewhere.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .taps import of_a_user

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
        self._known = {id(leaf): f"leaf {i}" for i, leaf in enumerate(leaves)}
        self._known |= {key: f"parameter {i}" for key, i in (names or {}).items()}
        self._sizes = tuple(size for leaf in leaves for size in leaf.shape)
        self._named: dict[int, tuple[weakref.ref[Tensor], Any]] = {}  # tensors that no node of autograd tells apart
        self.foreign = False  # whether it takes what an autograd Function of its user's made
        self._items: list[Any] = []
        self._shapes: list[tuple[int, ...]] = []  # of all that functions take
        self._count = 0
        self._path: int | None = None
        self.sizes = 0  # of tensors, which data, arrays and numbers that are in no path may decide
        self._functions: set[int] = set()
        self._base = _node_number(torch.zeros((), requires_grad=True).view(())) - _FAR  # of autograd's nodes so far

    def is_given(self, x: Tensor) -> bool:
        """Return whether a tensor is one of the batch, or a parameter or buffer."""
        return id(x) in self._known

    def is_leaf(self, x: Tensor) -> bool:
        """Return whether a tensor is one of the batch."""
        return self._known.get(id(x), "").startswith("leaf")

    def fingerprint(self) -> int | None:
        """Return what tells this forward from others once it has ended, or None where nothing can."""
        return None if self.unknowable else self._path

    @property
    def functions(self) -> frozenset[int]:
        """Return which functions ran, however often."""
        return frozenset(self._functions)

    def pass_by(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Take a function that runs: where its activations come from, and its whole numbers. Return its tensors."""
        key, found = hash(function), list[Tensor]()
        self._count += 1
        self._functions.add(key)
        self._items.append(key)
        self._add(args, found)
        if "as_strided" in getattr(function, "__name__", ""):  # on what lies elsewhere it takes other elements
            self._items += (str((x.stride(), x.storage_offset())) for x in found)
        if kwargs:
            self._items += kwargs
            self._add(kwargs.values(), found)
        return found

    def made(self, result: Any) -> None:
        """Take what the last function returned: results that no node of autograd tells apart."""
        for i, x in enumerate(result if isinstance(result, _SEQUENCES) else (result,)):
            if isinstance(x, Tensor) and not x.requires_grad:
                self._name(x, (self._count, i))

    def end(self, losses: Tensor) -> None:
        """Take the losses: a forward may return some of several that it computed."""
        self._add((losses,), [])
        self._path, self.sizes = hash(tuple(self._items)), hash(tuple(self._shapes))
        self._items.clear()
        self._shapes.clear()

    def _name(self, x: Tensor, name: Any) -> Any:
        """Return what a tensor is known by, which is this name where it has none."""
        found = self._named.get(id(x))
        if found is None or found[0]() is not x:
            found = self._named[id(x)] = weakref.ref(x), name
        return found[1]

    def _add(self, values: Iterable[Any], found: list[Tensor]) -> None:
        """Add what tells arguments of one call from those of another; ``found``: the tensors of the call so far."""
        items = self._items
        for v in values:
            if isinstance(v, Tensor):
                found.append(v)
                if not v.is_nested:
                    self._shapes.append(v.shape)
                known = self._known.get(id(v))
                if known is not None:
                    items.append(known)
                elif v.requires_grad and not v.is_leaf:
                    items.append(_node_number(v) - self._base)
                    items.append(v.output_nr)
                    self.foreign = self.foreign or of_a_user(v.grad_fn)
                else:
                    items.append(self._name(v, f"other {len(self._named)}"))
            elif v is None:
                items.append(v)
            elif type(v) is int:
                items.append(_number(v, found[0].shape if found else (), self._sizes, self.n))
            elif isinstance(v, _SEQUENCES):
                items.append(len(v))
                self._add(v, found)
            elif type(v) is slice:
                self._add((v.start, v.stop, v.step), found)
            elif type(v) is bool or isinstance(v, (str, *_NAMED)):
                items.append(str(v))
            elif isinstance(v, Integral) or (isinstance(v, np.ndarray) and not v.ndim and v.dtype.kind in "iu"):
                self._add((int(v),), found)  # of NumPy, say
            elif isinstance(v, Mapping):
                items += map(str, v)
                self._add(v.values(), found)
            else:
                items.append(type(v).__name__)  # an ellipsis, a float
                # What a user's own function does, or an object that stands in for a tensor, is in no path.
                is_known = type(v).__module__.split(".")[0] in _KNOWN and not callable(v)
                self.unknowable |= not is_known or (hasattr(type(v), "__index__") and not isinstance(v, np.ndarray))


@functools.lru_cache(4096)
def _number(v: int, shape: tuple[int, ...], batch: tuple[int, ...], n: int | None) -> str:
    """Return a number, or how it goes with sizes of a tensor or the batch, so that the same cut of another size looks
    alike.

    As text: -1 and -2 have one hash.
    """
    if -_NEAR < v < _NEAR:
        return str(v)
    for dim, size in enumerate(shape):
        if -_NEAR < v - size < _NEAR:
            return f"{dim}:{v - size}"
    for place, size in enumerate(batch):
        if -_NEAR < v - size < _NEAR:
            return f"batch {place}:{v - size}"
    return f"{v // n}n" if n and v % n == 0 else str(v)


def _node_number(x: Tensor) -> int:
    """Return which of its thread's nodes of autograd a tensor comes from."""
    node: Any = x.grad_fn
    return 0 if node is None else int(node._sequence_nr())  # none inside torch.func
