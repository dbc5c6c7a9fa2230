"""Ways that not every GPU takes: AMD's and old parts, two devices, a graph being captured, ranks, what commands say."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

import dropinf
import dropinf_kernels as ops
from dropinf import interop, ranks
from dropinf.capture import moments
from dropinf.capture.ladder import AttributionError
from dropinf.cli import doctor, recipe
from dropinf_kernels import device
from dropinf_kernels.gpu.tiling import topk_tile
from tests.gpu.problems import check, problems, results
from tests.gpu_like.helpers import check as check_model
from tests.gpu_like.helpers import on_gpu
from tests.gpu_like.pretend import CUDA, PROPERTIES, move
from tests.interpreter.helpers import assert_close
from tests.reference.helpers import make_table

SCALE = 16


@contextlib.contextmanager
def part(**properties: object):
    """Have another GPU inside."""
    asked = device.arch_of, device._supported
    for known in asked:
        known.cache_clear()
    found = SimpleNamespace(**vars(PROPERTIES) | properties)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=found):
        yield
    for known in asked:
        known.cache_clear()


def squares(model, x):
    return model(x).square().sum(1)


def amd():
    return part(gcnArchName="gfx942:sramecc+:xnack-", shared_memory_per_block_optin=64 << 10)


@pytest.mark.parametrize("name", ["linear-64x64-runs-8", "gram"])
def test_amd(gpu, monkeypatch, name):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    problem = problems(torch.float32, SCALE)[name]
    with amd():
        check(problem, results(getattr(ops, problem.op), problem.on(CUDA)))
    assert gpu.kernels


def test_many_queries_have_fewer_warps_on_amd(gpu, monkeypatch):
    problem = 64, 1000, 16, 2
    of_nvidia = topk_tile(*problem, device.arch_of(CUDA))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with amd():
        of_amd = topk_tile(*problem, device.arch_of(CUDA))
    assert (of_nvidia.warps, of_nvidia.stages, of_amd.warps, of_amd.stages) == (8, 3, 4, 2)


def test_rows_without_a_gpu():
    assert not dropinf.compress(nn.Linear(4, 3), [torch.randn(5, 4)], squares, dropinf.Dropout(2)).flat.is_cuda


def test_an_old_part_takes_the_plain_body(gpu):
    problem = problems(torch.float32, SCALE)["gram"]
    with part(major=7, minor=5), pytest.warns(UserWarning, match="pretended is older than sm_80"):
        check(problem, results(ops.gram_update, problem.on(CUDA)))
    assert not gpu.kernels


def test_the_longest_lists_take_the_plain_body(gpu):
    q, c = torch.randn(3, 8), torch.randint(-127, 128, (300, 8), dtype=torch.int8)
    scale = torch.rand(300)
    got = ops.score_topk(*on_gpu((q, c)), 280, scale.to(CUDA))
    want = ops.score_topk(q.double(), c, 280, scale)[0]
    assert_close(got[0].cpu(), want)


@pytest.mark.parametrize(("name", "sketch"), [("cnn", "dropout"), ("conv1d", "sjlt"), ("tied", "flat")])
def test_float64_takes_the_plain_body(gpu, name, sketch):
    sketches = {
        "dropout": dropinf.Dropout(4), "flat": dropinf.Dropout(17, mode="flat"), "sjlt": dropinf.SJLT(3)
    }  # fmt: skip
    check_model(name, sketches[sketch], torch.float64)
    assert not gpu.kernels


def test_a_table_that_is_first_used_in_a_capture_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the op once before capturing"):
        ops.sketch(torch.ones(2, 8).to(CUDA), make_table(8, 4)[0].to(CUDA))


def test_runs_on_the_device_of_its_tensors(gpu, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def enter(wanted):
        entered.append(wanted)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", enter)
    x, (index, _) = torch.randn(2, 8), make_table(8, 4)
    assert torch.equal(ops.sketch(*on_gpu((x, index))).cpu(), ops.sketch(x, index))
    assert entered == [CUDA]


def test_bounds_of_documents_on_the_cpu_are_moved(gpu):
    g, cu = torch.randn(10, 8), torch.tensor([0, 3, 4, 10])
    want = ops.compress_norm(None, g.double(), cu_seqlens=cu)
    assert_close(ops.compress_norm(None, g.to(CUDA), cu_seqlens=cu).cpu(), want)
    with pytest.raises(ValueError, match="cu_seqlens decreases"):
        ops.compress_norm(None, g.to(CUDA), cu_seqlens=torch.tensor([0, 4, 3, 10]))


def test_kernels_on_the_cpu():
    x, (index, _) = torch.randn(2, 8), make_table(8, 4)
    assert torch.equal(ops.sketch.triton(x, index), ops.sketch(x, index))


def test_a_generator_of_its_own_is_refused(gpu):
    model, x, generator = move(nn.Linear(4, 3)), torch.randn(5, 4).to(CUDA), torch.Generator()

    def loss_fn(model, x):
        factor = torch.rand(3, generator=generator).to(x)
        return (model(x) * factor).square().sum(1)

    with pytest.raises(AttributionError, match="a generator of its own"):
        dropinf.compress(model, [x], loss_fn, dropinf.Dropout(2))


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_ranks_send_from_where_their_backend_reads(gpu, monkeypatch, backend):
    sent = []
    monkeypatch.setattr(moments.dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(moments.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(moments.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(moments.dist, "all_reduce", lambda x, group: sent.append(x.is_cuda))
    found = moments.Moments({"layer": {"in": moments.Need("energy", 3)}})
    found.all_reduce(object())
    assert not found.of("layer")["in"].is_cuda
    assert ranks.Ranks(object()).device.type == ("cuda" if backend == "nccl" else "cpu")
    assert sent == [backend == "nccl"] * 2


def test_doctor_names_the_gpu(gpu, capsys, monkeypatch):
    doctor.doctor()
    said = capsys.readouterr().out
    assert "pretended (sm_90), 80 GiB" in said
    assert "Triton; plain PyTorch for float64 and on the CPU" in said
    assert "compress_linear on cuda equals float64 to rounding" in said
    assert "compress_linear_kernel" in gpu.kernels
    with part(major=7):
        assert "older than sm_80" in doctor.kernels(CUDA)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in doctor.kernels(CUDA)


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_doctor_without_a_gpu(capsys, monkeypatch, hip):
    monkeypatch.setattr(torch.version, "hip", hip)
    doctor.doctor()
    said = capsys.readouterr().out
    assert ("none; this torch is built for CPUs alone" in said) == (hip is None)
    assert "plain PyTorch, as there is no GPU" in said


def test_commands_take_the_gpu(gpu, monkeypatch):
    assert recipe.pick_device("cpu").type == "cpu"
    assert recipe.pick_device("cuda:0") == recipe.pick_device(None) == CUDA
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert recipe.pick_device(None) == torch.device("cuda", 3)


def test_commands_without_a_gpu():
    assert recipe.pick_device(None).type == "cpu"
    with pytest.raises(ValueError, match="device is 'cuda', and torch finds no GPU here"):
        recipe.pick_device("cuda")


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_ranks_of_torchrun_meet_by_their_device(gpu, monkeypatch, kind):
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(recipe.dist, "init_process_group", asked.append)
    monkeypatch.setattr(recipe.dist, "destroy_process_group", lambda: None)
    wanted = torch.device(kind, 0)
    with recipe.process_group(wanted):
        pass
    assert asked == ([wanted, "nccl"] if kind == "cuda" else ["gloo"])


class Toolkit(ModuleType):
    """A module of a toolkit that is not here: its classes are empty."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name):
        return type(name, (), {})


