"""Layers that read one tensor gather it once on a GPU, from the second batch on; each gets what is its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
from dropinf.capture.together import SharedInputs
from dropinf.sketch.axis import Axis
from tests.gpu_like.helpers import near, on_gpu
from tests.gpu_like.pretend import move

WIDTH, BATCHES = 16, 4


class Attention(nn.Module):
    """Queries, keys and values of one tensor; what reads it besides depends on the batch."""

    def __init__(self, changes: str = ""):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.changes = changes

    def forward(self, x):
        q = self.q(x + 1 if self.changes == "another" else x)
        left_out = self.changes == "skipped" and x[:, 0, 0].sum() < 0
        k = torch.zeros_like(x) if left_out else self.k(x)
        return self.o(F.softmax(q @ k.mT, -1) @ self.v(x))


def squares(model, x):
    return model(x).square().flatten(1).sum(1)


def batches():
    torch.manual_seed(1)
    found = [torch.randn(3, 5, WIDTH) for _ in range(BATCHES)]
    for i, x in enumerate(found):
        x[:, 0, 0] = x[:, 0, 0].abs() * (-1 if i % 2 else 1)
    return found


SKETCHES = {
    "scattered": dropinf.Dropout(4),
    "runs": dropinf.Dropout(8, group=4),
    "rotated": dropinf.Dropout(2, rank=8),
    "weighted": dropinf.Dropout(4, whiten=True),
    "whole": dropinf.Identity(),
}


def compressed(model, data, sketch):
    # The gradient of keys' biases is rounding.
    compressor = dropinf.Compressor(model, sketch, squares, layers=["*.weight"], audit="never")
    compressor.calibrate(data[:1])
    return compressor.compress(data)


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("changes", ["", "another", "skipped"])
def test_rows_are_those_of_the_cpu(gpu, changes, sketch):
    data = batches()
    here = compressed(Attention(changes).eval(), data, SKETCHES[sketch])
    there = compressed(move(Attention(changes).eval()), on_gpu(data), SKETCHES[sketch])
    near(there.flat, here.flat, 10)


def gathers(gpu, sketch, changes=""):
    """How many kernels gather in a call of one batch more."""
    model, data = move(Attention(changes).eval()), on_gpu([torch.ones(3, 5, WIDTH)] * 6)
    compressor = dropinf.Compressor(model, sketch, squares, audit="never")
    compressor.compress(data[:1])
    counts = []
    for count in (3, 4):
        gpu.kernels.clear()
        compressor.compress(data[:count])
        counts.append(sum(name.startswith("sketch_") for name in gpu.kernels))
    return counts[1] - counts[0]


def test_one_kernel_gathers_for_three(gpu):
    assert gathers(gpu, dropinf.Dropout(4)) == 2  # queries, keys and values; and the output's
    assert gathers(gpu, dropinf.Dropout(4), "another") == 3  # keys and values; queries; the output's
    assert gathers(gpu, dropinf.SJLT(4)) == 4  # sums are not shared


class Read:
    """A layer as far as it reads its input."""

    def __init__(self, name, seed):
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(WIDTH, generator=generator)[:4].int()[None]
        self.name, self.table, self.together, self.joined = name, Axis(WIDTH, on_gpu(index)), [], None

    def of(self, x):
        return x.cpu()[:, self.table.index[0].cpu().long()]


def test_what_was_written_or_is_another_tensor_is_gathered_by_itself(gpu):
    q, k, v = (Read(name, seed) for seed, name in enumerate("qkv"))
    x = on_gpu(torch.randn(3, WIDTH))
    for _ in range(3):
        inputs = SharedInputs()
        for use in (q, k):
            assert torch.equal(inputs.gathered(use, x).cpu(), use.of(x))
        x.mul_(2)
        for use in (k, v, q, q):
            assert torch.equal(inputs.gathered(use, x).cpu(), use.of(x))
        other = on_gpu(torch.randn(3, WIDTH))
        for use in (q, v, k):
            assert torch.equal(inputs.gathered(use, other).cpu(), use.of(other))
        inputs.clear()
    gpu.kernels.clear()
    inputs = SharedInputs()
    for use in (q, k, v):
        inputs.gathered(use, x)
    assert len(gpu.kernels) == 1
    inputs.gathered(q, other)
    inputs.clear()  # neither of the others read it
    assert not q.together
