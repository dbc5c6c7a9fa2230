"""Which sample each number of a tensor is of, for all tensors of a forward: kept by storage, so that views agree.

A storage's labels stand once for each block of neighbours that have the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.multiprocessing.reductions import StorageWeakRef

from .colours import NONE, SEVERAL

_ABOVE = 1 << 30  # any sample


def combined(a: Tensor, b: Tensor) -> Tensor:
    """Return the labels of what depends on both."""
    return torch.where((a == b) | (b == NONE), a, torch.where(a == NONE, b, SEVERAL))


def named(a: Tensor, b: Tensor) -> Tensor:
    """Return the labels of data made of both: they name its rows, and what has no one sample gives no name."""
    return torch.where((a == b) | (b < 0), torch.where(a == NONE, b, a), torch.where(a < 0, b, SEVERAL))


def unlabelled(shape: torch.Size, device: torch.device) -> Tensor:
    """Return the labels of numbers that have none."""
    return torch.full((), NONE, dtype=torch.int32, device=device).expand(shape)


def compact(labels: Tensor) -> Tensor:
    """Return labels with size one wherever a dimension repeats them."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def over(labels: Tensor, dims: Sequence[int]) -> Tensor:
    """Return the labels of what depends on all entries along dimensions, which are kept with size one."""
    dims = [dim for dim in dims if labels.shape[dim] != 1]
    if not dims:
        return labels
    if not labels.numel():
        return labels.new_full([1 if i in dims else s for i, s in enumerate(labels.shape)], NONE)
    low = torch.where(labels == NONE, _ABOVE, labels).amin(dims, keepdim=True)
    high = labels.amax(dims, keepdim=True)
    return torch.where(low == _ABOVE, NONE, torch.where(low == high, high, SEVERAL))


@dataclass(frozen=True)
class Piece:
    """What an op's result has of one of its arguments: labels that broadcast to it.

    ``firm``: a gradient flows through it. Where such a piece has a label, others only scale what it gives. Labels of
    data are names that its rows go by, no more: it is gradients that must stay apart.
    """

    labels: Tensor
    firm: bool

    def over(self, dims: Iterable[int]) -> Piece:
        """Return the piece with all entries along dimensions taken together; each has size one."""
        shape = self.labels.shape
        gone = sorted({dim % len(shape) for dim in dims})
        labels = over(compact(self.labels), gone)
        return Piece(labels.expand([1 if i in gone else size for i, size in enumerate(shape)]), self.firm)

    def alone(self) -> Piece:
        """Return the piece with all entries taken together."""
        return Piece(self.over(range(self.labels.ndim)).labels.reshape(()), self.firm)


def joined(pieces: Iterable[Piece]) -> Tensor:
    """Return the labels of what depends on all pieces, element by element."""
    firm: Tensor | None = None
    loose: Tensor | None = None
    for piece in pieces:
        labels = compact(piece.labels)
        if piece.firm:
            firm = labels if firm is None else combined(firm, labels)
        else:
            loose = labels if loose is None else named(loose, labels)
    if firm is None or loose is None:
        found = loose if firm is None else firm
        return torch.tensor(NONE, dtype=torch.int32) if found is None else found
    return torch.where(firm == NONE, loose, firm)


@dataclass
class _Entry:
    """A storage's labels from its number ``start`` on, each for ``block`` numbers of ``itemsize`` bytes.

    ``labels`` is None where no number has one. ``fixed``: it counts 0, 1, 2, ..., and so for every batch.
    ``firm``: made of what a gradient flows through, where autograd was off. ``carries``: a gradient flows through it.
    """

    storage: StorageWeakRef
    fixed: bool
    labels: Tensor | None = None
    start: int = 0
    block: int = 1
    itemsize: int = 1
    firm: bool = False
    carries: bool = False

    def refine(self, start: int, end: int) -> Tensor:
        """Give each number from start to end a label of its own; return the labels of all."""
        assert self.labels is not None
        labels = self.labels.repeat_interleave(self.block) if self.block > 1 else self.labels
        before, after = max(0, self.start - start), max(0, end - self.start - len(labels))
        if before or after:
            labels = torch.nn.functional.pad(labels, (before, after), value=NONE)
        self.labels, self.block, self.start = labels, 1, self.start - before
        return labels


