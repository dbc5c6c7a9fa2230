"""Where an op runs: the kernels on a GPU that they support, the plain body elsewhere, with one warning."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import dropinf_kernels as kernels
from dropinf_kernels import device, op
from dropinf_kernels.device import ARCHS


def on_gpu(dtype=torch.float32):
    """Return what routing looks at of a tensor that this machine cannot hold."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=dtype)


@pytest.fixture
def part(monkeypatch):
    """Pretend that the GPU is a part of this capability."""

    def be(major, minor, multiprocessors=40):
        found = SimpleNamespace(major=major, minor=minor, multi_processor_count=multiprocessors, name="a card")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found.name)
        device.arch_of.cache_clear()
        device._supported.cache_clear()

    yield be
    device.arch_of.cache_clear()
    device._supported.cache_clear()


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_a_gpu_older_than_sm_80_takes_the_reference_with_one_warning(part, capability):
    part(*capability)
    with pytest.warns(UserWarning, match="a card is older than sm_80") as found:
        routed = [device.runs_triton([on_gpu()]) for _ in range(3)]
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
        assert device.runs_triton([on_gpu(), on_gpu(torch.float16)])
    arch = device.arch_of(torch.device("cuda:0"))
    assert (arch.name, arch.multiprocessors) == (f"sm_{capability[0]}{capability[1]}", 40)
    assert arch.bandwidth == ARCHS[rules].bandwidth


def test_float64_and_the_cpu_take_the_reference(part):
    part(9, 0)
    assert not device.runs_triton([on_gpu(), on_gpu(torch.float64)])
    assert not device.runs_triton([torch.zeros(1)])


@pytest.mark.parametrize("namespace", [kernels, torch.ops.dropinf], ids=["function", "registered"])
def test_a_call_that_runs_triton_runs_the_launcher_with_its_arguments(namespace, monkeypatch):
    launched = []

    def launcher(a, g, **rest):
        launched.append((a, g, rest, torch.is_grad_enabled()))
        return torch.zeros(2, 4, 4, dtype=torch.int8), torch.zeros(2)

    monkeypatch.setattr(op, "runs_triton", lambda tensors: True)
    monkeypatch.setattr(op, "_launchers", {})
    op.launches(kernels.compress_linear, kernels.compress_linear_int8)(launcher)
    a, g = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    out = namespace.compress_linear(a, g)
    q, scale = namespace.compress_linear_int8(a, g)
    assert (out.shape, q.shape, scale.shape) == ((2, 4, 4), (2, 4, 4), (2,))
    assert [rest.get("quantize", False) for _, _, rest, _ in launched] == [False, True]
    assert not any(recorded for *_, recorded in launched)


def test_an_op_whose_launcher_is_missing_imports_the_kernels_first(monkeypatch):
    imported = []
    monkeypatch.setattr(op, "_launchers", {})
    monkeypatch.setattr(op, "_import_launchers", lambda: imported.append(op.launches(kernels.sketch)(torch.add)))
    assert kernels.sketch.triton(torch.ones(2), 1).tolist() == [2, 2]
    assert kernels.sketch.triton(torch.ones(2), 2).tolist() == [3, 3]
    assert imported == [torch.add]
