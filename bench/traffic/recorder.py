"""Record every address that kernels load and store, as Triton's interpreter runs them on the CPU.

The interpreter passes all loads and stores through one method each, so a launcher called inside `record()` leaves
its traffic behind: what its programs asked for, and how many 32-byte sectors that touches.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

SECTOR = 32
_SHIFT = 5


@dataclass
class Count:
    """Bytes of one tensor, loaded or stored by one launch."""

    requested: int = 0  # by all lanes that are not masked out
    dram: int = 0  # distinct sectors of the launch: what must move once
    l2: int = 0  # distinct sectors of each program, summed: what moves if each program's own reuse is caught


@dataclass
class Launch:
    """One launch: its traffic by (tensor, "load" or "store"), and its matrix operations by operand width."""

    kernel: str
    grid: tuple[int, ...]
    counts: dict[tuple[str, str], Count] = field(default_factory=dict)
    storages: dict[str, int] = field(default_factory=dict)  # where the storage of each tensor starts
    flops: dict[int, int] = field(default_factory=dict)

    def total(self, what: str, direction: str = "", names: tuple[str, ...] | None = None) -> int:
        """Sum `what` ("requested", "dram" or "l2") over tensors and directions."""
        return sum(
            getattr(count, what)
            for (name, way), count in self.counts.items()
            if direction in ("", way) and (names is None or name in names)
        )


class _Marks:
    """The sectors of one storage that one direction touched: of the running program, and of the launch."""

    def __init__(self, count: Count, sectors: int) -> None:
        self.count = count
        self.program, self.launch = np.zeros(sectors, bool), np.zeros(sectors, bool)
        self.low, self.high = sectors, 0

    def add(self, sectors: np.ndarray, itemsize: int) -> None:
        self.count.requested += sectors.size * itemsize
        self.program[sectors] = True
        self.low, self.high = min(self.low, int(sectors.min())), max(self.high, int(sectors.max()) + 1)

    def end_program(self) -> None:
        if self.low >= self.high:
            return
        mine = self.program[self.low : self.high]
        self.count.l2 += int(np.count_nonzero(mine)) * SECTOR
        self.launch[self.low : self.high] |= mine
        mine[:] = False
        self.low, self.high = self.program.size, 0

    def end_launch(self) -> None:
        self.end_program()
        self.count.dram = int(np.count_nonzero(self.launch)) * SECTOR


class _Recording:
    """A launch while it runs."""

    def __init__(self, launch: Launch, tensors: dict[str, torch.Tensor]) -> None:
        self.launch = launch
        self.program: object = None
        self.marks: dict[tuple[int, str], _Marks] = {}
        named: dict[int, tuple[str, int]] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            # A tensor that stands in for a missing argument keeps the name of its first.
            if storage.nbytes():
                named.setdefault(storage.data_ptr(), (name, storage.nbytes()))
        self.starts = sorted(named)
        self.named = [named[start] for start in self.starts]

    def access(self, builder: interpreter.InterpreterBuilder, ptrs: Any, mask: Any, way: str) -> None:
        if builder.grid_idx is not self.program:
            self.end_program()
            self.program = builder.grid_idx
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.int64)
        if not addresses.size:
            return
        itemsize = max(8, ptrs.get_element_ty().primitive_bitwidth) // 8
        at = bisect_right(self.starts, int(addresses[0])) - 1
        start, (name, nbytes) = self.starts[at], self.named[at]
        if at < 0 or addresses.min() < start or addresses.max() + itemsize > start + nbytes:
            raise IndexError(f"{self.launch.kernel} reaches outside of {name}, or of several tensors at once")
        marks = self.marks.get((at, way))
        if marks is None:
            count = self.launch.counts.setdefault((name, way), Count())
            self.launch.storages[name] = start
            marks = self.marks[at, way] = _Marks(count, (start % SECTOR + nbytes - 1) // SECTOR + 1)
        marks.add((addresses >> _SHIFT) - (start >> _SHIFT), itemsize)

    def end_program(self) -> None:
        for marks in self.marks.values():
            marks.end_program()

    def end(self) -> None:
        for marks in self.marks.values():
            marks.end_launch()


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Yield the list that every launch inside the context is appended to. Needs TRITON_INTERPRET=1."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, dot, call = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_dot,
        executor.__call__,
    )
    launches: list[Launch] = []
    running: list[_Recording] = []
    alive: list[object] = []  # so that no intermediate tensor's address is used again

    def recorded_load(self, ptrs, mask, *rest):
        running[-1].access(self, ptrs, mask, "load")
        return load(self, ptrs, mask, *rest)

    def recorded_store(self, ptrs, value, mask, *rest):
        running[-1].access(self, ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest)

    def recorded_dot(self, a, b, *rest):
        flops = running[-1].launch.flops
        width = a.dtype.primitive_bitwidth
        flops[width] = flops.get(width, 0) + 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    def recorded_call(self, *args, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        alive.extend(tensors.values())
        launch = Launch(self.fn.__name__, tuple(self.grid))
        running.append(_Recording(launch, tensors))
        call(self, *args, **kwargs)
        running.pop().end()
        launches.append(launch)

    builder.create_masked_load, builder.create_masked_store = recorded_load, recorded_store
    builder.create_dot, executor.__call__ = recorded_dot, recorded_call
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_dot, executor.__call__ = dot, call
