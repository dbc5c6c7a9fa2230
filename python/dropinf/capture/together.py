"""Layers that read one tensor, as queries, keys and values do: it is gathered once for all of them, on a GPU.

Which do, is seen in the batch before. Each gets what it would have gathered by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropinf_kernels import sketch

from .modules import Use


class SharedInputs:
    """What the layers of one batch gather of their inputs."""

    def __init__(self) -> None:
        self._first: Use | None = None  # to read the tensor that was gathered last
        self._read: Tensor | None = None  # held, so that no other comes to lie where it does
        self._place: Any = None
        self._parts: dict[str, Tensor] = {}  # what others are to get of it

    def gathered(self, use: Use, x: Tensor) -> Tensor:
        """Return what the table of a layer's input keeps of it."""
        place = x.data_ptr(), x.shape, x.stride(), x.dtype, -1 if x.is_inference() else x._version
        if place == self._place and self._first is not None:
            part = self._parts.pop(use.name, None)
            if part is not None:
                return part
            if use is not self._first and use not in self._first.together and _alike(use, self._first):
                self._first.together.append(use)  # from the next batch on
            return _gathered(x, [use])[0]
        self.clear()
        self._first, self._read, self._place = use, x, place
        own, *others = _gathered(x, [use, *use.together])
        self._parts = {other.name: part for other, part in zip(use.together, others, strict=True)}
        return own

    def clear(self) -> None:
        """Let go of the last tensor. A layer that did not read it is not expected to any more."""
        if self._first is not None and self._parts:
            self._first.together[:] = [use for use in self._first.together if use.name not in self._parts]
        self._first = self._read = self._place = None
        self._parts = {}


def _alike(one: Use, other: Use) -> bool:
    """Return whether one call of the kernel serves both."""
    a, b = one.table, other.table
    return a is not None and b is not None and (a.size, a.group) == (b.size, b.group)


def _gathered(x: Tensor, uses: list[Use]) -> tuple[Tensor, ...]:
    axes = [use.table for use in uses if use.table is not None]
    tables = [axis.index for axis in axes if axis.index is not None]
    if len(uses) == 1:
        return (sketch(x, tables[0], None, axes[0].group),)
    first, names = uses[0], tuple(use.name for use in uses)
    if first.joined is None or first.joined[0] != names:
        first.joined = names, torch.cat(tables, 1)
    whole: Tensor = sketch(x, first.joined[1], None, axes[0].group)
    return tuple(whole.split([table.shape[1] for table in tables], -1))
