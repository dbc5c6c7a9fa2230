"""Machine code of compress_linear."""

import re

import pytest
import torch

from dropinf_kernels.device import ARCHS
from tests.cases import linear
from tests.compile.fake_gpu import gpu
from tests.compile.machine_code import check, every_build


@every_build
def test_compiles_without_a_spill_and_with_the_right_instructions(dtype, arch):
    check(linear, dtype, arch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "before"), [("64x64-scattered", 49), ("128x128-scattered", 25)])
def test_scattered_columns_are_read_along_rows(arch, name, before):
    """Lanes along a column would ask for 32 cache lines at once, and hold the place of each column in a register.

    ``before``: loads of one step, with its share of the table's, while the left side was read so.
    """
    case = next(case for case in linear.large(torch.bfloat16) if case.name == name)
    with gpu(arch) as kernels:
        case.call()
    (kernel,) = kernels
    code = kernel.kernel.asm["ttgir"]
    layouts = dict(re.findall(r"(#blocked\d*) = #ttg\.blocked<\{(.*?)\}>", code))
    loads = re.findall(r"tt\.load .*?tensor<(\w+)x!tt\.ptr<bf16>, (#\w+)>", code)
    assert len(loads) == 2
    for _shape, layout in loads:
        assert "sizePerThread = [1, 1], threadsPerWarp = [1, 32]" in layouts[layout]
        assert "order = [1, 0]" in layouts[layout]
    assert kernel.count(r"\bLDG\.E") < before
    if name.startswith("128"):
        threads = ARCHS[arch].warp_size * kernel.kernel.metadata.num_warps
        assert 2 * threads * kernel.resources()["registers"] <= ARCHS[arch].registers
        assert 2 * kernel.shared <= ARCHS[arch].shared_bytes
