"""Where an op runs: the kernels on a GPU that they support, the reference elsewhere, with one warning."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from dropinf_kernels import launch
from dropinf_kernels.tiling import ARCHS


def on_gpu(dtype=torch.float32):
    """What routing looks at of a tensor that this machine cannot hold."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=dtype)


@pytest.fixture
def part(monkeypatch):
    """Pretend that the GPU is a part of this capability."""

    def be(major, minor, multiprocessors=40):
        found = SimpleNamespace(major=major, minor=minor, multi_processor_count=multiprocessors, name="a card")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found.name)
        launch.arch_of.cache_clear()
        launch._supported.cache_clear()

    yield be
    launch.arch_of.cache_clear()
    launch._supported.cache_clear()


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_a_gpu_older_than_sm_80_takes_the_reference_with_one_warning(part, capability):
    part(*capability)
    with pytest.warns(UserWarning, match="a card is older than sm_80") as found:
        routed = [launch.runs_triton([on_gpu()]) for _ in range(3)]
    assert routed == [False] * 3
    assert len(found) == 1


@pytest.mark.parametrize(
    ("capability", "rules"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_100")],
)
def test_a_supported_gpu_takes_the_kernels(part, capability, rules):
    part(*capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch.runs_triton([on_gpu(), on_gpu(torch.float16)])
    arch = launch.arch_of(torch.device("cuda:0"))
    assert (arch.name, arch.multiprocessors) == (f"sm_{capability[0]}{capability[1]}", 40)
    assert arch.bandwidth == ARCHS[rules].bandwidth


def test_float64_and_the_cpu_take_the_reference(part):
    part(9, 0)
    assert not launch.runs_triton([on_gpu(), on_gpu(torch.float64)])
    assert not launch.runs_triton([torch.zeros(1)])
