"""Machine code of gram_update."""

import pytest
import torch

from dropinf_kernels.device import ARCHS
from tests.cases import gram
from tests.compile.fake_gpu import gpu
from tests.compile.machine_code import check, every_build


@every_build
def test_compiles_without_a_spill_and_with_the_right_instructions(dtype, arch):
    check(gram, dtype, arch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_two_programs_share_a_multiprocessor(arch):
    """One block took 227 registers a thread where it was added to F at once: room for a single program."""
    case = next(case for case in gram.large(torch.bfloat16) if case.name == "4096")
    with gpu(arch) as kernels:
        case.call()
    (kernel,) = kernels
    threads = ARCHS[arch].warp_size * kernel.kernel.metadata.num_warps
    assert 2 * threads * kernel.resources()["registers"] <= ARCHS[arch].registers
    assert 2 * kernel.shared <= ARCHS[arch].shared_bytes
    assert kernel.count(r"\bSTG\.E\.128") == kernel.count(r"\bSTG\.E") == 48  # as before