class Labels:
    """The labels of all tensors of a forward. ``strict``: those of data count as those of what has a gradient do."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self._entries: dict[int, _Entry] = {}

    def knows(self, x: Tensor) -> bool:
        """Return whether a tensor's storage was seen before."""
        return self._entry(x) is not None

    def is_fixed(self, x: Tensor) -> bool:
        """Return whether a tensor's storage counts from zero, for every batch that runs the same ops."""
        entry = self._entry(x)
        return entry is not None and entry.fixed

    def is_firm(self, x: Tensor) -> bool:
        """Return whether a gradient flows through a tensor, or would if autograd were on, as around a checkpoint."""
        if self.strict or x.requires_grad or torch.is_grad_enabled():
            return self.strict or x.requires_grad
        entry = self._entry(x)
        return entry is not None and entry.firm

    def carry(self, x: Tensor) -> None:
        """Note a tensor that an op reads, through which a gradient may flow."""
        entry = self._entry(x) if x.requires_grad else None
        if entry is not None:
            entry.carries = True

    def keeps(self, x: Tensor) -> bool:
        """Return whether a gradient goes where it went before though the tensor is about to be written to."""
        entry = self._entry(x)
        return entry is not None and entry.carries and not (x.requires_grad and torch.is_grad_enabled())

    def add(self, x: Tensor, *, fixed: bool, firm: bool = False) -> None:
        """Take a tensor without labels; one that is known is fixed only if both are, and firm if one is."""
        self._added(x, fixed=fixed).firm |= firm

    def of(self, x: Tensor) -> Tensor | None:
        """Return a tensor's labels, repeated ones with stride zero; None where no number has one."""
        entry = self._entry(x)
        if entry is None or entry.labels is None:
            return None
        if entry.itemsize != x.element_size():
            return over(entry.labels, [0]).expand(x.shape)
        first, end = _span(x)
        strides = _block_strides(x, entry.block, first - entry.start)
        if strides is None or first < entry.start or end > entry.start + len(entry.labels) * entry.block:
            labels = entry.refine(first, end)
            return labels.as_strided(x.shape, x.stride(), first - entry.start)
        return entry.labels.as_strided(x.shape, strides, (first - entry.start) // entry.block)

    def put(self, x: Tensor, labels: Tensor, *, fixed: bool) -> None:
        """Give a tensor labels that broadcast to it."""
        entry = self._added(x, fixed=fixed)
        labels = labels.to(x.device, torch.int32).expand(x.shape)
        first, end = _span(x)
        whole = x.numel() * x.element_size() == x.untyped_storage().nbytes()
        if is_non_overlapping_and_dense_or_false(x) and (whole or entry.labels is None):
            entry.labels, entry.block = _blocks(x, compact(labels))
            entry.start, entry.itemsize = first, x.element_size()
            return
        if entry.labels is None:
            entry.labels = torch.full((end - first,), NONE, dtype=torch.int32, device=x.device)
            entry.start, entry.block, entry.itemsize = first, 1, x.element_size()
        if entry.itemsize != x.element_size():
            entry.labels = combined(over(entry.labels, [0]), over(labels.reshape(-1), [0]))
            entry.start, entry.block = 0, x.untyped_storage().nbytes() // entry.itemsize
            return
        refined = entry.refine(first, end)
        refined.as_strided(x.shape, x.stride(), first - entry.start).copy_(labels)

    def _entry(self, x: Tensor) -> _Entry | None:
        key = x.untyped_storage()._cdata
        entry = self._entries.get(key)
        if entry is not None and entry.storage.expired():
            del self._entries[key]
            return None
        return entry

    def _added(self, x: Tensor, *, fixed: bool) -> _Entry:
        entry = self._entry(x)
        if entry is None:
            if len(self._entries) % 256 == 255:
                self._forget()
            storage = x.untyped_storage()
            entry = self._entries[storage._cdata] = _Entry(StorageWeakRef(storage), fixed)
        entry.fixed &= fixed
        return entry

    def _forget(self) -> None:
        """Let go of storages that are gone."""
        for key in [key for key, entry in self._entries.items() if entry.storage.expired()]:
            del self._entries[key]


def _span(x: Tensor) -> tuple[int, int]:
    """Return the first of a storage's numbers that a tensor has, and the one behind its last."""
    first = int(x.storage_offset())
    return first, first + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1


def _block_strides(x: Tensor, block: int, first: int) -> list[int] | None:
    """Return a tensor's strides in blocks, zero within one; None where a dimension crosses blocks."""
    strides, within = [], first % block
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if size > 1 and stride % block:
            within += (size - 1) * stride
            strides.append(0)
        else:
            strides.append(stride // block)
    return strides if within < block else None


def _blocks(x: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return labels [*] of a dense tensor in the order of its storage, and how many numbers each is for."""
    order = sorted(range(x.ndim), key=lambda dim: (x.stride(dim), x.shape[dim] == 1), reverse=True)
    block = 1
    while order and labels.shape[order[-1]] == 1:
        block *= x.shape[order.pop()]
    rest = [dim for dim in range(x.ndim) if dim not in order]
    labels = labels.permute([*order, *rest]).reshape([labels.shape[dim] for dim in order])
    labels = labels.expand([x.shape[dim] for dim in order]).reshape(-1)
    return labels.clone(memory_format=torch.contiguous_format), block  # a storage of its own, from its first number on
