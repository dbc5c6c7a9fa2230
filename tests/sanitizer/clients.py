"""Kernels under triton-viz, without touching the package: every load and store of every program is looked at.

triton-viz's own sanitizer is symbolic and covers all programs at once, but follows few kernels: none whose loads
depend on other loads within a loop, and it takes arguments' memory for one. `Bounds` is exact for the values at
hand, keeps arguments apart, and follows all kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import triton.language as tl
import triton_viz
from torch import Tensor
from triton.language import standard
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder
from triton_viz.clients import Sanitizer
from triton_viz.clients.sanitizer import sanitizer as symbolic
from triton_viz.core.callbacks import ForLoopCallbacks, OpCallbacks
from triton_viz.core.client import Client
from triton_viz.core.data import AtomicCas, AtomicRMW, Load, Store
from triton_viz.core.patch import _loop_patcher
from triton_viz.frontends.triton import TRITON_FRONTEND

from dropinf_kernels import gpu
from dropinf_kernels.gpu import tiles
from tests.interpreter.sorting import fast_sort

# Addresses of a process stay below; the bits above carry which argument a pointer came from.
_TAG = np.uint64(48)
_ADDRESS = np.uint64((1 << 48) - 1)
_NOBODY, _SEVERAL = -1, -2


@dataclass
class Memory:
    """One tensor argument: its elements, as offsets from the first, and which programs read and wrote each."""

    name: str
    tensor: Tensor
    valid: np.ndarray = field(init=False)
    writer: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        offsets = np.zeros((), dtype=np.int64)
        for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True):
            offsets = offsets[..., None] + np.arange(size) * stride
        self.valid = np.zeros(int(offsets.max(initial=-1)) + 1, dtype=bool)
        self.valid[offsets] = True
        self.writer = np.full(self.valid.shape, _NOBODY)
        self.reader = np.full(self.valid.shape, _NOBODY)


class Bounds(Client):
    """Records accesses outside the argument they point into, and elements that two programs disagree about."""

    NAME = "bounds"

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        self.accesses = 0
        self.memories: list[Memory] = []
        self.program = 0
        self.load = interpreter_builder.create_masked_load
        self.store = interpreter_builder.create_masked_store

    def arg_callback(self, name: str, arg: object, arg_cvt: object) -> None:
        if isinstance(arg, Tensor):
            self.memories.append(Memory(name, arg))
            arg_cvt.handle.data = arg_cvt.handle.data | (np.uint64(len(self.memories)) << _TAG)

    def grid_idx_callback(self, grid_idx: tuple[int, ...]) -> None:
        self.program += 1

    def register_op_callback(self, op_type: type, *args: object) -> OpCallbacks:
        overriders = {Load: self._load, Store: self._store, AtomicCas: self._atomic, AtomicRMW: self._atomic}
        return OpCallbacks(op_overrider=overriders.get(op_type))

    def finalize(self) -> list:
        for memory in self.memories:
            shared = (memory.writer != _NOBODY) & (memory.reader != _NOBODY) & (memory.reader != memory.writer)
            if shared.any():
                self.errors.append(
                    f"{memory.name}: elements {shared.nonzero()[0][:5]} are read and written in a launch"
                )
        self.memories, self.program = [], 0
        return []

    def _load(self, pointers, mask, other, *options):
        live = self._check("load", pointers, mask)
        return self.load(_untagged(pointers), live, other, *options)

    def _store(self, pointers, value, mask, *options):
        live = self._check("store", pointers, mask)
        return self.store(_untagged(pointers), value, live, *options)

    def _atomic(self, *args: object):
        raise AssertionError("an atomic operation: sums would depend on the order of programs")

    def _check(self, what: str, pointers: TensorHandle, mask: TensorHandle) -> TensorHandle:
        """Record what is wrong with an access, and return the mask of what may be done."""
        self.accesses += 1
        addresses, live = np.broadcast_arrays(pointers.data, mask.data)
        live = live.astype(bool).copy()
        item = np.int64(max(1, pointers.dtype.scalar.element_ty.primitive_bitwidth // 8))
        for tag in np.unique(addresses[live] >> _TAG):
            memory = self.memories[int(tag) - 1]
            mine = live & (addresses >> _TAG == tag)
            offsets = (addresses[mine] & _ADDRESS).astype(np.int64) - memory.tensor.data_ptr()
            at = offsets // item
            inside = (offsets % item == 0) & (at >= 0) & (at < memory.valid.size)
            inside[inside] = memory.valid[at[inside]]
            if not inside.all():
                self.errors.append(f"{what} outside {memory.name} at elements {np.unique(at[~inside])[:5]}")
                live[mine] = inside
            self._own(what, memory, np.unique(at[inside]))
        return TensorHandle(live, mask.dtype)

    def _own(self, what: str, memory: Memory, at: np.ndarray) -> None:
        if what == "store":
            before = memory.writer[at]
            if ((before != _NOBODY) & (before != self.program)).any():
                self.errors.append(f"two programs store to {memory.name}, elements {at[before != self.program][:5]}")
            memory.writer[at] = self.program
        else:
            before = memory.reader[at]
            memory.reader[at] = np.where((before == _NOBODY) | (before == self.program), self.program, _SEVERAL)

    def pre_run_callback(self, fn: object) -> bool:
        return True

    def post_run_callback(self, fn: object) -> bool:
        return True

    def grid_callback(self, grid: tuple[int, ...]) -> None:
        pass

    def register_for_loop_callback(self) -> ForLoopCallbacks:
        return ForLoopCallbacks()

    def pre_warmup_callback(self, jit_fn: object, *args: object, **kwargs: object) -> bool:
        return False

    def post_warmup_callback(self, jit_fn: object, ret: object) -> None:
        pass


def _untagged(pointers: TensorHandle) -> TensorHandle:
    return TensorHandle(pointers.data & _ADDRESS, pointers.dtype)


@contextlib.contextmanager
def _traced(client: Client) -> Iterator[None]:
    """Run every kernel of the package under `client` for the duration of the context."""
    names = [m.name for m in pkgutil.iter_modules(gpu.__path__)]
    with contextlib.ExitStack() as stack:
        # Loops are rewritten wherever they are, and only the module of the kernel itself is told of the name.
        stack.enter_context(mock.patch.object(standard, "_triton_viz_loop_patcher", _loop_patcher, create=True))
        stack.enter_context(mock.patch.object(tiles, "_triton_viz_loop_patcher", _loop_patcher, create=True))
        for module in (importlib.import_module(f"dropinf_kernels.gpu.{name}") for name in names):
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, InterpretedFunction) and name.endswith("_kernel"):
                    traced = triton_viz.trace(client=client)(kernel)
                    stack.enter_context(mock.patch.object(module, name, traced))
        yield


@contextlib.contextmanager
def bounds() -> Iterator[Bounds]:
    """Check each access by its address."""
    client = Bounds()
    with contextlib.ExitStack() as stack:
        # Only the builder's functions are of interest, and triton-viz's stand-in for tl.trans does not run.
        stack.enter_context(mock.patch.dict(TRITON_FRONTEND.namespaces, {tl: {}}))
        stack.enter_context(fast_sort())
        stack.enter_context(_traced(client))
        yield client


@contextlib.contextmanager
def symbols() -> Iterator[Sanitizer]:
    """Check each access for all programs and lanes at once, as triton-viz does; what it finds is in `records`."""
    client = Sanitizer(abort_on_error=False)
    # It skips launches that look like an earlier one, whatever the tables hold.
    symbolic._fn_symbolic_cache_set.clear()
    with _traced(client):
        yield client