def test_dattri_takes_both_masks(gpu, monkeypatch):
    found = ("", ".algorithm", ".algorithm.block_projected_if", ".algorithm.tracin", ".algorithm.trak")
    found += (".algorithm.block_projected_if.block_projected_if", ".algorithm.block_projected_if.core")
    monkeypatch.setattr(interop, "version", lambda package: "0.3.0")
    for name in (*found, ".algorithm.block_projected_if.core.hook"):
        monkeypatch.setitem(sys.modules, f"dattri{name}", Toolkit(f"dattri{name}"))
    use = importlib.import_module("dropinf.interop.dattri")._Use
    x, g, rows = torch.randn(4, 3, 8), torch.randn(4, 3, 6), []
    for there in (False, True):
        model = nn.Linear(8, 6) if not there else move(nn.Linear(8, 6))
        compressor = dropinf.Compressor(model, dropinf.Dropout(4), lambda m, x: m(x).flatten(1).sum(1))
        plans = [layer.to(model.weight.device) for layer in compressor.layers.values()]
        module = use("", model, *sorted(plans, key=lambda plan: plan.kind != "linear"))
        a, of_out = (x, g) if not there else on_gpu((x, g))
        rows.append(module.compress(module.save(a, of_out), of_out).cpu())
    torch.testing.assert_close(*rows)
