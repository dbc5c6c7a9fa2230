"""GPU architectures, and where the Triton kernels run."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_AMD = ("gfx90a", "gfx942", "gfx950")


@dataclass(frozen=True)
class Arch:
    """A GPU as the rules for tiles see it."""

    name: str
    backend: str  # "cuda" or "hip"
    multiprocessors: int
    shared_bytes: int  # that one program may use
    registers: int  # 32-bit registers of a multiprocessor
    warp_size: int
    bandwidth: float  # bytes per second
    flops16: float  # dense 16-bit matrix operations per second
    flops32: float  # matrix operations per second at float32 accuracy (tf32x3, or native)

    @property
    def precision(self) -> str:
        """Return the `input_precision` that keeps float32 accuracy on the matrix units."""
        return "tf32x3" if self.backend == "cuda" else "ieee"


# Numbers of the vendors' data sheets; they decide tiles in gpu/tiling.py and predicted times in bench/traffic.
ARCHS = {
    "sm_80": Arch("sm_80", "cuda", 108, 163 << 10, 65536, 32, 2.04e12, 312e12, 156e12 / 3),
    "sm_90": Arch("sm_90", "cuda", 132, 227 << 10, 65536, 32, 3.35e12, 989e12, 495e12 / 3),
    "sm_100": Arch("sm_100", "cuda", 148, 227 << 10, 65536, 32, 8.0e12, 2250e12, 1125e12 / 3),
    "gfx942": Arch("gfx942", "hip", 304, 64 << 10, 131072, 64, 5.3e12, 1307e12, 163e12),
}


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
    """Return whether a call on these tensors runs the Triton kernels: on a supported GPU, without float64."""
    device = None
    for t in tensors:  # which costs a third of what generators do
        if t.dtype is torch.float64:
            return False
        if device is None and t.is_cuda:
            device = t.device
    return device is not None and _supported(device)
