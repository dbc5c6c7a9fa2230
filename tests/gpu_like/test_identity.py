"""What a model on a GPU is known by: as on the CPU, and without copying it again for each call."""

from __future__ import annotations

import torch
from torch import nn

import dropinf
from dropinf.capture import digests
from dropinf.capture.identity import fingerprint, identity
from tests.gpu_like.helpers import on_gpu
from tests.gpu_like.pretend import move


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3).to(torch.bfloat16))


def test_it_is_that_of_the_cpu(gpu):
    here, there = model(), move(model())
    for _ in range(2):  # not remembered, and remembered
        assert identity(there) == identity(here)
        assert fingerprint(there) == fingerprint(here)


def test_weights_are_copied_once(gpu, monkeypatch):
    there, copied = move(model()), []
    take = digests.tensor_bytes
    monkeypatch.setattr(digests, "tensor_bytes", lambda x: (copied.append(x), take(x))[1])
    digests._known.clear()
    first = fingerprint(there)
    count = len(copied)
    assert count >= len(list(there.parameters()))
    for _ in range(3):
        assert fingerprint(there) == first
    assert len(copied) == count
    there[0].weight.data[0, 0] += 1
    changed = fingerprint(there)
    assert changed != first
    assert len(copied) == count + 1
    there[0].weight.data[0, 0] -= 1
    there[0].weight.data[0, 0] += 1
    assert fingerprint(there) == changed


def test_a_call_waits_once_for_the_weights(gpu):
    there = move(nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))))
    fingerprint(there)
    gpu.waits.clear()
    fingerprint(there)
    assert len(gpu.waits) == 1, gpu.waits


def test_gradients_of_a_gpu_are_of_the_cpu_s_model(gpu):
    x = torch.randn(3, 5)
    loss = lambda m, x: m[0](x).square().sum(1)  # noqa: E731
    here = dropinf.Compressor(model().eval(), dropinf.Dropout(3), loss, layers=["0"]).compress([x])
    there = dropinf.Compressor(move(model().eval()), dropinf.Dropout(3), loss, layers=["0"]).compress([on_gpu(x)])
    assert here.origin.model == there.origin.model
