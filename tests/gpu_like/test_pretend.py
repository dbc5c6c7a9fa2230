"""The pretended GPU itself: it refuses what CUDA refuses, and notes what the host would wait for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropinf_kernels as ops
from tests.gpu_like.pretend import CUDA, OnGpu, move
from tests.reference.helpers import make_table


def test_says_where_it_is(gpu):
    x = torch.ones(3, 4).to("cuda")
    for one in (
        x,
        x + 1,
        x[0],
        x.T,
        torch.zeros(2, device=CUDA),
        torch.tensor([1.0], device="cuda"),
        torch.randn_like(x),
    ):
        assert (one.device, one.is_cuda, type(one)) == (CUDA, True, OnGpu)
    assert not x.cpu().is_cuda
    assert torch.ones(2).to(x).is_cuda
    assert x.to(torch.float16).is_cuda
    assert not torch.ones(2).is_cuda


def test_views_share_their_numbers(gpu):
    x = torch.zeros(3, 4).to(CUDA)
    x[1].add_(1)
    x.T[2].mul_(5)
    assert x.cpu().tolist() == [[0, 0, 0, 0], [1, 1, 5, 1], [0, 0, 0, 0]]
    assert x[1].untyped_storage()._cdata == x.T.untyped_storage()._cdata
    assert x[1].data_ptr() == x.data_ptr() + 16


def test_gradients_lie_there(gpu):
    model = move(nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.LayerNorm(3)))
    model(torch.randn(5, 4, device=CUDA)).square().sum().backward()
    assert all(p.grad.is_cuda for p in model.parameters())


def test_two_devices_do_not_mix(gpu):
    x = torch.ones(3).to(CUDA)
    with pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()
    assert (x + torch.tensor(1.0)).is_cuda  # a number
    assert x[torch.tensor([0, 2])].is_cuda


def test_a_kernel_does_not_read_the_cpu(gpu):
    x, (index, _) = torch.ones(3, 32).to(CUDA), make_table(32, 1)
    assert ops.sketch(x, index.to(CUDA)).is_cuda
    assert gpu.kernels == ["sketch_gather_kernel"]
    with pytest.raises(ValueError, match="index is on cpu and x on cuda:0"):
        ops.sketch(x, index)


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x.sum()),
    "allclose": lambda x: torch.allclose(x, x),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: torch.bincount(x.long()),
    "index by truth values": lambda x: x[x > 0],
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long()),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "copy_": lambda x: torch.zeros(3).copy_(x),
    "up": lambda x: torch.ones(3).to(CUDA),
    "up, as another": lambda x: torch.ones(3).to(x),
    "up, a number": lambda x: torch.tensor([1.0], device=CUDA),
    "up, an index": lambda x: x[torch.tensor([0, 2])],
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_noted(gpu, name):
    x = torch.ones(3).to(CUDA)
    gpu.waits.clear()
    WAITS[name](x)
    assert len(gpu.waits) == 1, gpu.waits


def test_what_does_not_wait(gpu):
    x = torch.ones(3, 3).to(CUDA)
    gpu.waits.clear()
    x.to("cpu", non_blocking=True)
    (x @ x).sum(0).to(torch.float16)
    torch.zeros(3, device=CUDA).copy_(x[0])
    x[:, 0].masked_fill_(x[0] > 0, 1.0)
    x.index_select(0, torch.arange(2, device=CUDA))
    torch.repeat_interleave(x[0], x[0].long(), output_size=3)
    assert gpu.waits == []


def test_a_wait_is_noted_by_the_line_that_asked(gpu):
    x = torch.ones(3, 8).to(CUDA)
    with pytest.raises(IndexError):
        ops.sketch(x, torch.tensor([[9]], dtype=torch.int32).to(CUDA))
    assert gpu.waits[-1][1].startswith("dropinf_kernels/ops/checks.py:")
