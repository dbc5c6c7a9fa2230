"""What the machine code of every kernel must be, compiled by its own launcher: it is read, and nothing runs."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch

from dropinf_kernels.device import ARCHS
from tests.cases.common import Case
from tests.compile.fake_gpu import TARGETS, Compiled, gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX = {
    "sm_80": r"\bHMMA\.",
    "sm_90": r"\b(HGMMA|HMMA)\.",
    "sm_100": r"\b(UTC\w*MMA|HMMA)\b",
    "gfx942": r"\bv_mfma_f32_",
}
# What a bulk load looks like, narrow and wide. Tables of coordinates are 32-bit loads.
NARROW = {"gfx942": r"\b(?:global|buffer)_load_(?:u|s)(?:short|byte)"}
ASYNC = r"\b(LDGSTS\.E\.BYPASS(\.LTC\w+)?\.128|UTMALDG)"
LOADS = r"\bLDG\.E(?!\.CONSTANT)[.\w]*"


def every_build(test):
    """Run a test for every dtype and every architecture."""
    return pytest.mark.parametrize("arch", TARGETS)(pytest.mark.parametrize("dtype", DTYPES)(test))


def compiled(cases: ModuleType, dtype: str, arch: str) -> list[tuple[Case, list[Compiled]]]:
    done = []
    for case in cases.large(DTYPES[dtype]):
        with gpu(arch) as kernels:
            case.call()
        assert kernels, f"{case.name} launched nothing"
        done.append((case, list(kernels)))
    return done


def check(cases: ModuleType, dtype: str, arch: str) -> None:
    """Ask for no spill, for matrix instructions and for wide asynchronous loads, in what the large cases launch."""
    problems = []
    for case, kernels in compiled(cases, dtype, arch):
        for kernel in kernels:
            resources = kernel.resources()
            where = f"{case.name}: {kernel.name}"
            if resources["spilled"]:
                problems.append(f"{where} spills: {resources}")
            if kernel.shared > ARCHS[arch].shared_bytes:
                problems.append(f"{where} takes {kernel.shared} bytes of shared memory")
            # Disassembling takes longer than compiling: only where there is something to read.
            if kernel.name == case.matrix and not kernel.count(MATRIX[arch]):
                problems.append(f"{where} has no matrix instruction")
            if kernel.name == case.matrix and kernel.count(r"\b(LDL|STL)\b"):
                problems.append(f"{where} uses local memory")
            if kernel.name == case.vector and dtype != "fp32":
                problems += [f"{where} {p}" for p in narrow(kernel, arch, case.asynchronous)]
    assert not problems, "\n".join(problems)


def narrow(kernel: Compiled, arch: str, asynchronous: bool) -> list[str]:
    """Return what is no 128-bit asynchronous load, or no wide store, of a kernel that must have no other."""
    if arch == "gfx942":
        found = re.findall(NARROW["gfx942"], kernel.code)
        wide = kernel.count(r"\b(global|buffer)_load_dwordx4")
        return [f"loads 16 bits: {found}"] * bool(found) + ["has no 128-bit load"] * (not wide)
    problems = []
    # Tables are 32-bit loads outside the asynchronous pipeline; anything of 16 bits is a gather.
    small = [load for load in re.findall(LOADS, kernel.code) if ".U16" in load or ".U8" in load]
    if small:
        problems.append(f"loads 16 bits: {len(small)} of them")
    if not kernel.count(ASYNC if asynchronous else r"\bLDG\.E\.128"):
        problems.append("has no 128-bit load" + " that is asynchronous" * asynchronous)
    bulk = [load for load in re.findall(LOADS, kernel.code) if ".64" in load]
    if bulk:
        problems.append(f"loads 64 bits: {len(bulk)} of them")
    stores = re.findall(r"\bSTG\.E[.\w]*", kernel.code)
    if any(".128" not in store for store in stores):
        problems.append(f"stores less than 128 bits: {sorted(set(stores))}")
    return problems
