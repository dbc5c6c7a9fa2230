"""A GPU that compiles and never runs: launchers called inside `gpu(arch)` leave their compiled kernels behind.

Triton asks a driver for the target, the device and the stream, and hands it the binary; this driver answers for
a part that is not here. So a test compiles exactly what a launcher would launch, specialization included.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import dropinf_kernels.gpu  # noqa: F401  `_launchers` looks for its modules
from dropinf_kernels import device
from dropinf_kernels.device import ARCHS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass
class _Driver:
    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    @cached_property
    def _device(self) -> int:
        return sorted(TARGETS).index(next(n for n, t in TARGETS.items() if t == self.target))

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Compiled:
    """One compiled kernel, and what its machine code says."""

    name: str
    arch: str
    kernel: object
    grid: tuple[int, ...]
    _sass: str = field(default="", repr=False)

    @property
    def shared(self) -> int:
        return self.kernel.metadata.shared

    @property
    def code(self) -> str:
        """Return the SASS of an NVIDIA kernel, or the assembly of an AMD one."""
        if "amdgcn" in self.kernel.asm:
            return self.kernel.asm["amdgcn"]
        if not self._sass:
            self._sass = self._tool("cuobjdump", "-sass")
        return self._sass

    def _tool(self, tool: str, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            done = subprocess.run([_BIN / tool, *options, file.name], capture_output=True, text=True, check=True)
        return done.stdout

    def resources(self) -> dict[str, int]:
        """Return the registers of a thread, and bytes of stack or scratch (spills)."""
        if "amdgcn" in self.kernel.asm:
            code = self.code
            read = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", code).group(1))  # noqa: E731
            return {
                "registers": read("vgpr_count") + read("agpr_count"),
                # Scalar registers spill to lanes of vector registers, not to memory.
                "spilled": read("private_segment_fixed_size") + read("vgpr_spill_count"),
            }
        usage = self._tool("cuobjdump", "-res-usage")
        read = lambda key: int(re.search(rf"{key}:(\d+)", usage).group(1))  # noqa: E731
        return {"registers": read("REG"), "spilled": read("STACK") + read("LOCAL")}

    def count(self, pattern: str) -> int:
        """Return how many instructions match a regular expression."""
        return len(re.findall(pattern, self.code))


def fake_driver(arch: str) -> _Driver:
    """Return what Triton takes for the driver of a part."""
    return _Driver(TARGETS[arch])


@contextlib.contextmanager
def gpu(arch: str) -> Iterator[list[Compiled]]:
    """Compile for `arch` what launchers launch on CPU tensors; yields the list of compiled kernels, in order."""
    done: list[Compiled] = []
    run, arch_of = JITFunction.run, device.arch_of
    modules = _launchers()

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        done.append(Compiled(self.fn.__name__, arch, kernel, grid))
        return kernel

    active = driver._active
    driver.set_active(fake_driver(arch))
    JITFunction.run = compile_only
    for module in modules:
        module.arch_of = lambda _: ARCHS[arch]
    try:
        yield done
    finally:
        JITFunction.run, driver._active = run, active
        for module in modules:
            module.arch_of = arch_of


def _launchers() -> list:
    return [m for name, m in sys.modules.items() if name.startswith("dropinf_kernels.") and hasattr(m, "arch_of")]
