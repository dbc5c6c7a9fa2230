"""Branches of torch.cond: run as plain Python, or refused with the way out."""

from __future__ import annotations

import subprocess
import sys

import torch
import torch._dynamo
from torch import nn

import dropinf
from dropinf.capture import eager
from tests.capture.right_or_refused import Cases, check, doubles, mlp, points, runs, squares  # noqa: F401

CASES = Cases()


@CASES.add()
def a_branch_that_the_data_takes():
    def loss(m, batch):
        x, y = batch
        return torch.cond(y.sum() > 0, lambda h: h.square(), lambda h: h.flip(0).abs(), (m(x),)).sum(1)

    return (
        mlp(),
        loss,
        list(zip(points(4, 4, 4, 4, 4), [torch.tensor(float(k)) for k in (1, -1, -1, 1, -1)], strict=True)),
    )


class Branches(nn.Module):
    """A layer of two, by the size of the batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return torch.cond(x.shape[0] > 3, self.a, lambda x: self.b(x).tanh(), (x,))


@CASES.add()
def a_branch_that_the_size_takes():
    return Branches(), squares, points(4, 2, 4, 3, 1, 5)


@CASES.parametrize()
@runs
def test_right_or_refused(build, options, sketch, backwards):
    check(build, sketch, backwards, **options)


def test_torch_is_as_it_was():
    before = eager._cond.cond_op
    check(a_branch_that_the_data_takes, dropinf.Identity)
    assert eager._cond.cond_op is before


def test_what_is_compiled_for_the_first_time_is_refused_with_the_way_out():
    script = (
        "import sys, torch, dropinf\n"
        "loss = lambda m, x: torch.cond(x.sum() > 0, lambda h: h * 2, lambda h: h.abs(), (m(x),)).sum(1)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "dropinf.Compressor(torch.nn.Linear(3, 2), dropinf.Identity(), loss).compress([torch.ones(4, 3)])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "RuntimeError: model: it, or the loss, is compiled while its gradients are captured" in done.stderr
    assert "import torch._dynamo before" in done.stderr
