"""What every launcher shares: where Triton runs, the device guard, and checks that must not make the host wait."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ._checks import check_bounds, check_ids, document_bounds
from .tiling import ARCHS, Arch

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_log = logging.getLogger("dropinf_kernels")
_AMD = ("gfx90a", "gfx942", "gfx950")


@functools.cache
def arch_of(device: torch.device) -> Arch | None:
    """Return the architecture of `device`, or None where these kernels do not run. CPU tensors mean the interpreter."""
    if device.type != "cuda":
        return ARCHS["sm_90"]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        arch = ARCHS["gfx942"] if name in _AMD else None
    else:
        capability = 10 * properties.major + properties.minor
        name = f"sm_{capability}"
        nearest = max((a for a in (80, 90, 100) if a <= capability), default=None)
        arch = None if nearest is None else ARCHS[f"sm_{nearest}"]
    if arch is None:
        return None
    shared = getattr(properties, "shared_memory_per_block_optin", arch.shared_bytes)
    return replace(arch, name=name, multiprocessors=properties.multi_processor_count, shared_bytes=shared)


@functools.cache
def _supported(device: torch.device) -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        warnings.warn("triton is not installed; dropinf's ops run in plain PyTorch on the GPU, slower", stacklevel=4)
        return False
    if arch_of(device) is None:
        warnings.warn(
            f"{torch.cuda.get_device_name(device)} is older than sm_80 (or an AMD part that is not CDNA2 or later); "
            "dropinf's ops run in plain PyTorch there, slower",
            stacklevel=4,
        )
        return False
    return True


def runs_triton(tensors: Sequence[Tensor]) -> bool:
    """Say whether a call on these tensors runs the Triton kernels: a supported GPU and no float64."""
    device = next((t.device for t in tensors if t.is_cuda), None)
    return device is not None and _supported(device) and all(t.dtype != torch.float64 for t in tensors)


def routed(reference: Callable[P, R], module: str) -> Callable[P, R]:
    """Return a body that runs the launcher of that name in `module` where Triton runs, else the reference."""

    @functools.wraps(reference)
    def body(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if tensors and runs_triton(tensors):
            launcher = getattr(importlib.import_module(f".{module}", __package__), reference.__name__)
            with torch.no_grad():
                return launcher(*args, **kwargs)  # type: ignore[no-any-return]
        return reference(*args, **kwargs)

    return body


def check_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors lie on one device."""
    named = [(name, t) for name, t in tensors.items() if t is not None]
    device = named[0][1].device
    for name, t in named[1:]:
        if t.device != device:
            raise ValueError(
                f"{name} is on {t.device} and {named[0][0]} on {device}; move {name} with {name}.to('{device}')"
            )


_checked: dict[int, tuple[weakref.ref[Tensor], int, int, int]] = {}


def check_index(name: str, index: Tensor | None, size: int, group: int = 1) -> None:
    """Check a table's entries once per tensor: later calls with the same tensor do not wait for the device.

    Raises IndexError for an entry outside [0, size), ValueError for broken runs, RuntimeError if the first
    call happens while a CUDA graph is being captured.
    """
    if index is None:
        return
    key = id(index)
    known = _checked.get(key)
    if known is not None and known[0]() is index and known[1:] == (index._version, size, group):
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
    _checked[key] = (weakref.ref(index, lambda _: _checked.pop(key, None)), index._version, size, group)


def check_cu_seqlens(cu_seqlens: Tensor, rows: int, device: torch.device) -> Tensor:
    """Return `cu_seqlens` on `device`: checked here if it is a CPU tensor, by an assertion in the stream if not."""
    check_ids("cu_seqlens", cu_seqlens, 1)
    if cu_seqlens.device.type == "cpu":
        document_bounds(cu_seqlens, rows)
        return cu_seqlens.to(device)
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; it must be on {device} or on the CPU")
    fine = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == rows) & (cu_seqlens.diff() >= 0).all()
    torch._assert_async(fine, f"cu_seqlens must start with 0, not decrease, and end at the number of rows, {rows}")
    return cu_seqlens


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any) -> None:
    """Launch on the current stream of `device`; an empty grid is no launch."""
    if 0 in grid:
        return
    arch = arch_of(device)
    if arch is not None and arch.backend == "cuda":
        # Without a ceiling ptxas aims at an occupancy of its own, and spills to reach it.
        meta["maxnreg"] = min(255, arch.registers // (arch.warp_size * meta["num_warps"]))
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        kernel[grid](*args, **meta)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **meta)


def autotuned() -> bool:
    """Say whether the environment asks for timing tiles: DROPINF_AUTOTUNE=1. Ranks may then disagree."""
    return os.environ.get("DROPINF_AUTOTUNE", "0") == "1"


_tuned: dict[tuple[Any, ...], Any] = {}


def choose(op: str, problem: tuple[Any, ...], candidates: Sequence[T], run: Callable[[T], object]) -> T:
    """Return the rule's tile, the first candidate; with DROPINF_AUTOTUNE=1 the fastest, timed once per problem."""
    if not autotuned() or len(candidates) < 2:
        return candidates[0]
    key = (op, *problem)
    if key not in _tuned:
        from triton.testing import do_bench

        times = [do_bench(functools.partial(run, c), warmup=5, rep=20, return_mode="median") for c in candidates]
        _tuned[key] = candidates[times.index(min(times))]
        _log.info("autotune %s %s: %s (%.3f ms)", op, problem, _tuned[key], min(times))
    return _tuned[key]  # type: ignore[no-any-return]
