"""What every launcher shares: the device guard, checks that must not make the host wait, and timing of tiles."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..device import arch_of
from ..ops.checks import check_bounds, check_ids, document_bounds
from .replay import recording

T = TypeVar("T")
_log = logging.getLogger("dropinf_kernels")


def check_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors lie on one device."""
    named = [(name, t) for name, t in tensors.items() if t is not None]
    device = named[0][1].device
    for name, t in named[1:]:
        if t.device != device:
            raise ValueError(
                f"{name} is on {t.device} and {named[0][0]} on {device}; move {name} with {name}.to('{device}')"
            )


class _Seen:
    """What is known of tensors, until they are written: views of one tensor are told by where they lie in it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, set[Any]]] = {}

    def __contains__(self, fact: tuple[Tensor, Any]) -> bool:
        x, what = fact
        base = x if x._base is None else x._base
        known = self._known.get(id(base))
        if known is None or known[0]() is not base or x.is_inference() or known[1] != x._version:
            return False
        return _place(x, what) in known[2]

    def add(self, x: Tensor, what: Any) -> None:
        """Note a fact; of a tensor made under inference_mode nothing shows whether it was written, so none is."""
        if x.is_inference():
            return
        base = x if x._base is None else x._base
        key, known = id(base), self._known.get(id(base))
        if known is None or known[0]() is not base or known[1] != x._version:
            known = self._known[key] = weakref.ref(base, lambda _: self._known.pop(key, None)), x._version, set()
        known[2].add(_place(x, what))


def _place(x: Tensor, what: Any) -> Any:
    return x.storage_offset(), x.shape, x.stride(), x.dtype, what


_tables, _documents = _Seen(), _Seen()

# How often an op had to copy an argument first, by op and argument.
copies: Counter[tuple[str, str]] = Counter()


def copied(name: str, x: Tensor, op: str) -> Tensor:
    """Return a contiguous copy of an argument whose rows no strides of a kernel address, and count it."""
    if not copies[op, name]:
        _log.info("%s copies %s of shape %s and strides %s", op, name, list(x.shape), list(x.stride()))
    copies[op, name] += 1
    return x.contiguous()


def check_index(name: str, index: Tensor | None, size: int, group: int = 1) -> None:
    """Check a table's entries once per tensor: later calls with the same tensor do not wait for the device.

    A table that was made under `torch.inference_mode` is checked in every call: nothing shows whether it was written.

    Raises IndexError for an entry outside [0, size), ValueError for broken runs, RuntimeError if the first
    call happens while a CUDA graph is being captured.
    """
    if index is None:
        return
    if (index, (size, group)) in _tables:
        return
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} is checked on its first use, which waits; call the op once before capturing a graph"
        )
    check_bounds(name, index, size)
    if group > 1 and index.numel():
        runs = index.unflatten(-1, (-1, group))
        start = runs[..., :1]
        if not bool(((start % group == 0) & (runs == start + torch.arange(group, device=index.device))).all()):
            raise ValueError(
                f"{name} is not made of aligned runs of {group}: start, ..., start + {group - 1} with start a multiple "
                "of group; pass group=1 for scattered coordinates"
            )
    _tables.add(index, (size, group))


def check_cu_seqlens(cu_seqlens: Tensor, rows: int, device: torch.device) -> Tensor:
    """Return `cu_seqlens` on `device`: checked here if it is a CPU tensor, by an assertion in the stream if not.

    The assertion runs once for a tensor, until it is written, and in every graph that is captured.
    """
    check_ids("cu_seqlens", cu_seqlens, 1)
    if (now := recording()) is not None:
        now.ask(functools.partial(check_cu_seqlens, rows=rows, device=device), cu_seqlens)
    if cu_seqlens.device.type == "cpu":
        document_bounds(cu_seqlens, rows)
        return cu_seqlens.to(device)
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; it must be on {device} or on the CPU")
    if (cu_seqlens, rows) not in _documents or torch.cuda.is_current_stream_capturing():
        fine = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == rows) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(fine, f"cu_seqlens must start with 0, not decrease, and end at the number of rows, {rows}")
        _documents.add(cu_seqlens, rows)
    return cu_seqlens


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, resident: int = 1, **meta: Any
) -> None:
    """Launch on the current stream of `device`; an empty grid is no launch.

    `resident`: programs of which a multiprocessor's registers must hold so many at once.
    """
    if 0 in grid:
        return
    arch = arch_of(device)
    if arch is not None and arch.backend == "cuda":
        # Without a ceiling ptxas aims at an occupancy of its own, and spills to reach it.
        meta["maxnreg"] = min(255, arch.registers // (arch.warp_size * meta["num_warps"] * resident))
    run: Callable[..., Any] = functools.partial(kernel[grid], **meta)
    compiled = _on_device(device, run, *args)
    if (now := recording()) is None:
        return
    if compiled is not None:  # the interpreter compiles nothing
        args += tuple(meta[name] for name in kernel.arg_names[len(args) :])
        run = compiled[(*grid, 1, 1)[:3]]
    now.launched(functools.partial(_on_device, device, run), args)


def _on_device(device: torch.device, run: Callable[..., Any], *args: Any) -> Any:
    """Launch on the current stream of a device."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return run(*args)
    with torch.cuda.device(device):
        return run(*args)


def autotuned() -> bool:
    """Say whether the environment asks for timing tiles: DROPINF_AUTOTUNE=1. Ranks may then disagree."""
    return os.environ.get("DROPINF_AUTOTUNE", "0") == "1"


_tuned: dict[tuple[Any, ...], Any] = {}


def choose(op: str, problem: tuple[Any, ...], candidates: Sequence[T], launch_tile: Callable[[T], object]) -> T:
    """Return the rule's tile, the first candidate; with DROPINF_AUTOTUNE=1 the fastest, timed once per problem."""
    if not autotuned() or len(candidates) < 2:
        return candidates[0]
    key = (op, *problem)
    if key not in _tuned:
        from triton.testing import do_bench

        if (now := recording()) is not None:
            now.holds = False  # what is timed is no part of the call
        calls = [functools.partial(launch_tile, c) for c in candidates]
        times = [do_bench(call, warmup=5, rep=20, return_mode="median") for call in calls]
        _tuned[key] = candidates[times.index(min(times))]
        _log.info("autotune %s %s: %s (%.3f ms)", op, problem, _tuned[key], min(times))
    return _tuned[key]  # type: ignore[no-any-return]
